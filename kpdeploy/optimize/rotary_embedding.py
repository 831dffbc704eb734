"""x · cos + (-second half of x, first half) · sin becomes one op, on heads that stay side by side.

Queries and keys that are columns of one product, side by side, are turned by one call: their attention reads strided
rows. Cosines and sines stay float32.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    dtype,
    insert,
    is_call,
    same_size,
    shape,
    take,
    used_once,
)
from kpdeploy.optimize.heads import packed

OP = "rotary_embedding"
CUTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Rotation:
    """Heads `x` [B, heads, S, D], the tables [1 or B, 1, S, R] that turn their first R columns, and the node that gives
    them turned."""

    x: Node
    cos: Node
    sin: Node
    last: Node


def find(module: GraphModule) -> Iterator[Finding]:
    for node in calls(module.graph, aten.cat.default, aten.stack.default):
        found = _rotation(node)
        if isinstance(found, str):
            yield Refusal(node=node, reason=found)
        elif found is not None:
            yield Match(node=found.last, apply=partial(_rewrite, found))


def _rotation(across: Node) -> Rotation | str | None:
    """The rotation around (-second half, first half), why it is none that is known, or None where nothing looks like
    one."""
    parts: Any = across.args[0]
    if len(parts) != 2 or not is_call(parts[0], aten.neg.default):
        return None
    first, second = _part(parts[1]), _part(parts[0].args[0])
    if first is None or second is None or first.of is not second.of:
        return None
    if is_call(across, aten.stack.default) or first.step != 1:
        return "it turns neighbouring columns, not the two halves of a head"
    x, half = first.of, first.width
    if first.begin != 0 or (second.begin, second.width) != (half, half) or shape(x)[-1] != 2 * half:
        return "it exchanges other columns than the two halves of a head"
    product = _only_user(across)
    if not is_call(product, aten.mul.Tensor):
        return "its halves are not multiplied by a sine alone"
    total = _only_user(product)
    along: Any = _other(total, product) if is_call(total, aten.add.Tensor) else None
    if not is_call(along, aten.mul.Tensor) or x not in along.args:
        return "what a cosine multiplies is not added alone"
    cos, sin = _other(along, x), _other(product, across)
    if reason := _refusal(x, cos, sin, total):
        return reason
    whole, last = _with_rest(x, total)
    return Rotation(whole, cos, sin, last)


def _only_user(node: Node) -> Any:
    return next(iter(node.users)) if used_once(node) else None


def _other(node: Node, one: Node) -> Any:
    """The other operand of two."""
    return next((a for a in node.args[:2] if a is not one), None)


@dataclass(frozen=True)
class _Part:
    """Columns of the last axis of a tensor."""

    of: Node
    begin: int
    width: int
    step: int = 1


def _part(value: Any) -> _Part | None:
    """What a value is columns of, by an operator that cuts the last axis; else None."""
    node: Any = value
    if is_call(node, aten.slice.Tensor):
        of = node.args[0]
        begin = argument(node, "start") or 0
        if argument(node, "dim", 0) in (-1, len(shape(of)) - 1) and isinstance(begin, int) and begin >= 0:
            return _Part(of, begin, shape(node)[-1], argument(node, "step", 1))
    if isinstance(node, Node) and node.target is operator.getitem and is_call(node.args[0], *CUTS):
        cut: Any = node.args[0]
        index: Any = node.args[1]
        if argument(cut, "dim", 0) in (-1, len(shape(cut.args[0])) - 1):
            widths = [part.shape[-1] for part in cut.meta["val"]]
            return _Part(cut.args[0], sum(widths[:index]), widths[index])
    return None


def _refusal(x: Node, cos: Any, sin: Any, total: Node) -> str:
    """Why x, turned by these tables, is nothing that the op computes; empty if it is."""
    if len(shape(x)) != 4:
        return f"its tensor has {len(shape(x))} axes, not batch, heads, length, head size"
    if not all(isinstance(n, int) for n in (shape(x)[1], shape(x)[3])):
        return "its heads or head size are dynamic"
    if dtype(total) != dtype(x):
        return f"it makes {dtype(total)} of {dtype(x)}"
    if not isinstance(cos, Node) or not isinstance(sin, Node):
        return "its cosine or sine is no tensor"
    batch, _, length, turned = shape(x)
    for table in (cos, sin):
        sizes = shape(table)
        if len(sizes) != 4 or not all(map(same_size, sizes[1:], (1, length, turned))):
            return "its cosines are not one row for each position, of all columns"
        if not any(same_size(sizes[0], n) for n in (1, batch)):
            return "its cosines are of another batch"
    return ""


def _with_rest(x: Node, total: Node) -> tuple[Node, Node]:
    """The heads of whose columns x are the first, and the node that puts the others behind the turned ones."""
    joined = _only_user(total)
    parts: Any = joined.args[0] if is_call(joined, aten.cat.default) else ()
    if len(parts) != 2 or parts[0] is not total or argument(joined, "dim", 0) not in (-1, 3):
        return x, total
    own, rest = _part(x), _part(parts[1])
    if rest is not None and rest.of is x and rest.width == 0:
        return x, joined
    if own is None or rest is None or own.of is not rest.of or {own.step, rest.step} != {1}:
        return x, total
    everything = own.begin == 0 and rest.begin == own.width and own.width + rest.width == shape(own.of)[-1]
    return (own.of, joined) if everything else (x, total)


def _rewrite(found: Rotation) -> None:
    last, (heads, size) = found.last, (shape(found.x)[1], shape(found.x)[3])
    x = packed(last, found.x)
    args = (x, _rows(last, found.cos), _rows(last, found.sin), heads)
    turned = insert(last, torch.ops.kpdeploy.rotary_embedding.default, args, x)
    split = insert(last, aten.unflatten.int, (turned, 2, [heads, size]))
    last.replace_all_uses_with(insert(last, aten.transpose.int, (split, 1, 2), last))


def _rows(before: Node, table: Node) -> Node:
    """[1 or B, S, R] of a table [1 or B, 1, S, R], in float32; not rounded, where the graph rounds it."""
    table = _unrounded(table)
    if is_call(table, aten.unsqueeze.default) and table.args[1] in (1, -3):
        table = _unrounded(table.args[0])
    else:
        table = _once(before, aten.squeeze.dim, (table, 1), table.meta["val"].squeeze(1))
    if dtype(table) is torch.float32:
        return table
    return _once(before, aten.to.dtype, (table, torch.float32), table.meta["val"].float())


def _unrounded(table: Any) -> Any:
    """What a cast took in float32."""
    rounded = is_call(table, aten.to.dtype, aten._to_copy.default) and dtype(table.args[0]) is torch.float32
    return table.args[0] if rounded else table


def _once(before: Node, target: Any, args: tuple[Any, ...], value: Any) -> Node:
    """A new call before a node, or the one that a layer ahead has made."""
    made = next((user for user in args[0].users if is_call(user, target) and user.args == args), None)
    if made is None:
        made = insert(before, target, args)
        made.meta["val"] = value
    return made


def find_adjacent(module: GraphModule) -> Iterator[Finding]:
    """Calls of the op by the same tables on columns side by side of one tensor: one call on all of these columns."""
    groups: dict[tuple[Any, ...], dict[int, Node]] = defaultdict(dict)
    for node in calls(module.graph, torch.ops.kpdeploy.rotary_embedding.default):
        x, cos, sin, heads = node.args
        if (part := _packed_part(x)) is not None:
            groups[part.of, cos, sin, part.width // heads][part.begin] = node  # type: ignore[operator]
    for (whole, *_), starts in groups.items():
        run: list[Node] = []
        end = None
        for begin, node in sorted(starts.items()):
            if begin != end and len(run) > 1:
                yield Match(node=run[0], apply=partial(_join, whole, run))
            run = [*run, node] if begin == end else [node]
            end = begin + shape(node)[-1]
        if len(run) > 1:
            yield Match(node=run[0], apply=partial(_join, whole, run))


def _packed_part(node: Any) -> _Part | None:
    """The columns of a tensor [B, S, N] that rows of heads [B, S, heads·D] are."""
    if (part := _part(node)) is not None:
        return part if len(shape(node)) == 3 and part.step == 1 else None
    # One of several heads' groups: a product viewed as [B, S, groups, heads, D].
    piece = node.args[0] if is_call(node, aten.flatten.using_ints) and tuple(node.args[1:]) == (2, 3) else None
    if piece is None or piece.target is not operator.getitem or not is_call(piece.args[0], aten.unbind.int):
        return None
    unbind, index = piece.args
    groups = unbind.args[0]
    if not is_call(groups, aten.view.default, aten.reshape.default) or argument(unbind, "dim", 0) not in (2, -3):
        return None
    whole, width = groups.args[0], shape(node)[-1]
    fits = len(shape(groups)) == 5 and len(shape(whole)) == 3 and shape(whole)[-1] == width * shape(groups)[2]
    return _Part(whole, width * index, width) if fits else None


def _join(whole: Node, run: Sequence[Node]) -> None:
    graph, parts = whole.graph, [_packed_part(node.args[0]) for node in run]
    widths = [part.width for part in parts if part is not None]
    begin = min(part.begin for part in parts if part is not None)
    order = {node: i for i, node in enumerate(graph.nodes)}
    before = min(run, key=order.__getitem__)
    _, cos, sin, _ = before.args
    x = _columns(before, whole, begin, sum(widths))
    heads = sum(node.args[3] for node in run)  # type: ignore[misc]
    turned = insert(before, torch.ops.kpdeploy.rotary_embedding.default, (x, cos, sin, heads), x)
    cut = insert(before, aten.split_with_sizes.default, (turned, widths, -1))
    cut.meta["val"] = turned.meta["val"].split_with_sizes(widths, -1)
    for node, made in [(node, take(before, cut, index, node)) for index, node in enumerate(run)]:
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    # What is left, the values, is cut out alone: ONNX Runtime copies all that a Split gives.
    for node in list(graph.nodes):
        left = _packed_part(node) if node.users and not is_call(node, aten.slice.Tensor) else None
        if left is not None and left.of is whole:
            node.replace_all_uses_with(_columns(node, whole, left.begin, left.width))


def _columns(before: Node, whole: Node, begin: int, width: int) -> Node:
    node = insert(before, aten.slice.Tensor, (whole, 2, begin, begin + width))
    node.meta["val"] = whole.meta["val"][:, :, begin : begin + width]
    return node
