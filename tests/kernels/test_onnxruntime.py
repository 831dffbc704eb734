"""The ops through ONNX Runtime with the op library, in this process and in one that has nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import ALL, Case, error, to_dtype
from onnx import TensorProto, helper, numpy_helper

from kpdeploy.ops import ONNX_DOMAIN, OPS

TYPES = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
LOST_DIGITS = {"far from 0": 5, "far from 0, no bias": 5, "large scores": 20}


def attributes_of(op: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    names = [part.split("=")[0].split()[-1] for part in OPS[op].schema.split("(", 1)[1].split(")")[0].split(", ")]
    kept = {n: v for n, v in zip(names, arguments, strict=True) if not isinstance(v, torch.Tensor) and v is not None}
    return {name: int(value) if isinstance(value, bool) else value for name, value in kept.items()}


def model_of(op: str, arguments: tuple[Any, ...], dtype: torch.dtype, constant: bool = False) -> bytes:
    """float32 in and out (bfloat16 is cast inside). `constant`: 2-dim tensors after the first are initializers."""
    nodes, inputs, initializers, names = [], [], [], []
    tensors = [a for a in arguments if isinstance(a, torch.Tensor) or a is None]
    for index, tensor in enumerate(tensors):
        name = f"i{index}"
        names.append(name if tensor is not None else "")
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [None] * tensor.dim()))
            continue
        source = name if dtype == torch.float32 else f"{name}_f32"
        if constant and index and tensor.dim() == 2:
            initializers.append(numpy_helper.from_array(tensor.float().numpy(), source))
        else:
            inputs.append(helper.make_tensor_value_info(source, TensorProto.FLOAT, [None] * tensor.dim()))
        if source != name:
            nodes.append(helper.make_node("Cast", [source], [name], to=TYPES[dtype]))
    count = len(OPS[op].schema.split("->")[1].split(","))
    outs = [f"o{i}" for i in range(count)]
    attributes = attributes_of(op, arguments)
    nodes.append(helper.make_node(OPS[op].onnx, names, outs, domain=ONNX_DOMAIN, **attributes))
    nodes += [helper.make_node("Cast", [out], [f"{out}_f32"], to=TensorProto.FLOAT) for out in outs]
    results = [helper.make_tensor_value_info(f"{out}_f32", TensorProto.FLOAT, None) for out in outs]
    graph = helper.make_graph(nodes, "one_op", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(ONNX_DOMAIN, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model.SerializeToString()


def feeds_of(arguments: tuple[Any, ...], session: onnxruntime.InferenceSession) -> dict[str, np.ndarray[Any, Any]]:
    tensors = [a for a in arguments if isinstance(a, torch.Tensor) or a is None]
    wanted = {entry.name for entry in session.get_inputs()}
    found = {}
    for index, tensor in enumerate(tensors):
        for name in (f"i{index}", f"i{index}_f32"):
            if name in wanted and tensor is not None:
                found[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
    return found


def session_of(model: bytes, library: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_once(name: str, arguments: tuple[Any, ...], library: str) -> Any:
    session = session_of(model_of(name, arguments, torch.float32), library)
    return session.run(None, feeds_of(arguments, session))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case[0]}: {case[1]}")
def test_an_op_gives_the_reference(case: Case, dtype: torch.dtype, onnx_library: str) -> None:
    name, what, arguments = case
    arguments = to_dtype(arguments, dtype)
    ref = OPS[name].reference(*to_dtype(arguments, torch.float64))
    for constant in (False, True) if "linear" in name else (False,):
        session = session_of(model_of(name, arguments, dtype, constant), onnx_library)
        outs = session.run(None, feeds_of(arguments, session))
        for out, wanted in zip(outs, ref if isinstance(ref, tuple) else (ref,), strict=True):
            assert out.shape == tuple(wanted.shape)
            assert error(torch.from_numpy(out), wanted) <= TOLERANCES[dtype] * LOST_DIGITS.get(what, 1)


X, W = torch.ones(4, 8), torch.ones(6, 8)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("linear_activation", (X, W[:, :5], None, "gelu"), "weight is [6, 5], which does not fit x [4, 8]"),
        ("linear_activation", (X, W, X[0], "gelu"), "bias is [8]; [6] fits"),
        ("linear_activation", (X, W, None, "tanh"), "activation is none of"),
        ("linear_activation", (torch.tensor(1.0), W, None, "gelu"), "x has 0 dims"),
        ("gated_linear", (X, W, W[:3]), "gate_weight is [6, 8], and up_weight is [3, 8]"),
        ("add_layer_norm", (X, X[:1], X[0], None, 1e-5), "residual is [1, 8], and x is [4, 8]"),
        ("attention", (X, X, X, None, 2, 2, 1.0, False), "query has 2 dims, not at least 3"),
        ("attention", (X[None], X[None], X[None], torch.tensor([5]), 2, 2, 1.0, False), "lengths[0] is 5, with 4"),
    ],
)
def test_wrong_use_is_one_clear_error(name: str, arguments: tuple[Any, ...], message: str, onnx_library: str) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011  (ONNX Runtime has a class for every status)
        run_once(name, arguments, onnx_library)
    assert message in str(raised.value)


def test_a_process_with_nothing_but_onnx_runtime_runs_the_model(tmp_path: Path, onnx_library: str) -> None:
    case = next(arguments for name, what, arguments in ALL if what == "gelu")
    (tmp_path / "model.onnx").write_bytes(model_of("linear_activation", case, torch.float32, constant=True))
    script = (
        "import sys, numpy, onnxruntime\n"
        "o = onnxruntime.SessionOptions(); o.register_custom_ops_library(sys.argv[1])\n"
        "s = onnxruntime.InferenceSession(sys.argv[2], o)\n"
        "feeds = {i.name: numpy.ones((3, 11, 37) if len(i.shape) == 3 else 45, 'float32') for i in s.get_inputs()}\n"
        "print(s.run(None, feeds)[0].shape, 'torch' in sys.modules, 'kpdeploy' in sys.modules)"
    )
    command = [sys.executable, "-c", script, onnx_library, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stdout) == (0, "(3, 11, 45) False False\n"), done.stderr


def test_the_library_exports_one_symbol_and_needs_no_framework(onnx_library: str) -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", onnx_library], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["RegisterCustomOps"]
    dynamic = subprocess.run(["readelf", "-d", onnx_library], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime" not in dynamic
    assert "RPATH" not in dynamic.upper().replace("RUNPATH", "RPATH")
