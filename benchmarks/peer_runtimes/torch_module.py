"""PyTorch on the CPU, from the MODEL argument in the place of a path. Settings: `threads`; `backend` (none: eager;
inductor, zentorch: through torch.compile for fixed shapes); `freezing`; `dtype` (bfloat16: the module in it, inputs and
outputs as they are); `quantize` (torchao: int8 weights, activations scaled row by row at run time)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kpdeploy.load import load_model

Arrays = Sequence[np.ndarray[Any, Any]]


def load(
    path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]
) -> Callable[[Arrays], Arrays]:
    if threads := settings.get("threads", 0):
        torch.set_num_threads(threads)
    module = load_model(path).module
    assert module is not None
    dtype = getattr(torch, settings.get("dtype", "float32"))
    module = module.to(dtype)
    if settings.get("quantize") == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(module, Int8DynamicActivationInt8WeightConfig())
    backend = settings.get("backend")
    if backend is not None:
        module = compiled(module, backend, settings)
    # Freezing looks at whether gradients are on; inference_mode is for eager, where it saves bookkeeping.
    mode = torch.inference_mode if backend is None else torch.no_grad

    def run(arrays: Arrays) -> Arrays:
        with mode():
            given = [torch.from_numpy(a) for a in arrays]
            found = module(*(t.to(dtype) if t.is_floating_point() else t for t in given))
            return [(t.float() if t.dtype is torch.bfloat16 else t).contiguous().numpy() for t in found]

    return run


def compiled(module: torch.nn.Module, backend: str, settings: dict[str, Any]) -> Any:
    import torch._inductor.config as inductor

    if backend == "zentorch":
        import zentorch  # noqa: F401  # registers the backend
    inductor.freezing = settings.get("freezing", False)
    return torch.compile(module, backend=backend, dynamic=False)
