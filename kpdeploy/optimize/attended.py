"""Attention, the linear of its result, the residual sum and its norm become one op, in a graph lowered for a GPU.

Each is a kernel of some microseconds that waits for the one ahead; for few rows their waits are most of a layer's time.
Where rows are many the op runs the kernels of its parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import calls, insert, is_call, same_size, shape, sweep, used_once
from kpdeploy.optimize.linear_add import added, summands

ops = torch.ops.kpdeploy


def fuse(module: GraphModule) -> None:
    """Rewrite a lowered module in place, where attention's result goes to one linear and that to one norm alone."""
    for norm in calls(module.graph, ops.add_layer_norm.default):
        attentions = (ops.attention.default, ops.packed_attention.default)
        _fuse_one(norm, ops.linear_activation.default, attentions, ops.attention_add_layer_norm.default)
    for norm in calls(module.graph, ops.fp8_add_layer_norm.default):
        # What is quantized for one product alone is so by the scale of that product's input.
        attentions = (ops.attention_fp8.default, ops.packed_attention_fp8.default)
        _fuse_one(norm, ops.fp8_linear_activation.default, attentions, ops.fp8_attention_add_layer_norm.default)
    sweep(module)


def _fuse_one(norm: Node, product: Any, attentions: tuple[Any, ...], target: Any) -> None:
    for linear, residual in summands(norm, product):
        if (found := added(linear, residual)) is None:
            continue
        _, (made, *rest) = found
        if is_call(made, *attentions) and used_once(made) and (attention := _attention(made)):
            return _replace(norm, target, (*attention, *rest, *norm.args[2:]))


def _attention(made: Node) -> tuple[Any, ...] | None:
    """Query, key, value, lengths, offsets, heads, scale, causal of an attention with as many keys as queries; else
    None."""
    query, key, value, where, heads, kv_heads, scale, causal = made.args[:8]
    if heads != kv_heads or not same_size(shape(query)[1], shape(key)[1]):  # type: ignore[arg-type]
        return None
    packed = is_call(made, ops.packed_attention.default, ops.packed_attention_fp8.default)
    places = (None, where) if packed else (where, None)
    return (query, key, value, *places, heads, scale, causal)


def _replace(norm: Node, target: Any, args: tuple[Any, ...]) -> None:
    made = insert(norm, target, args)
    for user in list(norm.users):
        user.replace_input_with(norm, made)
