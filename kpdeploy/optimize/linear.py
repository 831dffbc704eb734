"""x Wᵀ + b without an activation becomes linear_activation too: one provider for all products of a model.

A format leaves out what its own runtime multiplies no slower. Which that is was measured (benchmarks/README.md,
"Products on a CPU"): our kernel lays x out at each call, and ONNX Runtime reads it as it lies, which is as fast unless
sums are long and results wide; torch's plain linear is slower than the oneDNN that the op asks on every shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.fx import GraphModule

from kpdeploy.ops.providers import LEAST_PLAIN
from kpdeploy.optimize.graph import Finding, Match, parameter, shape
from kpdeploy.optimize.linear_activation import linear_of, replace_by_op

OP, SMALL = "linear", "small_linear"
"""Names for a format's `leaves`: linears of LEAST_PLAIN inputs and outputs or more, and the others."""


def find(module: GraphModule, *, small: bool) -> Iterator[Finding]:
    for node in list(module.graph.nodes):
        found = linear_of(node)
        weight = parameter(module, found[1]) if found is not None else None
        if found is None or weight is None or weight.dtype not in (torch.float32, torch.bfloat16):
            continue  # a weight that is computed at each call, or a dtype that the op has not
        if (min(shape(found[0])[-1], shape(node)[-1]) < LEAST_PLAIN) is small:
            yield Match(node=node, apply=partial(replace_by_op, node, node, found, "none"))
