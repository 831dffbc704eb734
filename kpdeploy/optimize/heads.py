"""Heads side by side in a row, [B, S, heads·D], as the fused ops take them, of heads that a graph has taken apart."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from kpdeploy.optimize.graph import argument, aten, insert, is_call, same_size, shape

_SPLITS = (aten.view.default, aten.reshape.default, aten.unflatten.int)


def packed(before: Node, tensor: Node) -> Node:
    """[B, S, heads·D] of a tensor [B, heads, S, D]: what it was made from, or a copy.

    Keys behind cached ones are packed apart and put together packed: one copy of the cache and not two, and none to
    pack it where it is a constant.
    """
    if is_call(tensor, aten.cat.default) and argument(tensor, "dim", 0) in (-2, 2):
        # A cache begins as an empty tensor of one axis, which torch.cat passes over.
        parts: Any = tensor.args[0]
        parts = [part for part in parts if len(shape(part)) == 4]
        joined = insert(before, aten.cat.default, ([packed(before, part) for part in parts], 1))
        joined.meta["val"] = tensor.meta["val"].transpose(1, 2).flatten(2)
        return joined
    if is_call(tensor, aten.transpose.int) and set(tensor.args[1:]) == {1, 2}:
        rows: Any = tensor.args[0]
        if is_call(rows, *_SPLITS) and isinstance(whole := rows.args[0], Node) and is_packed(whole, tensor):
            return whole
    else:
        rows = insert(before, aten.transpose.int, (tensor, 1, 2))
        rows.meta["val"] = tensor.meta["val"].transpose(1, 2)
    flat = insert(before, aten.flatten.using_ints, (rows, 2, 3))
    flat.meta["val"] = rows.meta["val"].flatten(2)
    return flat


def is_packed(whole: Node, tensor: Node) -> bool:
    """Has `whole` the shape [B, S, heads·D] of a tensor [B, heads, S, D]?"""
    if len(shape(whole)) != 3:
        return False
    batch, heads, length, size = shape(tensor)
    return all(same_size(a, b) for a, b in zip(shape(whole), (batch, length, heads * size), strict=True))
