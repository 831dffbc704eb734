"""ONNX Runtime's OpenVINO provider on the CPU, float32 and the latency hint. Settings: `threads`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

Arrays = Sequence[np.ndarray[Any, Any]]
PROVIDER = "OpenVINOExecutionProvider"


def load(
    path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]
) -> Callable[[Arrays], Arrays]:
    plugin: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads := settings.get("threads", 0):
        plugin["INFERENCE_NUM_THREADS"] = str(threads)
    session = ort.InferenceSession(
        path, providers=[(PROVIDER, {"device_type": "CPU", "load_config": json.dumps({"CPU": plugin})})]
    )
    if PROVIDER not in session.get_providers():  # ONNX Runtime falls back in silence
        raise RuntimeError(f"{PROVIDER} was not taken: {', '.join(session.get_providers())}")
    names = list(outputs)

    def run(arrays: Arrays) -> Arrays:
        result: Arrays = session.run(names, dict(zip(inputs, arrays, strict=True)))
        return result

    return run
