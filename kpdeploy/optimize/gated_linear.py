"""SiLU(x Wgᵀ) · (x Wuᵀ), the MLP of Llama and its kin, becomes one op."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import (
    Finding,
    Match,
    Refusal,
    argument,
    aten,
    calls,
    insert,
    is_call,
    same_shape,
    used_once,
)

OP = "gated_linear"


def find(module: GraphModule) -> Iterator[Finding]:
    for node in calls(module.graph, aten.mul.Tensor):
        a, b = node.args
        silu, up = (a, b) if is_call(a, aten.silu.default) else (b, a)
        if not is_call(silu, aten.silu.default) or not is_call(up, aten.linear.default):
            continue
        assert isinstance(silu, Node)
        assert isinstance(up, Node)
        gate = silu.args[0]
        if not is_call(gate, aten.linear.default):
            continue
        assert isinstance(gate, Node)
        if reason := _refusal(silu, gate, up):
            yield Refusal(node=node, reason=reason)
        else:
            yield Match(node=node, apply=partial(_rewrite, node, gate, up))


def _refusal(silu: Node, gate: Node, up: Node) -> str:
    if gate.args[0] is not up.args[0]:
        return "gate and up take different inputs"
    if argument(gate, "bias") is not None or argument(up, "bias") is not None:
        return "gate or up has a bias"
    if not (used_once(silu) and used_once(gate) and used_once(up)):
        return "gate or up is used elsewhere too"
    return "" if same_shape(gate, up) else "gate and up differ in shape"


def _rewrite(node: Node, gate: Node, up: Node) -> None:
    fused = insert(node, torch.ops.kpdeploy.gated_linear.default, (gate.args[0], gate.args[1], up.args[1]), node)
    node.replace_all_uses_with(fused)
