"""The runtime of ONNX beyond the plain CPU: buckets, and what it says where a GPU cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kpdeploy.export.cuda import Form, described
from kpdeploy.runtimes import onnx as runtime
from kpdeploy.signature import Signature, TensorSpec, parse_inputs

INPUTS = parse_inputs(("x:float32[batch=1..4,width=1..40]", "scale:float32[batch]"))
SIGNATURE = Signature(
    inputs=INPUTS.inputs,
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", "width")),),
    axes=INPUTS.axes,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = x · scale + the width that the graph is run with: an answer tells its bucket."""
    from onnx import TensorProto, checker, helper, save

    nodes = [
        helper.make_node("Unsqueeze", ["scale", "last"], ["column"]),
        helper.make_node("Mul", ["x", "column"], ["scaled"]),
        helper.make_node("Shape", ["x"], ["width"], start=1, end=2),
        helper.make_node("Cast", ["width"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["scaled", "wide"], ["y"]),
    ]
    info, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    inputs = [info("x", kind, ["batch", "width"]), info("scale", kind, ["batch"])]
    last = helper.make_tensor("last", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "scaled", inputs, [info("y", kind, ["batch", "width"])], [last])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    checker.check_model(made)
    save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def loaded(model: Path, padded: tuple[str, ...], **settings: Any) -> Any:
    model.with_name("graphs.json").write_text(json.dumps(described(SIGNATURE, Form(padded=padded), "cpu")))
    return runtime.load(str(model), inputs=("x", "scale"), outputs=("y",), settings={"graphs": True, **settings})


def request(batch: int, width: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng()
    return [rng.standard_normal(shape, np.float32) for shape in ((batch, width), (batch,))]


@pytest.mark.parametrize(("sizes", "width"), [((1, 1), 1), ((3, 5), 16), ((4, 40), 40), ((2, 17), 32)])
def test_a_request_is_filled_up_to_its_bucket_and_its_answer_is_cut(
    sizes: tuple[int, int], width: int, model: Path
) -> None:
    run = loaded(model, ("batch", "width"))
    for _ in range(2):  # what the one before left behind it is gone
        x, scale = request(*sizes)
        (y,) = run([x, scale])
        np.testing.assert_array_equal(y, x * scale[:, None] + np.float32(width))
    assert run.missed == 0


def test_what_no_bucket_holds_runs_as_it_is_and_is_counted(model: Path) -> None:
    run = loaded(model, ("batch",))
    x, scale = request(3, 5)
    np.testing.assert_array_equal(run([x, scale])[0], x * scale[:, None] + np.float32(5))
    assert run.missed == 1


def test_inputs_that_are_no_contiguous_rows_are_taken(model: Path) -> None:
    x, scale = request(32, 4)
    (y,) = loaded(model, ("batch", "width"))([x.T, scale[::8]])
    np.testing.assert_array_equal(y, x.T * scale[::8, None] + np.float32(32))


def test_an_onnxruntime_without_cuda_says_which_package_has_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeError, match=r"has no CUDAExecutionProvider here: onnxruntime-gpu has it"):
        loaded(model, (), device="cuda")


def test_a_missing_library_of_cuda_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: Any) -> None:
        if "providers_cuda" in path:
            raise OSError("libcublasLt.so.13: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(runtime.ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(runtime.ctypes, "CDLL", refuse)
    with pytest.raises(RuntimeError, match=r"libcublasLt\.so\.13: cannot open.*pip install"):
        loaded(model, (), device="cuda")


class Session:
    """A session of ONNX Runtime as it answers where there is no GPU, or no graph."""

    def __init__(self, _: str, options: Any, providers: list[Any]) -> None:
        assert providers[0][1]["use_tf32"] == "0"
        if providers[0][1]["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = {"CPUExecutionProvider": ["NonZero", "Loop", "NonZero"], "CUDAExecutionProvider": ["Add"]}
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops])
            for name, ops in nodes.items()
        ]


@pytest.mark.parametrize(
    ("graphs", "says"),
    [
        (True, "captures no CUDA graph of this model: these nodes are not on the GPU: Loop, NonZero"),
        (False, "cannot use a GPU here"),
    ],
)
def test_a_session_that_is_not_on_the_gpu_is_an_error(
    graphs: bool, says: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_load_provider", lambda: None)
    monkeypatch.setattr(runtime.ort, "InferenceSession", Session)
    with pytest.raises(RuntimeError, match=says):
        loaded(model, (), device="cuda", graphs=graphs)


def test_the_buckets_are_loaded_from_the_runtimes_own_folder(model: Path) -> None:
    before = set(sys.modules)
    loaded(model, ())
    assert not {name for name in set(sys.modules) - before if "buckets" in name}


class Driver:
    """CUDA's driver with 80 GB, of which 3 are taken; without a context it knows nothing."""

    def __init__(self, used: bool) -> None:
        self.used = used

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 77_000, 80_000
        return 0 if self.used else 201

    def cuCtxGetDevice(self, gpu: Any) -> int:
        gpu._obj.value = 0
        return 0

    def cuDeviceGetName(self, name: Any, size: int, gpu: Any) -> int:
        name.value = b"NVIDIA H100"
        return 0


def test_what_is_taken_on_the_gpu_is_told_once_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: Driver(used=True))
    assert [(part["bytes"], part["device"]) for part in runtime.memory()] == [(3_000, "NVIDIA H100")]
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: Driver(used=False))
    assert runtime.memory() == []
    monkeypatch.undo()
    assert runtime.memory() == []  # no GPU here, or none in use
