"""A package of AOTInductor (.pt2) on the CPU. Settings: `threads`, `op_libraries` (paths)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Arrays = Sequence[np.ndarray[Any, Any]]


def load(
    path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]
) -> Callable[[Arrays], Arrays]:
    if threads := settings.get("threads", 0):
        torch.set_num_threads(threads)
    for library in settings.get("op_libraries", ()):
        torch.ops.load_library(library)
    from torch._inductor import aoti_load_package  # slow to import, only needed here

    try:
        module = aoti_load_package(path)
    except RuntimeError as error:
        if "kpdeploy::" not in str(error):
            raise
        why = "the model calls fused ops, whose kernels are in libkpdeploy_torch.so"
        raise RuntimeError(f"{why}: load that first (op_libraries, torch.ops.load_library or LD_PRELOAD)") from None

    def run(arrays: Arrays) -> Arrays:
        # AOTInductor reads strides of the capture: other strides give wrong answers, silently.
        with torch.inference_mode():
            result = module(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        return [t.contiguous().numpy() for t in tensors]

    return run
