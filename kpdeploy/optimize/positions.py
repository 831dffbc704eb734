"""Embeddings of positions become one table: what a model adds to its words' embeddings before their norm, and knows
beforehand. Gathers, sums and the norm of a BERT's embeddings are two kernels then, in place of seven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import (
    argument,
    aten,
    calls,
    dtype,
    insert,
    is_call,
    parameter,
    same_shape,
    shape,
    sweep,
    take,
    used_once,
)  # fmt: skip


def settle(module: GraphModule) -> None:
    """Rewrite a module in place: layer norms of embeddings [B, S, N] and of tables' first S rows, each an embedding of
    constant indices."""
    for norm in list(calls(module.graph, aten.layer_norm.default)):
        _settle_one(module, norm)
    sweep(module)


def _settle_one(module: GraphModule, norm: Node) -> None:
    weight, bias, eps = (argument(norm, name) for name in ("weight", "bias", "eps"))
    normalized: Any = norm.args[1]
    if len(normalized) != 1 or weight is None:
        return
    words, ends, total = [], set(), None
    for summand in _summands(norm.args[0]):
        if (found := _table(module, summand)) is None:
            words.append(summand)
        else:
            table, end = found
            total = table if total is None else _sum(total, table)
            ends.add(end)
    if total is None or len(words) != 1 or len(ends) != 1:
        return
    (word,) = words
    if len(shape(word)) != 3 or not same_shape(word, norm):
        return
    name = f"positions_{norm.name}"
    module.register_buffer(name, total)
    with norm.graph.inserting_before(norm):
        held = norm.graph.get_attr(name)
    held.meta["val"] = total
    # Of ids, where there are: what reads the size of an embedding keeps it in a batch (kpdeploy.optimize.pack).
    sized = word.args[1] if is_call(word, aten.embedding.default) else word
    sizes = [insert(norm, aten.sym_size.int, (sized, axis)) for axis in (0, 1)]
    first = insert(norm, aten.slice.Tensor, (held, 1, 0, *ends))
    first.meta["val"] = word.meta["val"][:1]
    rows = insert(norm, aten.expand.default, (first, [*sizes, -1]), word)
    pair = insert(norm, torch.ops.kpdeploy.add_layer_norm.default, (word, rows, weight, bias, eps))
    norm.replace_all_uses_with(take(norm, pair, 0, norm))


def _summands(value: Any) -> Iterator[Node]:
    """What a sum is of, in float32 sums that nothing else reads."""
    plain = is_call(value, aten.add.Tensor) and used_once(value) and argument(value, "alpha", 1) == 1
    if plain and all(isinstance(part, Node) and dtype(part) is torch.float32 for part in value.args[:2]):
        for part in value.args[:2]:
            yield from _summands(part)
    else:
        yield value


def _sum(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of as many rows as both have."""
    rows = min(one.shape[1], other.shape[1])
    return one[:, :rows] + other[:, :rows]


def _table(module: GraphModule, value: Node) -> tuple[torch.Tensor, Node] | None:
    """[1, L, N] and S, where the value is an embedding of the first S of L constant indices; else None."""
    if not is_call(value, aten.embedding.default):
        return None
    weight, indices = parameter(module, value.args[0]), _without_rows(value.args[1])
    if is_call(indices, aten.gather.default) and indices.args[1] == 1:
        of, first = parameter(module, indices.args[0]), _first(module, indices.args[2])
        if of is None or first is None or not _within(first[0], of.shape[1]):
            return None
        known: tuple[torch.Tensor, Node] | None = (of.gather(1, first[0]), first[1])
    else:
        known = _first(module, indices)
    if weight is None or known is None or not _within(known[0], weight.shape[0]):
        return None
    return weight.detach()[known[0]], known[1]


def _within(indices: torch.Tensor, size: int) -> bool:
    return int(indices.min()) >= 0 and int(indices.max()) < size


def _without_rows(indices: Any) -> Any:
    """Indices of one row, where they are the same in every row of a batch."""
    return indices.args[0] if is_call(indices, aten.expand.default) else indices


def _first(module: GraphModule, value: Any) -> tuple[torch.Tensor, Node] | None:
    """Constant indices [1, L] and S, where the value is the first S of them; else None."""
    if not is_call(value, aten.slice.Tensor) or tuple(value.args[1:3]) not in ((1, 0), (1, None)):
        return None
    held, end = parameter(module, value.args[0]), argument(value, "end")
    plain = isinstance(end, Node) and argument(value, "step", 1) == 1
    return (held, end) if plain and held is not None and held.dim() == 2 and held.shape[0] == 1 else None
