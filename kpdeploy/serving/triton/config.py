"""config.pbtxt: how Triton loads and runs one version, written through Triton's own protobuf."""

from __future__ import annotations

import keyword
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType as TritonType
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelOptimizationPolicy, ModelWarmup
from tritonclient.utils import np_to_triton_dtype

from kpdeploy.artifact import DIGEST, Manifest
from kpdeploy.baseline import Baseline
from kpdeploy.errors import FormatUnavailable, RepositoryBroken
from kpdeploy.inputs import Array
from kpdeploy.signature import BYTES, Signature, TensorSpec

CONFIG = "config.pbtxt"
WARMUP = "warmup"
LABELS = "labels.txt"
"""A label a line, by the index in the first output: what a client that asks for classes is told."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """What loads a format in NVIDIA's container: a backend or a platform, and the parameters it is given."""

    backend: str = ""
    platform: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    threads_parameter: str = ""
    kind: int = ModelInstanceGroup.KIND_CPU


HANDLER_FORMAT = "handler"
"""The format of a handler (see kpdeploy.serving.triton.handler); every other one is a model's."""

LOADERS = {
    "onnx": Loader(backend="onnxruntime", threads_parameter="intra_op_thread_count"),
    "torchscript": Loader(
        platform="pytorch_libtorch",
        parameters=(("INFERENCE_MODE", "true"),),
        threads_parameter="INTRA_OP_THREAD_COUNT",
    ),
    "pt2": Loader(platform="torch_aoti"),
    # No backend of NVIDIA's runs an exported program: the version holds a model.py, and Python must have torch.
    "cuda": Loader(
        backend="python",
        # Tensors that are on the GPU stay there.
        parameters=(("FORCE_CPU_ONLY_INPUT_TENSORS", "no"),),
        kind=ModelInstanceGroup.KIND_GPU,
    ),
    # The backend has no parameter for the precision of inference: OpenVINO's own default holds in the container,
    # bf16 where the CPU has it.
    "openvino": Loader(
        backend="openvino",
        parameters=(("PERFORMANCE_HINT", "LATENCY"), ("NUM_STREAMS", "1")),
        threads_parameter="INFERENCE_NUM_THREADS",
    ),
    HANDLER_FORMAT: Loader(backend="python"),
}

_ONNX_ON_GPU = Loader(backend="onnxruntime", kind=ModelInstanceGroup.KIND_GPU)

_CUDA_OPTIONS = {"use_tf32": "0"}
"""Of ONNX Runtime's CUDA provider, as the artifact was proven. No `enable_cuda_graph`: the backend hands each request's
own memory over, and a graph keeps the addresses that it was captured with."""


def holds_model_py(manifest: Manifest) -> bool:
    """Does a version bring the model.py that runs it? No backend of NVIDIA's captures graphs of these."""
    return manifest.format == "cuda" or bool(manifest.settings.get("graphs"))


def loader_of(manifest: Manifest) -> Loader:
    if manifest.format == "onnx" and manifest.settings.get("device") == "cuda":
        # Its graphs take tensors of the host.
        return replace(LOADERS["cuda"], parameters=()) if holds_model_py(manifest) else _ONNX_ON_GPU
    return LOADERS[manifest.format]


_GRAPH_LEVELS = {"none": 2, "basic": -1, "extended": 1}
"""ONNX Runtime's optimization levels in Triton's numbers; `all` is what it does when nothing is said."""

_LEAST_DELAY_US, _LONGEST_DELAY_US = 100, 1000


def served_names(format: str, signature: Signature) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names by which Triton knows the inputs and outputs of an artifact, in the order of the signature.

    ONNX and OpenVINO files hold names. libtorch finds inputs by the names of forward's arguments and outputs by
    the index in `<name>__<index>`; an AOTInductor package knows both by index only.
    """
    inputs = tuple(spec.name for spec in signature.inputs)
    outputs = tuple(spec.name for spec in signature.outputs)
    if format == "pt2":
        return _indexed("INPUT", inputs), _indexed("OUTPUT", outputs)
    if format == "torchscript":
        usable = all(name.isidentifier() and not keyword.iskeyword(name) for name in inputs)
        named = tuple(f"{name}__{index}" for index, name in enumerate(outputs))
        return inputs if usable else _indexed("INPUT", inputs), named
    return inputs, outputs


def _indexed(word: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{word}__{index}" for index in range(len(names)))


def model_config(manifest: Manifest, baseline: Baseline) -> Any:
    """The ModelConfig of a version.

    With a max_batch_size above 0 Triton's dims leave the batch axis out. Warm-up names files that
    `warmup_files` gives; they belong into the model's `warmup` folder.

    Raises:
        FormatUnavailable: a tensor that Triton cannot carry.
    """
    loader = loader_of(manifest)
    config = ModelConfig(
        name=manifest.model,
        backend=loader.backend,
        platform=loader.platform,
        default_model_filename=manifest.filename,
        max_batch_size=manifest.max_batch_size,
        instance_group=[ModelInstanceGroup(kind=loader.kind, count=manifest.serving.get("instances", 1))],
    )
    # Only the version named here is visible: replacing config.pbtxt is what publishes.
    config.version_policy.specific.versions.append(manifest.version)
    for specs, names, entries in (
        (manifest.signature.inputs, manifest.input_names, config.input),
        (manifest.signature.outputs, manifest.output_names, config.output),
    ):
        for spec, name in zip(specs, names, strict=True):
            entry = entries.add(name=name, data_type=_data_type(spec.dtype))
            _set_dims(entry, spec, manifest)
    if holds_model_py(manifest):
        allow_ragged(config, manifest)
    if manifest.max_batch_size > 1:
        delay_us = manifest.serving.get("queue_delay_us", _queue_delay_us(baseline))
        config.dynamic_batching.max_queue_delay_microseconds = delay_us
    if LABELS in manifest.files:
        config.output[0].label_filename = f"{manifest.version}/{LABELS}"
    for key, value in loader.parameters:
        config.parameters[key].string_value = value
    # No backend knows it; whoever asks the server for its configuration learns which artifact it serves.
    config.parameters[DIGEST].string_value = manifest.digest
    _set_settings(config, manifest, loader)
    config.model_warmup.extend(_warmups(manifest, baseline))
    return config


def _set_settings(config: Any, manifest: Manifest, loader: Loader) -> None:
    """What the artifact was proven with, in the backend's words."""
    settings = manifest.settings
    if settings.get("threads") and loader.threads_parameter:
        config.parameters[loader.threads_parameter].string_value = str(settings["threads"])
    if loader.backend != "onnxruntime":
        return
    if loader.kind == ModelInstanceGroup.KIND_GPU:
        provider = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        provider.parameters.update(_CUDA_OPTIONS)
    if (level := settings.get("graph_level", "all")) in _GRAPH_LEVELS:
        config.optimization.graph.CopyFrom(ModelOptimizationPolicy.Graph(level=_GRAPH_LEVELS[level]))
    # It goes to dlopen as it is: absolute, for where the repository will be mounted.
    libraries = (str(manifest.mounted / name) for name in settings.get("op_libraries", ()))
    config.model_operations.op_library_filename.extend(libraries)


def _data_type(dtype: str) -> Any:
    if dtype == BYTES:
        return TritonType.Value("TYPE_STRING")
    return TritonType.Value(f"TYPE_{np_to_triton_dtype(np.dtype(dtype))}")


def _set_dims(entry: Any, spec: TensorSpec, manifest: Manifest) -> None:
    batched = manifest.max_batch_size > 0
    dims = [-1 if isinstance(d, str) else d for d in spec.shape[1 if batched else 0 :]]
    if not dims and not batched:
        raise FormatUnavailable(
            f"Triton cannot serve {spec.name} of {manifest.model}: it is a scalar",
            why="Triton refuses tensors without dims in a model that does not batch",
            next_step=f"give {spec.name} the shape [1], or a batch axis",
        )
    # Triton wants at least one dim: one number a row travels as [batch, 1].
    if not dims:
        entry.reshape.SetInParent()
    entry.dims.extend(dims or [1])


def allow_ragged(config: Any, manifest: Manifest) -> None:
    """Let the dynamic batcher give model.py requests of different sizes where padding was proven neutral."""
    for entry, spec in zip(config.input, manifest.signature.inputs, strict=True):
        if set(spec.shape) & set(manifest.padded_axes):
            entry.allow_ragged_batch = True


def _queue_delay_us(baseline: Baseline) -> int:
    """How long a request may wait for company: a twentieth of what a small request costs the packaged artifact anyway,
    at most 1 ms. Not at all where that is less than going to sleep and waking up costs."""
    packaged = [statistics.median(windows.p50_ms) for windows in baseline.windows]
    fastest_ms = min(packaged or [latency.p50_ms for latency in baseline.latencies], default=0.0)
    delay_us = min(_LONGEST_DELAY_US, round(fastest_ms * 1000 / 20))
    return delay_us if delay_us >= _LEAST_DELAY_US else 0


def _warmup_inputs(manifest: Manifest, baseline: Baseline) -> Iterator[tuple[str, str, Array]]:
    """The largest golden request, as (served name, file, array). Of a batch the first row: Triton repeats it."""
    golden = max(baseline.exchanges, key=lambda exchange: sum(array.nbytes for array in exchange.inputs.values()))
    for spec, name in zip(manifest.signature.inputs, manifest.input_names, strict=True):
        array = golden.inputs[spec.name]
        yield name, warmup_file(manifest.version, name), array[0] if manifest.max_batch_size else array


def _warmed_up(manifest: Manifest, baseline: Baseline) -> bool:
    # A handler asks its model, which may not be loaded yet.
    return bool(baseline.exchanges) and manifest.format != HANDLER_FORMAT


def warmup_file(version: int, name: str) -> str:
    """A file of the warm-up folder, which all versions share. Names may hold slashes; files may not."""
    return f"v{version}-{quote(name, safe='')}"


def warmup_files(manifest: Manifest, baseline: Baseline) -> dict[str, bytes]:
    """The contents of the files that the configuration's warm-up names, by file name. Raw bytes, C order."""
    if not _warmed_up(manifest, baseline):
        return {}
    return {file: np.asarray(array).tobytes() for _, file, array in _warmup_inputs(manifest, baseline)}


def _warmups(manifest: Manifest, baseline: Baseline) -> list[Any]:
    """One request alone, and as many at once as fill a batch (Triton sends the row `batch_size` times). `dims` leave
    the batch axis out, as everywhere; a model that does not batch takes the whole request at a batch size of 1."""
    if not _warmed_up(manifest, baseline):
        return []
    batch_sizes = sorted({1, max(1, manifest.max_batch_size)})
    return [_warmup(manifest, baseline, batch_size=size) for size in batch_sizes]


def _warmup(manifest: Manifest, baseline: Baseline, *, batch_size: int) -> Any:
    warmup = ModelWarmup(name=f"golden-{batch_size}", batch_size=batch_size, count=1)
    for name, file, array in _warmup_inputs(manifest, baseline):
        entry = warmup.inputs[name]
        entry.data_type = TritonType.Value(f"TYPE_{np_to_triton_dtype(array.dtype)}")
        entry.dims.extend(array.shape or (1,))
        entry.input_data_file = file
    return warmup


def write_config(config: Any) -> str:
    return text_format.MessageToString(config)


def read_config(text: str, *, where: str) -> Any:
    """The ModelConfig in a config.pbtxt.

    Raises:
        RepositoryBroken: it cannot be parsed.
    """
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryBroken(
            f"{where} cannot be read as a Triton model configuration",
            why=str(error),
            next_step="export the model into this repository again",
        ) from None
