"""ONNX Runtime, on the CPU or an NVIDIA GPU. Settings: `threads`, `graph_level` (none, basic, extended, all),
`op_libraries` (paths); `device` "cuda" for a GPU, `device_index` which one (0), `graphs` for CUDA graphs there.

Graphs are described by `graphs.json` beside the model, and made by `onnx_graphs.py`, with `buckets.py`, beside this
file. On the CPU, for tests, the same buckets run without graphs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Since 1.29 it sends news of every model to its maker, and leaves a file in the temporary folder, unless told first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

Arrays = Sequence[np.ndarray[Any, Any]]

_LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

_CUDA = "CUDAExecutionProvider"

_PLACES = "session.record_ep_graph_assignment_info"
"""A session's option, since 1.24: it can tell which provider has which node."""


def load(
    path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]
) -> Callable[[Arrays], Arrays]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.get("threads", 0)
    options.graph_optimization_level = _LEVELS[settings.get("graph_level", "all")]
    options.log_severity_level = 3
    # Its threads wait for the next operator in a loop, but leave the cores to others between two calls.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for library in settings.get("op_libraries", ()):
        options.register_custom_ops_library(library)
    names, device = list(outputs), settings.get("device", "cpu")
    if device == "cuda":
        session = _on_gpu(path, options, settings)
    else:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if settings.get("graphs"):
        described = json.loads(Path(path).with_name("graphs.json").read_text())
        where = (device, settings.get("device_index", 0))
        captured: Callable[[Arrays], Arrays] = _beside("onnx_graphs").Graphs(
            session, inputs, names, described, where, _beside("buckets")
        )
        return captured

    def run(arrays: Arrays) -> Arrays:
        result: Arrays = session.run(names, dict(zip(inputs, arrays, strict=True)))
        return result

    return run


def memory() -> list[dict[str, Any]]:
    """What is taken on the GPU of this process's sessions, which ONNX Runtime does not tell apart; by whomever."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    free, total, gpu, name = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_int(), ctypes.create_string_buffer(99)
    # It fails where no session has begun to use a GPU.
    if driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)):
        return []
    driver.cuCtxGetDevice(ctypes.byref(gpu))
    driver.cuDeviceGetName(name, len(name), gpu)
    taken = total.value - free.value
    return [{"what": "weights, activations and CUDA graphs", "bytes": taken, "device": name.value.decode()}]


def _on_gpu(path: str, options: Any, settings: Mapping[str, Any]) -> Any:
    """A session of the CUDA provider.

    Raises:
        RuntimeError: this ONNX Runtime has none, or cannot load it, or it cannot capture graphs of this model.
    """
    _load_provider()
    # Memory on a GPU is looked for among plug-ins first, with a warning that there is none.
    ort.set_default_logger_severity(3)
    wanted = {
        "device_id": str(settings.get("device_index", 0)),
        "use_tf32": "0",  # float32 is what level 1 promises
        "enable_cuda_graph": "1" if settings.get("graphs") else "0",
    }
    try:
        session = ort.InferenceSession(path, options, providers=[(_CUDA, wanted), "CPUExecutionProvider"])
    except Exception as error:
        if "graph capture" not in str(error):
            raise
        on_cpu = _on_cpu(path, options, wanted)
        why = f"these nodes are not on the GPU: {on_cpu}" if on_cpu else str(error)
        raise RuntimeError(f"ONNX Runtime {ort.__version__} captures no CUDA graph of this model: {why}") from None
    # It falls back to the CPU where CUDA fails, and says so on stderr alone.
    if session.get_providers()[0] != _CUDA:
        raise RuntimeError(f"ONNX Runtime {ort.__version__} cannot use a GPU here: its {_CUDA} did not start")
    return session


def _load_provider() -> None:
    """Load ONNX Runtime's CUDA provider and what it needs.

    Raises:
        RuntimeError: it is not there, or one of its libraries is not.
    """
    here = f"ONNX Runtime {ort.__version__}"
    if _CUDA not in ort.get_available_providers():
        why = "onnxruntime-gpu has it, and must be installed in the place of onnxruntime"
        raise RuntimeError(f"the artifact runs on an NVIDIA GPU, and {here} has no {_CUDA} here: {why}")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's and cuDNN's Python packages, which torch brings too
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        needs = f"it needs CUDA {getattr(ort, 'cuda_version', '')}".strip()
        how = 'pip install "onnxruntime-gpu[cuda,cudnn]" nvidia-cublas'
        raise RuntimeError(f"{here} cannot load its {_CUDA}: {error}; {needs} and cuDNN 9: {how}") from None


def _on_cpu(path: str, options: Any, wanted: Mapping[str, str]) -> str:
    """The operators that a session without graphs runs on the CPU or copies for; empty where it cannot tell."""
    options.add_session_config_entry(_PLACES, "1")
    without = {**wanted, "enable_cuda_graph": "0"}
    session = ort.InferenceSession(path, options, providers=[(_CUDA, without), "CPUExecutionProvider"])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return ""
    parts = [p for p in session.get_provider_graph_assignment_info() if p.ep_name != _CUDA]
    return ", ".join(sorted({node.op_type for part in parts for node in part.get_nodes()}))


def _beside(name: str) -> Any:
    """A module of this file's own folder, whatever else goes by that name."""
    spec = importlib.util.spec_from_file_location(f"kpdeploy_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
