"""One call of an op, on each way that leads to its kernels: torch, ONNX Runtime, and NumPy arrays.

Arguments are those of the op's torch schema, as torch tensors; so are the results. What an output's memory held before
can be told from what a kernel writes: NaN where the caller allocates it, 3.4e38 under `poisoned_memory` elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kpdeploy.ops.op import NAMESPACE, ONNX_DOMAIN, OPSET, Op

if TYPE_CHECKING:
    from torch import Tensor

Arguments = tuple[Any, ...]

_M_PERTURB = -6
_POISON = 0x80  # malloc's new memory is then full of 0x7f: 3.4e38 as float32 and bfloat16, NaN as float16


@contextlib.contextmanager
def poisoned_memory() -> Iterator[bool]:
    """Let this process's new memory be full of 3.4e38: outputs that torch or ONNX Runtime allocate, and scratch.

    The value tells whether that holds: glibc's malloc does it, another one may not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield False
        return
    mallopt(_M_PERTURB, _POISON)
    try:
        yield True
    finally:
        mallopt(_M_PERTURB, 0)


def through_torch(op: Op, arguments: Arguments, device: str = "cpu") -> tuple[Tensor, ...]:
    """torch.ops.kpdeploy.<op> on a device; results are on the CPU."""
    import torch

    moved = (_moved(a, device) for a in arguments)
    return tuple(out.cpu() for out in _tuple(getattr(getattr(torch.ops, NAMESPACE), op.name)(*moved)))


def _moved(value: Any, device: str) -> Any:
    """A tensor of the CPU on another device, with its strides and what lies between its rows."""
    import torch

    if device == "cpu" or not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return memory.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def direct(op: Op, arguments: Arguments, **options: Any) -> tuple[Tensor, ...]:
    """kpdeploy._core.<op>, into arrays that hold NaN. `options` are its own: threads, packed."""
    import torch

    core = importlib.import_module("kpdeploy._core")
    outs = _outputs(op, arguments)
    arrays = [array_of(a) if isinstance(a, torch.Tensor) else a for a in (*arguments, *outs)]
    getattr(core, op.name)(*arrays, **options)
    return outs


def reference(op: Op, arguments: Arguments) -> tuple[Tensor, ...]:
    """The op's reference in float64, of arguments in any dtype."""
    import torch

    wide = (a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
    return _tuple(op.reference(*wide))


def _outputs(op: Op, arguments: Arguments) -> tuple[Tensor, ...]:
    """Outputs of the right shape and dtype that hold NaN."""
    import torch

    return tuple(torch.full_like(out, float("nan")) for out in _tuple(op.fake(*arguments)))


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def array_of(tensor: Tensor) -> Any:
    """The tensor's memory as a NumPy array; bfloat16 as uint16 of the same bits, which NumPy lacks."""
    import torch

    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


# Through ONNX Runtime: a graph of one node.


def onnx_model(op: Op, arguments: Arguments, *, constant: bool = False) -> bytes:
    """A graph that is one call of the op: inputs i0, i1, …, outputs o0, …, in the dtype of the arguments.

    `constant`: weights and biases are initializers and not inputs, as they are in a model: kernels pack them.
    """
    from onnx import helper

    inputs, initializers, names = [], [], []
    for index, (parameter, tensor) in enumerate(_tensors(op, arguments)):
        name = f"i{index}"
        names.append(name if tensor is not None else "")
        if tensor is None:
            continue
        kind = _onnx_type(tensor)
        if constant and parameter.endswith(("weight", "bias")):
            content = array_of(tensor.contiguous()).tobytes()
            initializers.append(helper.make_tensor(name, kind, tensor.shape, content, raw=True))
        else:
            inputs.append(helper.make_tensor_value_info(name, kind, [None] * tensor.dim()))
    outs = [f"o{index}" for index in range(op.results)]
    node = helper.make_node(op.onnx, names, outs, domain=ONNX_DOMAIN, **_attributes(op, arguments))
    results = [helper.make_tensor_value_info(out, _onnx_type(arguments[0]), None) for out in outs]
    graph = helper.make_graph([node], op.name, inputs, results, initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ONNX_DOMAIN, 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return made


def onnx_session(model: bytes, library: str, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """A session on two threads that has the op library."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, providers=list(providers))


def through_onnxruntime(op: Op, arguments: Arguments, session: Any) -> tuple[Tensor, ...]:
    """The outputs of a session of `onnx_model`, written into memory that held NaN."""
    outs = _outputs(op, tuple(_contiguous(a) for a in arguments))
    binding = session.io_binding()
    wanted = {entry.name for entry in session.get_inputs()}
    # The binding holds no reference to the memory: `kept` does.
    kept = []
    for index, (_, tensor) in enumerate(_tensors(op, arguments)):
        if tensor is not None and f"i{index}" in wanted:
            kept.append(_ort_value(tensor.contiguous()))
            binding.bind_ortvalue_input(f"i{index}", kept[-1])
    for index, out in enumerate(outs):
        kept.append(_ort_value(out))
        binding.bind_ortvalue_output(f"o{index}", kept[-1])
    session.run_with_iobinding(binding)
    return outs


def _ort_value(tensor: Tensor) -> Any:
    """A value on the tensor's own memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array_of(tensor), _onnx_type(tensor))


def _contiguous(value: Any) -> Any:
    import torch

    return value.contiguous() if isinstance(value, torch.Tensor) else value


def _tensors(op: Op, arguments: Arguments) -> list[tuple[str, Tensor | None]]:
    """Each tensor of the call with its name."""
    given = zip(op.parameters, arguments, strict=True)
    return [(name, a) for (kind, name), a in given if kind.startswith("Tensor")]


def _attributes(op: Op, arguments: Arguments) -> dict[str, Any]:
    given = zip(op.parameters, arguments, strict=True)
    return {name: int(a) if kind == "bool" else a for (kind, name), a in given if not kind.startswith("Tensor")}


def _onnx_type(tensor: Tensor) -> int:
    from onnx import TensorProto

    name = str(tensor.dtype).removeprefix("torch.")
    return int(TensorProto.DataType.Value({"float32": "FLOAT", "float64": "DOUBLE"}.get(name, name.upper())))
