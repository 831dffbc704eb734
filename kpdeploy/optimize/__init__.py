"""Rewrites of the exported graph: subgraphs become fused ops, one fusion a file, in the order of FUSIONS.

Each fusion walks the graph and says of every place that looks like its pattern whether it applies, or why not. The
fused module is then captured again, so that what is exported is a valid program with the same dynamic axes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.model import Model
from kpdeploy.ops import register
from kpdeploy.optimize import (
    add_layer_norm,
    attention,
    gated_linear,
    linear,
    linear_activation,
    parallel_linears,
    rms_norm,
    rotary_embedding,
)
from kpdeploy.optimize.graph import Finding, Match, drop_identities, sweep
from kpdeploy.signature import Signature

Find = Callable[[GraphModule, Signature], Iterator[Finding]]

FUSIONS: tuple[tuple[str, Find], ...] = (
    # A gated linear holds a linear with an activation: it goes first.
    (gated_linear.OP, lambda module, signature: gated_linear.find(module)),
    (linear_activation.OP, lambda module, signature: linear_activation.find(module)),
    # Gives packed heads, from which attention takes them.
    (rotary_embedding.OP, lambda module, signature: rotary_embedding.find(module)),
    (attention.OP, attention.find),
    (add_layer_norm.OP, lambda module, signature: add_layer_norm.find(module)),
    (rms_norm.OP, lambda module, signature: rms_norm.find(module)),
    # Of the linears that are left.
    (parallel_linears.OP, lambda module, signature: parallel_linears.find(module)),
    (rotary_embedding.OP, lambda module, signature: rotary_embedding.find_adjacent(module)),
    (linear.OP, lambda module, signature: linear.find(module, small=False)),
    (linear.SMALL, lambda module, signature: linear.find(module, small=True)),
)


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A module with fused ops, to be captured again, how many of each it holds, and what was done or refused, why.

    `counts` are of the ops in the graph, linear_activation with no activation as "linear"."""

    module: GraphModule
    counts: dict[str, int]
    decisions: tuple[Decision, ...]


def fuse(model: Model, *, left: Collection[str] = ()) -> Fused:
    """Fuse what can be fused in the model's exported program. The model itself is not changed.

    `model.program` must be there (kpdeploy.export.capture.settle_axes). `left` are ops that are not looked for.
    """
    assert model.program is not None
    register()
    module: GraphModule = model.program.module()
    drop_identities(module)
    refused: Counter[tuple[str, str]] = Counter()
    applied: Counter[str] = Counter()
    for op, find in (row for row in FUSIONS if row[0] not in left):
        for finding in list(find(module, model.signature)):
            if isinstance(finding, Match):
                finding.apply()
                applied[op] += 1
            else:
                refused[op, finding.reason] += 1
        sweep(module)
    counts = _count(module)
    joined = {op: applied[op] for op in (parallel_linears.OP,) if applied[op]}  # no op of its own is left in the graph
    decisions: list[Decision] = [Applied(what=f"fused {n} {op}") for op, n in (counts | joined).items()]
    decisions += [Skipped(what=f"{n} {op}", reason=reason) for (op, reason), n in refused.items()]
    return Fused(module=module, counts=counts, decisions=tuple(decisions))


def _count(module: GraphModule) -> dict[str, int]:
    """How many calls of each fused op the graph holds, by the op's name; a linear without an activation is `linear`."""
    plain = torch.ops.kpdeploy.linear_activation.default
    names = [
        linear.OP
        if node.target is plain and node.args[3] == "none"
        else node.target._schema.name.removeprefix("kpdeploy::")
        for node in module.graph.nodes
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "kpdeploy"
    ]
    return dict(Counter(names))
