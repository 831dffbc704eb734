"""Norms that are read in 8 bits alone give nothing else, in a graph lowered for a GPU.

Where a model normalizes ahead of its products (ViT, Llama), these are all that reads a norm: its result in 16 bits is 2
of the 5 bytes an element that it moves, 2 of 9 where it adds a residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from kpdeploy.optimize.graph import calls, insert, name_of, sweep, take

ops = torch.ops.kpdeploy


def drop(module: GraphModule) -> None:
    """Rewrite a lowered module in place, where nothing reads the 16-bit result of a norm that quantizes."""
    names = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
    forms = {getattr(ops, f"fp8_{name}").default: getattr(ops, f"{name}_fp8").default for name in names}
    for norm in calls(module.graph, *forms):
        results = list(norm.users)
        places: list[Any] = [result.args[1] for result in results]
        if 0 in places:  # the norm in 16 bits
            continue
        made = insert(norm, forms[norm.target], norm.args)
        for result, place in zip(results, places, strict=True):
            left = take(norm, made, place - 1, result) if "add" in name_of(norm) else made
            result.replace_all_uses_with(left)
    sweep(module)
