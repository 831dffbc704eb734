"""ONNX Runtime on the CPU. Settings: `threads`, `graph_level` (none, basic, extended, all), `op_libraries` (paths)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = list(outputs)

    def run(arrays: Arrays) -> Arrays:
        result: Arrays = session.run(names, dict(zip(inputs, arrays, strict=True)))
        return result

    return run
