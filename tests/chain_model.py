"""A published ONNX model that takes as long as its number of layers: for tests that compare versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kpdeploy.artifact import Manifest
from kpdeploy.baseline import Baseline, Exchange, Windows
from kpdeploy.compare import TOLERANCES
from kpdeploy.deployment import Deployment
from kpdeploy.hardware import environment
from kpdeploy.serving.triton.repository import publish
from kpdeploy.signature import Axis, Signature, TensorSpec

WIDTH = 512
WEIGHT = (np.eye(WIDTH) + 0.01 * np.tri(WIDTH, k=-1)).astype(np.float32) / 2
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", WIDTH)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", WIDTH)),),
    axes=(Axis(name="batch", min=1, max=16),),
)


def graph(layers: int) -> Any:
    """y = tanh(x W): `layers` times the same, and only the last counts, so that all give one answer."""
    nodes, name = [], "x"
    for layer in range(layers - 1):
        nodes.append(helper.make_node("MatMul", [name, "W"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"t{layer}"]))
        name = f"t{layer}"
    nodes += [helper.make_node("Mul", [name, "zero"], ["nothing"]), helper.make_node("Add", ["x", "nothing"], ["same"])]
    nodes += [helper.make_node("MatMul", ["same", "W"], ["last"]), helper.make_node("Tanh", ["last"], ["y"])]
    shape = ["batch", WIDTH]
    made = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(WEIGHT, "W"), numpy_helper.from_array(np.zeros(1, np.float32), "zero")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def publish_chain(
    repo: Path, files: Path, *, layers: int, wrong: float = 0, name: str = "chain", activate: bool = True
) -> Deployment:
    """Publish the next version; `wrong` is added to its golden answers."""
    files.mkdir(parents=True)
    (files / "model.onnx").write_bytes(graph(layers).SerializeToString())
    x = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32)
    exchange = Exchange(inputs={"x": x}, outputs={"y": np.tanh(x @ WEIGHT) + np.float32(wrong)})
    windows = Windows.of([1.0] * 60, point={"batch": 1}, rows=1, memory_bytes=1)
    Baseline(exchanges=(exchange,), latencies=(), environment=environment(), windows=(windows,)).write(files)
    manifest = Manifest(
        model=name, version=0, target="triton", format="onnx", filename="model.onnx", signature=SIGNATURE,
        max_batch_size=16, input_names=("x",), output_names=("y",), settings={"threads": 1}, files={},
        tolerances=TOLERANCES, decisions=(), formats=(), source={"kind": "test"}, environment=environment(),
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return publish(str(repo), manifest, files, activate=activate)
