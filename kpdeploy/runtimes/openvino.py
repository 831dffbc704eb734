"""OpenVINO on the CPU. Settings: `threads`, `precision` (f32 or bf16; the plugin's own default is bf16 where the CPU
has it, which is not what an f32 model was proven with), `activation_group` (of products with int8 weights: so many
numbers of a row share a scale that is found at run time; 0: none is)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov

Arrays = Sequence[np.ndarray[Any, Any]]


def load(
    path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]
) -> Callable[[Arrays], Arrays]:
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": settings.get("precision", "f32"),
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(settings.get("activation_group", 0)),
    }
    if threads := settings.get("threads", 0):
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = ov.Core().compile_model(path, "CPU", config)
    request = compiled.create_infer_request()
    ports = [compiled.output(name) for name in outputs]

    def run(arrays: Arrays) -> Arrays:
        results = request.infer(dict(zip(inputs, arrays, strict=True)), share_inputs=True)
        return [results[port] for port in ports]

    return run
