"""Rows that nothing reads are not computed: where a model shows one token of each sequence (a classifier's first, a
prefill's last), what its last layer does to the others, between attention and that token, is left out."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.ops import NAMESPACE
from kpdeploy.optimize.graph import LAST, aten, calls, insert, is_call, name_of, row_read, same_size, shape, sweep
from kpdeploy.optimize.pack import HEAVY

ROWS = {**HEAVY, "aten::add": 2, "aten::mul": 2, "aten::to": 1, f"{NAMESPACE}::attention": 1}
"""Operators that give each row of [B, S, N] apart, and how many of their first arguments have these rows."""


def settle(module: GraphModule, *, attention: bool) -> None:
    """Rewrite a module of fused ops in place. `attention`: it is asked for the rows that are read, too."""
    sweep(module)
    for chosen in calls(module.graph, aten.select.int, aten.slice.Tensor):
        if (window := row_read(chosen)) is not None:
            _rewrite(chosen, window, _behind(chosen, window, attention))
    sweep(module)


def _behind(chosen: Node, window: tuple[int, int], attention: bool) -> list[Node]:
    """The operators of whose results only that row is read, in order."""
    found = {chosen}
    for node in reversed(chosen.graph.nodes):
        read = node.users and all(user in found and _by_its_rows(user, node) for user in node.users)
        if read and _by_rows(node, window, attention):
            found.add(node)
    # One of several results, of which another is read whole, is cut like any other tensor.
    found -= {chosen, *(node for node in found if node.target is operator.getitem and node.args[0] not in found)}
    return [node for node in chosen.graph.nodes if node in found]


def _by_its_rows(user: Node, value: Node) -> bool:
    """Does a user of these take the value for its own rows alone? A key of attention is read by all queries."""
    return value not in user.args[ROWS.get(name_of(user), 1) :]


def _by_rows(node: Any, window: tuple[int, int], attention: bool) -> bool:
    if node.target is operator.getitem:
        return name_of(node.args[0]) in ROWS
    if is_call(node, torch.ops.kpdeploy.attention.default):
        # Under a causal mask the last query sees all that it saw, and the first would see more.
        return attention and (window == LAST or not node.args[7])
    rows = node.args[: ROWS.get(name_of(node), 0)]
    if not all(isinstance(row, Node) and len(shape(row)) == 3 for row in rows):
        return False
    return bool(rows) and all(
        same_size(a, b) for row in rows for a, b in zip(shape(row)[:2], shape(rows[0]), strict=False)
    )


def _rewrite(chosen: Node, window: tuple[int, int], behind: list[Node]) -> None:
    cut: dict[Any, Node] = {}
    for node in behind:
        for place, row in enumerate(node.args[: ROWS.get(name_of(node), 0)]):
            if row not in behind:
                if row not in cut:
                    cut[row] = insert(node, aten.slice.Tensor, (row, 1, *window))
                    cut[row].meta["val"] = _first(row.meta["val"])  # type: ignore[union-attr]
                node.update_arg(place, cut[row])
        node.meta["val"] = _first(node.meta["val"])
    if behind and chosen.target is aten.select.int:
        chosen.update_arg(2, 0)
    elif behind:
        chosen.replace_all_uses_with(chosen.args[0])  # type: ignore[arg-type]


def _first(value: Any) -> Any:
    return value[:, :1] if isinstance(value, torch.Tensor) else tuple(map(_first, value))
