"""The residual sum of a linear and a norm moves into the linear, in a graph lowered for a GPU: the product adds what it
would else write for the norm to read, add and write again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import calls, insert, is_call, sweep, take, used_once

ops = torch.ops.kpdeploy


def _norms() -> dict[Any, Any]:
    """Norms that add, and what each is of a sum."""
    return {
        ops.add_layer_norm.default: ops.layer_norm.default,
        ops.add_rms_norm.default: ops.rms_norm.default,
        ops.fp8_add_layer_norm.default: ops.fp8_layer_norm.default,
        ops.fp8_add_rms_norm.default: ops.fp8_rms_norm.default,
    }


def fuse(module: GraphModule) -> None:
    """Rewrite a lowered module in place, where a norm adds the result of a linear that nothing else reads."""
    for norm in calls(module.graph, *_norms()):
        for linear, residual in summands(norm, ops.linear_activation.default, ops.fp8_linear_activation.default):
            if (found := added(linear, residual)) is not None:
                _replace(norm, *found)
                break
    sweep(module)


def summands(norm: Node, *targets: Any) -> Iterator[tuple[Node, Any]]:
    """The calls of an operator among the two that a norm adds, which nothing else reads, each with the other."""
    x, residual = norm.args[:2]
    for one, other in ((x, residual), (residual, x)):
        if is_call(one, *targets) and used_once(one):  # type: ignore[arg-type]
            yield one, other  # type: ignore[misc]


def added(linear: Node, residual: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator that adds and its arguments; None where the linear does more than a product."""
    *operands, activation = linear.args
    if activation != "none":
        return None
    if is_call(linear, ops.linear_activation.default):
        return ops.linear_add.default, (*operands, residual)
    *operands, out_scale = operands
    return (ops.fp8_linear_add.default, (*operands, residual)) if out_scale is None else None


def _replace(norm: Node, target: Any, args: tuple[Any, ...]) -> None:
    total = insert(norm, target, args, norm.args[0])  # type: ignore[arg-type]
    made = insert(norm, _norms()[norm.target], (total, *norm.args[2:]))
    alone = is_call(made, ops.layer_norm.default, ops.rms_norm.default)
    for user in list(norm.users):
        place: Any = user.args[1]  # normalized, sum, quantized
        found = total if place == 1 else made if alone else take(user, made, place // 2, user)
        found.meta["val"] = user.meta["val"]
        user.replace_all_uses_with(found)
