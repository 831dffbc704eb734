"""LayerNorm(x + residual) becomes one op that gives both the normalized sum and the sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import Finding, Match, Refusal, argument, aten, calls, insert, is_call, same_shape, take

OP = "add_layer_norm"


def find(module: GraphModule) -> Iterator[Finding]:
    for node in calls(module.graph, aten.layer_norm.default):
        add = node.args[0]
        if not is_call(add, aten.add.Tensor):
            continue
        assert isinstance(add, Node)
        if reason := sum_refusal(add) or _norm_refusal(node):
            yield Refusal(node=node, reason=reason)
        else:
            yield Match(node=node, apply=partial(_rewrite, node, add))


def sum_refusal(add: Node) -> str:
    """Why a sum is not x + residual of one shape; empty if it is."""
    a, b = add.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node):
        return "a number is added, not a residual"
    if argument(add, "alpha", 1) != 1:
        return "the residual is scaled"
    if not same_shape(a, b):
        return "the residual is broadcast"
    return ""


def _norm_refusal(node: Any) -> str:
    if len(node.args[1]) != 1:
        return "it normalizes over more than the last axis"
    return "" if argument(node, "weight") is not None else "it has no weight"


def _rewrite(node: Node, add: Node) -> None:
    weight, bias, eps = (argument(node, name) for name in ("weight", "bias", "eps"))
    args = (*add.args[:2], weight, bias, eps)
    replace_both(node, add, insert(node, torch.ops.kpdeploy.add_layer_norm.default, args))


def replace_both(node: Node, add: Node, pair: Node) -> None:
    """Let an op's two results take the place of the normalized sum and of the sum."""
    node.replace_all_uses_with(take(node, pair, 0, node))
    if any(user is not node for user in add.users):
        total = take(node, pair, 1, add)
        # Users before the norm keep the plain sum: the op comes after them.
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        add.replace_all_uses_with(total, delete_user_cb=lambda user: order[user] > order[total])
