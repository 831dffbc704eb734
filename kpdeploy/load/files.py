"""MODEL as a file: an ONNX graph, an exported program (.pt2) or a TorchScript archive (.pt). No pickle is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kpdeploy.artifact import sha256
from kpdeploy.decision import Applied, Decision
from kpdeploy.errors import InputMismatch, ModelBroken, ModelUnsafe, PackageMissing
from kpdeploy.inputs import default_values
from kpdeploy.load import Request, model_name
from kpdeploy.load.describe import example_from_npz, model_from_module, require_inputs, signature_from_example
from kpdeploy.load.reference import import_onnxruntime
from kpdeploy.load.untrusted import archive_names, check_program, no_pickles
from kpdeploy.model import Model
from kpdeploy.signature import DTYPES, Axis, Signature, TensorSpec, Values, parse_inputs


def load_onnx(argument: str, request: Request) -> Model:
    """An .onnx file, checked and run once by ONNX Runtime."""
    path = Path(argument)
    try:
        import onnx

        onnxruntime = import_onnxruntime()
    except ImportError as error:
        raise PackageMissing(f"an ONNX model needs {error.name}", next_step="pip install 'kpdeploy[export]'") from None
    try:
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path), load_external_data=False).graph
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _broken(path, "an ONNX model", error) from None
    signature = parse_inputs(request.inputs) if request.inputs else _onnx_inputs(graph, session, request)
    names = [node.name for node in session.get_inputs()]
    if [spec.name for spec in signature.inputs] != names:
        raise InputMismatch(
            f"the graph of {path} takes {', '.join(names)}",
            why=f"--input names {', '.join(s.name for s in signature.inputs)}",
            next_step="name every input of the graph, in its order",
        )
    outputs = [_onnx_output(node, signature) for node in session.get_outputs()]
    return Model(
        name=model_name(request.name or path.stem),
        kind="onnx",
        signature=signature.with_outputs(outputs),
        source=_source("onnx", path),
        path=path,
        decisions=tuple(_values_told(signature)),
    )


def _onnx_inputs(graph: Any, session: Any, request: Request) -> Signature:
    if request.example is not None:
        names = [node.name for node in session.get_inputs()]
        return signature_from_example(example_from_npz(request.example, names), max_batch=request.max_batch)
    axes: dict[str, Axis] = {}
    specs = []
    for node in session.get_inputs():
        dtype = _onnx_dtype(node)
        shape = [_onnx_dim(d, index, axes, request.max_batch) for index, d in enumerate(node.shape)]
        values = _gather_rows(graph, node.name) if np.dtype(dtype).kind in "iu" else None
        specs.append(TensorSpec(name=node.name, dtype=dtype, shape=tuple(shape), values=values))
    return Signature(inputs=tuple(specs), axes=tuple(axes.values()))


def _onnx_dim(dim: Any, index: int, axes: dict[str, Axis], max_batch: int) -> int | str:
    if isinstance(dim, int):
        return dim
    name = model_name(str(dim)).replace("-", "_") if isinstance(dim, str) else f"dim_{index}"
    axes.setdefault(name, Axis(name=name, min=1, max=max_batch if index == 0 else 128))
    return name


def _onnx_output(node: Any, signature: Signature) -> TensorSpec:
    known = {axis.name for axis in signature.axes}
    shape = [d if isinstance(d, int) or d in known else -1 for d in node.shape]
    return TensorSpec(name=node.name, dtype=_onnx_dtype(node), shape=tuple(shape))


def _onnx_dtype(node: Any) -> str:
    name = node.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    if dtype not in DTYPES:
        raise InputMismatch(
            f"the tensor {node.name} of the graph is a {node.type}", why=f"supported are {', '.join(DTYPES)}"
        )
    return str(dtype)


def _gather_rows(graph: Any, name: str) -> Values | None:
    """The valid indices of an input that a Gather looks up in a constant table, directly or through a Cast."""
    followed = {name}
    rows: list[int] = []
    tables = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) > 1}
    for node in graph.node:
        if node.op_type in ("Cast", "Identity") and node.input[0] in followed:
            followed.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in followed and node.input[0] in tables:
            rows.append(tables[node.input[0]])
    return Values(kind="range", low=0, high=min(rows) - 1) if rows else None


def load_program(argument: str, request: Request) -> Model:
    """An exported program that torch.export.save wrote."""
    path = Path(argument)
    if any("/data/aotinductor/" in name for name in archive_names(path)):
        raise ModelBroken(
            f"{path} is already compiled by AOTInductor",
            why="it holds machine code, which cannot be exported again",
            next_step="give the exported program (torch.export.save), or the module itself",
        )
    check_program(path)
    try:
        with no_pickles(path):
            program = torch.export.load(path)
    except ModelUnsafe:
        raise
    except Exception as error:
        raise _broken(path, "an exported program", error) from None
    signature = parse_inputs(request.inputs) if request.inputs else _program_inputs(program)
    model = model_from_module(
        program.module(check_guards=False),  # guards are Python source in the file
        signature,
        name=model_name(request.name or path.stem),
        source=_source("pt2", path),
        keywords=False,
        kind="program",
    )
    return model


def _program_inputs(program: torch.export.ExportedProgram) -> Signature:
    """The user inputs of the program's graph, with the ranges that it was exported for."""
    wanted = set(program.graph_signature.user_inputs)
    axes: dict[str, Axis] = {}  # by the program's own symbols
    specs = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in wanted:
            continue
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise InputMismatch(f"the program's input {node.name} is a {type(value).__name__}, not a tensor")
        shape = tuple(_program_dim(d, index, axes, program) for index, d in enumerate(value.shape))
        dtype = str(value.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=node.name, dtype="float32" if dtype == "bfloat16" else dtype, shape=shape))
    return Signature(inputs=tuple(specs), axes=tuple(axes.values()))


def _program_dim(size: Any, index: int, axes: dict[str, Axis], program: torch.export.ExportedProgram) -> int | str:
    if isinstance(size, int):
        return size
    symbol = size.node.expr
    if str(symbol) not in axes:
        bounds = program.range_constraints.get(symbol)
        low = max(int(bounds.lower), 1) if bounds is not None else 1
        # An upper bound that nobody stated is infinite: 128 is then what is proven.
        stated = bounds is not None and bounds.upper.is_number and bounds.upper < 2**31
        high = int(bounds.upper) if bounds is not None and stated else 128
        taken = {axis.name for axis in axes.values()}
        name = "batch" if index == 0 and "batch" not in taken else str(symbol)
        axes[str(symbol)] = Axis(name=name, min=low, max=max(low, high))
    return axes[str(symbol)].name


def load_torchscript(argument: str, request: Request) -> Model:
    """A TorchScript archive. It does not say what it takes: --input or --example must."""
    path = Path(argument)
    names = archive_names(path)
    if not any("/code/" in name for name in names):
        raise ModelUnsafe(
            f"{path} is not TorchScript but a pickle (torch.save)",
            why="unpickling can run code from the file, and a state dict holds no model",
            next_step="write a factory that builds the module and loads it with torch.load(…, weights_only=True): "
            "MODEL = package.module:factory",
        )
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:
        raise _broken(path, "TorchScript", error) from None
    if request.inputs:
        signature = parse_inputs(request.inputs)
    elif request.example is not None:
        signature = signature_from_example(example_from_npz(request.example), max_batch=request.max_batch)
    else:
        raise require_inputs(module)
    model = model_from_module(
        module,
        signature,
        name=model_name(request.name or path.stem),
        source=_source("torchscript", path),
        keywords=False,
        kind="torchscript",
    )
    return model


def _values_told(signature: Signature) -> list[Decision]:
    told: list[Decision] = []
    for spec in signature.inputs:
        if spec.values is None and np.dtype(spec.dtype).kind in "iu":
            values = default_values(spec.dtype)
            detail = "not known; state it with {low..high}"
            told.append(Applied(what=f"values of {spec.name}: {int(values.low)}..{int(values.high)}", detail=detail))
    return told


def _source(kind: str, path: Path) -> dict[str, Any]:
    return {"kind": kind, "file": path.name, "sha256": sha256(path)}


def _broken(path: Path, kind: str, error: Exception) -> ModelBroken:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelBroken(
        f"{path} cannot be read as {kind}", why=lines[0], next_step="check that the file is whole, or export it again"
    )


LOADERS = {
    ".onnx": load_onnx,
    ".pt2": load_program,
    ".pt": load_torchscript,
    ".pth": load_torchscript,
    ".ts": load_torchscript,
}
