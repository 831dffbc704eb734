"""The ops through ONNX Runtime with the op library, in this process and in one that has nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from kpdeploy.export.custom_ops import define
from kpdeploy.ops import OPS, calls
from kpdeploy.ops.cases import Case, all_cases, cases_of, error, to_dtype, tolerance

DTYPES = (torch.float32, torch.bfloat16)


def run_once(name: str, arguments: tuple[Any, ...], library: str) -> Any:
    """Plain, and not into memory of the right shape: what is wrong has none."""
    session = calls.onnx_session(calls.onnx_model(OPS[name], arguments), library)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor) or a is None]
    return session.run(None, {f"i{i}": tensor.numpy() for i, tensor in enumerate(tensors) if tensor is not None})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case[0]}: {case[1]}")
def test_an_op_gives_the_reference(case: Case, dtype: torch.dtype, onnx_library: str) -> None:
    name, what, arguments = case
    arguments = to_dtype(arguments, dtype, OPS[name])
    wanted = calls.reference(OPS[name], arguments)
    for constant in (False, True):
        session = calls.onnx_session(calls.onnx_model(OPS[name], arguments, constant=constant), onnx_library)
        for out, ref in zip(calls.through_onnxruntime(OPS[name], arguments, session), wanted, strict=True):
            assert error(out, ref) <= tolerance("kpdeploy", str(dtype).removeprefix("torch."), what)


@pytest.mark.parametrize(
    "case", [*cases_of("packed_attention"), *cases_of("rotary_embedding")], ids=lambda case: f"{case[0]}: {case[1]}"
)
def test_the_function_of_an_op_stands_in_for_its_kernel(case: Case) -> None:
    name, what, arguments = case
    dense = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments)
    model = onnx_ir.serde.deserialize_model(onnx.load_from_string(calls.onnx_model(OPS[name], dense)))
    define(model)
    session = onnxruntime.InferenceSession(onnx_ir.serde.serialize_model(model).SerializeToString())
    tensors = [value for value in dense if isinstance(value, torch.Tensor)]
    (out,) = session.run(None, {f"i{index}": tensor.numpy() for index, tensor in enumerate(tensors)})
    limit = tolerance("kpdeploy", "float32", what)
    assert error(torch.from_numpy(out), calls.reference(OPS[name], arguments)[0]) <= limit


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
        ("gated_linear", (X, W[:, :5], W), "gate_weight is [6, 5], which does not fit x [4, 8]"),
        ("linear_activation", (X[:0], W[:, :5], None, "gelu"), "weight is [6, 5], which does not fit x [0, 8]"),
        ("linear_activation", (X, W[0], None, "gelu"), "weight has 1 dims, not at least 2"),
        ("linear_activation", (X, None, None, "gelu"), "input 1 is marked single but has an empty string"),
        ("rms_norm", (X, X[0].double(), 1e-5), "Type 'tensor(double)' of input parameter (i1)"),
        ("rms_norm", (X, None, 1e-5), "input 1 is marked single but has an empty string"),
        ("rms_norm", (X[:0], W[0, :7], 1e-5), "weight is [7]; [8] fits x"),
        ("layer_norm", (X, W[0], W[0, :7], 1e-5), "bias is [7]; [8] fits x"),
        ("add_rms_norm", (X, X[:3], X[0], 1e-5), "residual is [3, 8], and x is [4, 8]"),
        ("attention", (X[None], X[None], X[None], torch.tensor([1]).int(), 2, 2, 1.0, False), "tensor(int32)"),
        ("attention", (X[None], X[None], X[None], None, 3, 3, 1.0, False), "its last dim is not 3 heads"),
        ("attention", (X, X, X, None, 2, 2, 1.0, False), "query has 2 dims, not at least 3"),
        ("attention", (X[None], X[None], X[None], torch.tensor([5]), 2, 2, 1.0, False), "lengths[0] is 5, with 4"),
        (
            "packed_attention",
            (X[None], X[None], X[None], torch.tensor([0, 5]), 2, 2, 1.0, False),
            "offsets[1] is 5, after",
        ),
        ("packed_attention", (X[None], X[None], X[None], torch.tensor([0]).int(), 2, 2, 1.0, False), "tensor(int32)"),
        ("packed_attention", (X[None], X[None], X[None], torch.tensor([0])[1:], 2, 2, 1.0, False), "[sequences + 1]"),
        ("packed_attention", (X[None], X[None], X[None], None, 2, 2, 1.0, False), "input 3 is marked single but"),
        ("rotary_embedding", (X[None], X[None], X[None], 2), "cos is [1, 4, 8]; x is [1, 4, 8] in heads of 4"),
        ("rotary_embedding", (X[None], X[None].double(), X[None], 1), "Type 'tensor(double)' of input parameter (i1)"),
    ],
)
def test_wrong_use_is_one_clear_error(name: str, arguments: tuple[Any, ...], message: str, onnx_library: str) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011  (ONNX Runtime has a class for every status)
        run_once(name, arguments, onnx_library)
    assert message in str(raised.value)


@pytest.mark.parametrize("weight", [W[:, :5], W[0], torch.tensor(1.0)], ids=["K", "rank 1", "rank 0"])
def test_a_constant_weight_that_does_not_fit_is_one_clear_error(weight: torch.Tensor, onnx_library: str) -> None:
    model = calls.onnx_model(OPS["gated_linear"], (X, weight, weight), constant=True)
    with pytest.raises(Exception, match=r"kpdeploy::\w+: (gate_)?weight") as raised:
        calls.onnx_session(model, onnx_library).run(None, {"i0": X.numpy()})
    assert "onnxruntime" in type(raised.value).__module__


def test_a_process_with_nothing_but_onnx_runtime_runs_the_model(tmp_path: Path, onnx_library: str) -> None:
    case = next(arguments for _, what, arguments in cases_of("linear_activation") if what == "gelu")
    model = calls.onnx_model(OPS["linear_activation"], case, constant=True)
    (tmp_path / "model.onnx").write_bytes(model)
    script = (
        "import sys, numpy, onnxruntime\n"
        "o = onnxruntime.SessionOptions(); o.register_custom_ops_library(sys.argv[1])\n"
        "s = onnxruntime.InferenceSession(sys.argv[2], o)\n"
        "feeds = {i.name: numpy.ones((3, 11, 37), 'float32') for i in s.get_inputs()}\n"
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
