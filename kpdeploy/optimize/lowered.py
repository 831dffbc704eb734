"""A captured model in another form: on another device, in fewer bits, without padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from kpdeploy.decision import Decision, Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import Tensors
from kpdeploy.optimize import fp8, pack, precision


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The module, what was decided, and what each product costs in 8 bits (none in more)."""

    module: GraphModule
    decisions: tuple[Decision, ...] = ()
    layers: tuple[fp8.Layer, ...] = ()


def lowered(
    program: Any, *, bits: str, dropped: bool, device: str, samples: Sequence[Tensors] = (), budget: float = 0
) -> Lowered:
    """A copy of an exported program's module in `bits`: float32, float16, bfloat16 or fp8; its inputs and outputs stay.

    `dropped`: without padding, of which the module is told by three inputs more (kpdeploy.optimize.pack). `samples` are
    inputs that fp8 takes its scales from, `budget` the error that it may have on them.

    Raises:
        ExportFailed: no product fits in 8 bits, or padding cannot be dropped.
    """
    # A copy: it shares its weights with the model that the proof asks.
    module: GraphModule = copy.deepcopy(program.module(check_guards=False))
    found = Lowered(module=module)
    with torch.no_grad():
        # With its index: torch.export tells "cuda" from "cuda:0".
        precision.place(module, torch.empty(0, device=device).device)
        if bits != "float32":
            precision.lower(module, torch.bfloat16 if bits == "fp8" else getattr(torch, bits))
        if bits == "fp8":
            decisions, layers = fp8.lower(module, samples, budget)
            found = Lowered(module=module, decisions=tuple(decisions), layers=tuple(layers))
        if dropped and isinstance(told := pack.pack(module, given=True), Skipped):
            raise ExportFailed("padding cannot be dropped", why=told.reason)
    return found
