"""Attention, the linear of its result, the residual sum and its norm become one op, in a graph lowered for a GPU.

Each is a kernel of some microseconds that waits for the one ahead; for few rows their waits are most of a layer's time.
Where rows are many the op runs the kernels of its parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import calls, insert, is_call, same_size, shape, sweep, used_once
from kpdeploy.optimize.linear_add import summands

ops = torch.ops.kpdeploy


def fuse(module: GraphModule) -> None:
    """Rewrite a lowered module in place, where attention's result goes to one linear and that to one norm alone."""
    for norm in calls(module.graph, ops.add_layer_norm.default):
        _in_16_bits(norm)
    for norm in calls(module.graph, ops.fp8_add_layer_norm.default):
        _in_8_bits(norm)
    sweep(module)


def _sole(value: Any, *targets: Any) -> Node | None:
    """The value, if it is a call of one of these operators with one user."""
    return value if is_call(value, *targets) and used_once(value) else None


def _attention(made: Node) -> tuple[Any, ...] | None:
    """Query, key, value, lengths, offsets, heads, scale, causal of an attention with as many keys as queries; else
    None."""
    query, key, value, where, heads, kv_heads, scale, causal = made.args[:8]
    if heads != kv_heads or not same_size(shape(query)[1], shape(key)[1]):  # type: ignore[arg-type]
        return None
    packed = is_call(made, ops.packed_attention.default, ops.packed_attention_fp8.default)
    places = (None, where) if packed else (where, None)
    return (query, key, value, *places, heads, scale, causal)


def _in_16_bits(norm: Node) -> None:
    for linear, residual in summands(norm, ops.linear_activation.default):
        x, weight, bias, activation = linear.args
        made = _sole(x, ops.attention.default, ops.packed_attention.default)
        if made is not None and activation == "none" and (attention := _attention(made)):
            args = (*attention, weight, bias, residual, *norm.args[2:])
            return _replace(norm, ops.attention_add_layer_norm.default, args)


def _in_8_bits(norm: Node) -> None:
    for linear, residual in summands(norm, ops.fp8_linear_activation.default):
        x, weight, x_scale, weight_scale, bias, out_scale, activation = linear.args
        made = _sole(x, ops.attention_fp8.default, ops.packed_attention_fp8.default)
        # What is quantized for one product alone is so by the scale of that product's input.
        if made is not None and out_scale is None and activation == "none" and (attention := _attention(made)):
            args = (*attention, weight, x_scale, weight_scale, bias, residual, *norm.args[2:])
            return _replace(norm, ops.fp8_attention_add_layer_norm.default, args)


def _replace(norm: Node, target: Any, args: tuple[Any, ...]) -> None:
    made = insert(norm, target, args)
    for user in list(norm.users):
        user.replace_input_with(norm, made)
