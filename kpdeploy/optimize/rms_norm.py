"""x · rsqrt(mean(x²) + eps) · weight becomes rms_norm, and add_rms_norm where x is a sum with a residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.add_layer_norm import replace_both, sum_refusal
from kpdeploy.optimize.graph import Finding, Match, Refusal, aten, calls, insert, is_call, shape

OP = "rms_norm"


@dataclass(frozen=True)
class Norm:
    """A whole RMSNorm: its input, the factor per column ([N], any expression of parameters), and its last node."""

    x: Node
    weight: Node
    eps: float
    last: Node


def find(module: GraphModule) -> Iterator[Finding]:
    for rsqrt in calls(module.graph, aten.rsqrt.default):
        norm = _norm(rsqrt)
        if isinstance(norm, str):
            yield Refusal(node=rsqrt, reason=norm)
        elif norm is not None:
            yield Match(node=norm.last, apply=partial(_rewrite, norm))


def _norm(rsqrt: Node) -> Norm | str | None:
    """The norm around an rsqrt, why it is none that is known, or None where nothing looks like one."""
    plus: Any = rsqrt.args[0]
    if not is_call(plus, aten.add.Tensor) or not isinstance(plus.args[1], float):
        return None
    mean: Any = plus.args[0]
    if not is_call(mean, aten.mean.dim) or not is_call(mean.args[0], aten.pow.Tensor_Scalar):
        return None
    power = mean.args[0]
    source = power.args[0]
    if power.args[1] != 2 or list(mean.args[1]) != [-1]:
        return "it is no mean of squares over the last axis"
    scaled = next((u for u in rsqrt.users if is_call(u, aten.mul.Tensor) and source in u.args), None)
    if scaled is None or len(rsqrt.users) != 1:
        return "the reciprocal root is used in another way"
    widened = is_call(source, aten.to.dtype)
    x = source.args[0] if widened else source
    return _weighted(x, scaled, float(plus.args[1]))


def _weighted(x: Node, scaled: Node, eps: float) -> Norm | str:
    """Follow the normalized value to the product with the weight, through a cast back before or after it."""
    node = scaled
    if len(node.users) == 1 and is_call(next(iter(node.users)), aten.to.dtype):
        node = next(iter(node.users))
    product = next(iter(node.users)) if len(node.users) == 1 else None
    if not is_call(product, aten.mul.Tensor):
        return "nothing multiplies it by a weight"
    assert product is not None
    weight = next((a for a in product.args if isinstance(a, Node) and a is not node), None)
    if weight is None or shape(weight) != (shape(x)[-1],):
        return "its weight is not one number a column"
    after = next(iter(product.users)) if len(product.users) == 1 else None
    last = after if after is not None and is_call(after, aten.to.dtype) else product
    return Norm(x, weight, eps, last)


def _rewrite(norm: Norm) -> None:
    if is_call(norm.x, aten.add.Tensor) and not sum_refusal(norm.x):
        args = (*norm.x.args[:2], norm.weight, norm.eps)
        replace_both(norm.last, norm.x, insert(norm.last, torch.ops.kpdeploy.add_rms_norm.default, args))
        return
    args = (norm.x, norm.weight, norm.eps)
    norm.last.replace_all_uses_with(insert(norm.last, torch.ops.kpdeploy.rms_norm.default, args, norm.last))
