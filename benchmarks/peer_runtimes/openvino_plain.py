"""OpenVINO as its documentation shows it, with the latency hint. Settings: `threads`; `precision` (f32; "": its own
default, bf16 where the processor has it); `shapes` (one list an input: the graph is reshaped to them, instead of
keeping its dynamic axes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov

Arrays = Sequence[np.ndarray[Any, Any]]


def load(
    path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]
) -> Callable[[Arrays], Arrays]:
    core = ov.Core()
    model = core.read_model(path)
    if shapes := settings.get("shapes"):
        model.reshape(dict(zip(inputs, shapes, strict=True)))
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision := settings.get("precision", "f32"):
        config["INFERENCE_PRECISION_HINT"] = precision
    if threads := settings.get("threads", 0):
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", config)

    def run(arrays: Arrays) -> Arrays:
        results = compiled(dict(zip(inputs, arrays, strict=True)))
        return [results[name] for name in outputs]

    return run
