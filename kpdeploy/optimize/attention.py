"""Scaled dot-product attention becomes one op on packed heads: no transposes around it, no mask tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    same_size,
    shape,
    used_once,
)
from kpdeploy.optimize.heads import is_packed, packed
from kpdeploy.optimize.mask import Meaning, meaning
from kpdeploy.signature import Signature

OP = "attention"
HEAD_SIZES = range(32, 129)


@dataclass(frozen=True)
class Attention:
    """An attention that the op can compute: `key` and `value` are those before heads were repeated."""

    node: Node
    query: Node
    key: Node
    value: Node
    heads: int
    kv_heads: int
    scale: float
    causal: bool
    lengths: Node | None


def find(module: GraphModule, signature: Signature) -> Iterator[Finding]:
    for node in calls(module.graph, aten.scaled_dot_product_attention.default):
        found = _attention(module, node, signature)
        if isinstance(found, str):
            yield Refusal(node=node, reason=found)
        else:
            yield Match(node=node, apply=partial(_rewrite, found))


def _attention(module: GraphModule, node: Node, signature: Signature) -> Attention | str:
    query, key, value = (a for a in node.args[:3] if isinstance(a, Node))
    if len(shape(query)) != 4:
        return f"its tensors have {len(shape(query))} axes, not batch, heads, length, head size"
    if argument(node, "dropout_p", 0.0) != 0:
        return "it drops out"
    key, value = _before_repeat(key), _before_repeat(value)
    heads, kv_heads, size = shape(query)[1], shape(key)[1], shape(query)[3]
    if not all(isinstance(n, int) for n in (heads, kv_heads, size)):
        return "its heads or head size are dynamic"
    if shape(value)[3] != size or shape(value)[1] != kv_heads:
        return "the heads of its values differ from those of its keys"
    if size not in HEAD_SIZES:
        return f"head size {size} is outside {HEAD_SIZES.start}..{HEAD_SIZES.stop - 1}"
    said = _mask(module, node, signature)
    if isinstance(said, str):
        return said
    scale = argument(node, "scale")
    return Attention(
        node=node,
        query=query,
        key=key,
        value=value,
        heads=heads,
        kv_heads=kv_heads,
        scale=size**-0.5 if scale is None else scale,
        causal=said.causal,
        lengths=said.lengths,
    )


def _mask(module: GraphModule, node: Any, signature: Signature) -> Meaning | str:
    mask = argument(node, "attn_mask")
    if argument(node, "is_causal", False):
        # torch counts from the first key, the op from the last: the same for as many queries as keys.
        if not same_size(shape(node.args[0])[2], shape(node.args[1])[2]):
            return "it is causal over queries and keys of different lengths"
        return Meaning(True, None)
    return Meaning(False, None) if mask is None else meaning(module, mask, signature)


def _before_repeat(node: Any) -> Any:
    """Keys or values [B, kv_heads, S, D] before each head was repeated for a group of query heads."""
    if is_call(node, aten.reshape.default, aten.view.default):
        expand = node.args[0]
        if is_call(expand, aten.clone.default):
            expand = expand.args[0]
        if is_call(expand, aten.expand.default):
            unsqueeze = expand.args[0]
            if is_call(unsqueeze, aten.unsqueeze.default) and unsqueeze.args[1] == 2:
                return unsqueeze.args[0]
    return node


def _rewrite(found: Attention) -> None:
    node = found.node
    query, key, value = (packed(node, t) for t in (found.query, found.key, found.value))
    lengths = None
    if found.lengths is not None:
        # The layers before this one have summed the same mask.
        sums = (user for user in found.lengths.users if is_call(user, aten.sum.dim_IntList) and user.args[1] == [-1])
        lengths = next(sums, None) or insert(node, aten.sum.dim_IntList, (found.lengths, [-1]))
    args = (query, key, value, lengths, found.heads, found.kv_heads, found.scale, found.causal)
    fused = insert(node, torch.ops.kpdeploy.attention.default, args)
    fused.meta["val"] = node.meta["val"].transpose(1, 2).flatten(2)
    last = _unpacked_by(node)
    if last is not None:
        last.replace_all_uses_with(fused)
        return
    split = insert(node, aten.unflatten.int, (fused, 2, [found.heads, shape(found.query)[3]]))
    node.replace_all_uses_with(insert(node, aten.transpose.int, (split, 1, 2), node))


def _unpacked_by(node: Node) -> Node | None:
    """The node that gives the answer back as [B, S, heads·D], where nothing else uses what is before it."""
    current = node
    for targets in ((aten.transpose.int,), (aten.contiguous.default, aten.clone.default)):
        if not used_once(current):
            return None
        user = next(iter(current.users))
        if is_call(user, *targets):
            current = user
        elif targets[0] is aten.transpose.int:
            return None
    if not used_once(current):
        return None
    last = next(iter(current.users))
    fits = is_call(last, aten.view.default, aten.reshape.default, aten.flatten.using_ints) and is_packed(last, node)
    return last if fits else None
