"""The unmodified model as a function from arrays to arrays: what every artifact is compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from kpdeploy.errors import ModelRejectsInputs
from kpdeploy.inputs import Array, Tensors
from kpdeploy.load.describe import to_tensors
from kpdeploy.model import Model


def reference(model: Model) -> Callable[[Tensors], dict[str, Array]]:
    """Eager PyTorch without gradients; for an ONNX file, ONNX Runtime without graph optimizations.

    Raises (when called):
        ModelRejectsInputs: the model raised.
    """
    outputs = [spec.name for spec in model.signature.outputs]
    run = _onnx(model) if model.module is None else _eager(model)

    def answer(inputs: Tensors) -> dict[str, Array]:
        try:
            return dict(zip(outputs, run(inputs), strict=True))
        except Exception as error:
            shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in inputs.items())
            raise ModelRejectsInputs(
                f"the unmodified model raised when called with {shapes}",
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                next_step="narrow the range of its axes or values with --input",
            ) from None

    return answer


def _eager(model: Model) -> Callable[[Tensors], list[Array]]:
    module = model.module
    assert module is not None

    def run(inputs: Tensors) -> list[Array]:
        with torch.inference_mode():
            return [t.contiguous().numpy() for t in module(*to_tensors(inputs))]

    return run


def import_onnxruntime() -> Any:
    """onnxruntime, without the news of every model that it sends to its maker since 1.29, unless told before."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _onnx(model: Model) -> Callable[[Tensors], list[Array]]:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Tensors) -> list[Array]:
        found: list[Array] = session.run(None, dict(inputs))
        return found

    return run
