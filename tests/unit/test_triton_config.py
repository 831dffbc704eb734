"""config.pbtxt says what the manifest says, in Triton's words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_version import baseline, exchange, manifest
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from kpdeploy.artifact import Latency
from kpdeploy.baseline import Baseline, Exchange, Windows
from kpdeploy.errors import FormatUnavailable, RepositoryBroken
from kpdeploy.serving.triton.config import LOADERS, model_config, read_config, served_names, warmup_files, write_config
from kpdeploy.signature import Axis, Signature, TensorSpec


def signature(*inputs: str) -> Signature:
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=(2,)) for name in inputs)
    return Signature(inputs=specs, outputs=(TensorSpec(name="out", dtype="float32", shape=(2,)),))


@pytest.mark.parametrize(
    ("format", "inputs", "expected"),
    [
        ("onnx", ("a", "b.c"), (("a", "b.c"), ("out",))),
        ("openvino", ("a", "b.c"), (("a", "b.c"), ("out",))),
        ("torchscript", ("a", "b"), (("a", "b"), ("out__0",))),
        ("torchscript", ("a", "b.c"), (("INPUT__0", "INPUT__1"), ("out__0",))),
        ("torchscript", ("a", "lambda"), (("INPUT__0", "INPUT__1"), ("out__0",))),
        ("pt2", ("a", "b"), (("INPUT__0", "INPUT__1"), ("OUTPUT__0",))),
    ],
)
def test_each_format_has_the_names_that_its_backend_looks_for(
    format: str, inputs: tuple[str, ...], expected: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    assert served_names(format, signature(*inputs)) == expected


def test_text_survives_a_round_trip() -> None:
    config = model_config(manifest(version=3), baseline())
    assert read_config(write_config(config), where="here") == config


@pytest.mark.parametrize(
    ("format", "backend", "platform"),
    [
        ("onnx", "onnxruntime", ""),
        ("torchscript", "", "pytorch_libtorch"),
        ("pt2", "", "torch_aoti"),
        ("openvino", "openvino", ""),
    ],
)
def test_each_format_is_loaded_by_its_own_backend(format: str, backend: str, platform: str) -> None:
    config = model_config(manifest(format=format, filename="file", version=3), baseline())
    assert (config.backend, config.platform, config.default_model_filename) == (backend, platform, "file")
    assert list(config.version_policy.specific.versions) == [3]
    stated = manifest(format=format, filename="file", version=3).digest
    parameters = {**dict(LOADERS[format].parameters), "kpdeploy_digest": stated}
    assert {key: p.string_value for key, p in config.parameters.items()} == parameters


def test_a_batching_model_leaves_the_batch_axis_out() -> None:
    config = model_config(manifest(), baseline())
    assert config.max_batch_size == 8
    assert [list(i.dims) for i in config.input] == [[-1], [1]]
    assert not config.input[0].HasField("reshape")
    # One number a row: Triton takes no tensor without dims, and gives the model the shape without the 1.
    assert config.input[1].HasField("reshape")
    assert list(config.input[1].reshape.shape) == []
    assert config.HasField("dynamic_batching")


def test_a_model_that_does_not_batch_states_whole_shapes() -> None:
    config = model_config(manifest(max_batch_size=0), baseline())
    assert [list(i.dims) for i in config.input] == [[-1, -1], [-1]]
    assert not config.HasField("dynamic_batching")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]
    assert list(config.model_warmup[0].inputs["x"].dims) == [10, 5]


def test_free_axes_of_outputs_are_dynamic() -> None:
    tensor = TensorSpec(name="x", dtype="int64", shape=("n", 4))
    result = TensorSpec(name="y", dtype="bool", shape=(-1, 4))
    free = Signature(inputs=(tensor,), outputs=(result,), axes=(Axis(name="n", min=1, max=4),))
    config = model_config(
        manifest(signature=free, max_batch_size=0, input_names=("x",), output_names=("y",)),
        replace(baseline(), exchanges=()),
    )
    assert list(config.output[0].dims) == [-1, 4]
    assert (config.input[0].data_type, config.output[0].data_type) == (9, 1)  # TYPE_INT64, TYPE_BOOL


def test_a_scalar_that_triton_cannot_carry_is_refused_by_name() -> None:
    lone = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(2,)),),
        outputs=(TensorSpec(name="loss", dtype="float32", shape=()),),
    )
    with pytest.raises(FormatUnavailable, match="loss"):
        model_config(manifest(signature=lone, max_batch_size=0, input_names=("x",), output_names=("loss",)), baseline())


@pytest.mark.parametrize(("level", "number"), [("none", 2), ("basic", -1), ("extended", 1), ("all", None)])
def test_graph_level_of_onnx_is_the_proven_one(level: str, number: int | None) -> None:
    config = model_config(manifest(settings={"graph_level": level}), baseline())
    assert config.HasField("optimization") == (number is not None)
    if number is not None:
        assert config.optimization.graph.level == number


def test_settings_reach_the_backend() -> None:
    settings = {"threads": 2, "op_libraries": ("libops.so",)}
    config = model_config(manifest(settings=settings, version=3, mount="/srv/repo"), baseline())
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    name = manifest().model
    assert list(config.model_operations.op_library_filename) == [f"/srv/repo/{name}/3/libops.so"]


ON_GPU = {"device": "cuda", "precision": "float16", "op_libraries": ("libkpdeploy_onnx.so",)}

NATIVE = """\
optimization {
  execution_accelerators {
    gpu_execution_accelerator {
      name: "cuda"
      parameters {
        key: "use_tf32"
        value: "0"
      }
    }
  }
}
"""


def test_onnx_on_a_gpu_is_nvidias_backend_without_graphs_which_it_cannot_hold() -> None:
    config = model_config(manifest(version=3, settings=ON_GPU), baseline())
    assert config.backend == "onnxruntime"
    assert [group.kind for group in config.instance_group] == [ModelInstanceGroup.KIND_GPU]
    text = write_config(config)
    assert NATIVE in text
    assert "cuda_graph" not in text
    assert list(config.model_operations.op_library_filename) == ["/models/tiny/3/libkpdeploy_onnx.so"]


def test_onnx_in_cuda_graphs_is_run_by_the_model_py_that_the_version_holds() -> None:
    config = model_config(manifest(version=3, settings={**ON_GPU, "graphs": True}, padded_axes=("width",)), baseline())
    assert config.backend == "python"
    assert [group.kind for group in config.instance_group] == [ModelInstanceGroup.KIND_GPU]
    # Its runtime takes tensors of the host, which is the backend's default.
    assert set(config.parameters) == {"kpdeploy_digest"}
    assert not config.HasField("optimization")
    assert not config.model_operations.op_library_filename
    assert [entry.allow_ragged_batch for entry in config.input] == [True, False]


@pytest.mark.parametrize(("p50_ms", "delay_us"), [(4.0, 200), (200.0, 1000), (0.6, 0)])
def test_queue_delay_is_a_small_part_of_the_latency(p50_ms: float, delay_us: int) -> None:
    slow = Latency(point={}, p50_ms=900.0, p99_ms=901.0, calls=9)
    latencies = (slow, Latency(point={}, p50_ms=p50_ms, p99_ms=p50_ms, calls=9))
    config = model_config(manifest(), replace(baseline(), latencies=latencies))
    assert config.dynamic_batching.max_queue_delay_microseconds == delay_us
    # What is packaged counts, where it was measured: on a GPU it may take a hundredth of the model's time.
    windows = (Windows.of([p50_ms] * 8, point={}, rows=1, memory_bytes=0),)
    config = model_config(manifest(), replace(baseline(), latencies=(slow,), windows=windows))
    assert config.dynamic_batching.max_queue_delay_microseconds == delay_us


def test_warmup_files_hold_one_row_of_the_largest_golden_request() -> None:
    files = warmup_files(manifest(version=3), baseline())
    largest = exchange(10, 5, seed=1)
    assert files == {
        "v3-x": largest.inputs["x"][0].tobytes(),
        "v3-scale": largest.inputs["scale"][0].tobytes(),
    }
    config = model_config(manifest(version=3), baseline())
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 8]
    named = {entry.input_data_file: list(entry.dims) for entry in config.model_warmup[1].inputs.values()}
    assert named == {"v3-x": [5], "v3-scale": [1]}


def test_a_name_with_a_slash_makes_a_plain_warmup_file() -> None:
    specs = Signature(
        inputs=(TensorSpec(name="a/b", dtype="float16", shape=(2,)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(2,)),),
    )
    value = np.ones(2, np.float16)
    golden = Baseline(exchanges=(Exchange(inputs={"a/b": value}, outputs={}),), latencies=(), environment={})
    files = warmup_files(
        manifest(signature=specs, max_batch_size=0, input_names=("a/b",), output_names=("y",), version=1), golden
    )
    assert files == {"v1-a%2Fb": value.tobytes()}


def test_a_broken_text_is_named() -> None:
    with pytest.raises(RepositoryBroken, match=r"models/m/config\.pbtxt"):
        read_config("name: ", where="models/m/config.pbtxt")
