"""Padding drops out: the tokens of all rows become one long row, and attention is told where each sequence begins.

Between the first and the last layer nearly all operators treat each token alone. There a batch [B, S, …] whose padding
mask is known to be a prefix is as well one row [1, T, …] of its T real tokens: less to compute by the share of padding,
which no operator that keeps the batch can save. Outputs that show padded places would show zeros: the proof tells.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.ops import NAMESPACE
from kpdeploy.ops.packed_attention import PLACES
from kpdeploy.optimize.graph import aten, calls, insert, is_call, name_of, same_size, sweep

WHAT = "padding dropped"


@dataclass(frozen=True)
class _Tokens:
    """The padding mask of the model, [B, S]: what has these two leading axes and a third is made of tokens."""

    mask: Node

    def has(self, value: Any) -> bool:
        if not isinstance(value, Node) or not isinstance(found := value.meta.get("val"), torch.Tensor):
            return False
        batch, length = self.mask.meta["val"].shape
        return found.dim() == 3 and same_size(found.shape[0], batch) and same_size(found.shape[1], length)

    def has_or_shares(self, value: Any) -> bool:
        """Is it made of tokens, or the same for the tokens of each row?"""
        if self.has(value):
            return True
        sizes = value.meta["val"].shape
        return len(sizes) == 3 and sizes[0] == 1 and same_size(sizes[1], self.mask.meta["val"].shape[1])


def _always(node: Node) -> bool:
    return True


def _never(node: Node) -> bool:
    return False


def _over_last_axis(node: Node) -> bool:
    """Is the axis that the operator cuts the last of three?"""
    return node.args[2 if is_call(node, aten.split_with_sizes.default) else 1] in (2, -1)


def _norm_of_last_axis(node: Node) -> bool:
    shape: Any = node.args[1]
    return len(shape) == 1


HEAVY = {
    "aten::linear": 1,
    **{f"{NAMESPACE}::{name}": 1 for name in ("linear_activation", "gated_linear", "layer_norm", "rms_norm")},
    **{f"{NAMESPACE}::{name}": 2 for name in ("add_layer_norm", "add_rms_norm")},
    **{f"{NAMESPACE}::fp8_{name}": 1 for name in ("linear_activation", "gated_linear", "layer_norm", "rms_norm")},
    **{f"{NAMESPACE}::fp8_{name}": 2 for name in ("add_layer_norm", "add_rms_norm")},
}
"""Operators that treat each token alone and are worth it, and how many of their first arguments are tokens."""

_EACH = (
    "add", "sub", "mul", "div", "pow", "neg", "gelu", "relu", "silu", "tanh", "sigmoid", "to",
)  # fmt: skip

ROTARY = f"{NAMESPACE}::rotary_embedding"
"""Treats each token alone, with the row of its tables that is the token's."""

LIGHT: dict[str, Callable[[Node], bool]] = {
    f"{NAMESPACE}::fp8_quantize": _always,
    **{f"aten::{name}": _always for name in _EACH},
    "aten::layer_norm": _norm_of_last_axis,
    "aten::slice": _over_last_axis,
    "aten::split_with_sizes": _over_last_axis,
}
"""Operators that treat each token alone, where the condition holds; taken along between heavy ones."""


def pack(module: GraphModule, *, given: bool = False) -> Decision:
    """Rewrite a module of fused ops in place; Skipped where it stays as it is, for the reason given.

    Where the tokens are is found from the mask; or it is `given` by three inputs more, PLACES, for callers that need
    sizes to be known.
    """
    attentions = list(calls(module.graph, *_packed_forms()))
    mask = _shared_mask(attentions)
    if isinstance(mask, str):
        return Skipped(what=WHAT, reason=mask)
    tokens = _Tokens(mask)
    region = _region(module.graph, tokens, attentions)
    if not all(node in region for node in attentions):
        return Skipped(what=WHAT, reason="an attention's queries and keys are not the tokens of the padding mask")
    # In the graph's order: the same model gives the same artifact.
    entering = [
        n for n in module.graph.nodes if tokens.has(n) and n not in region and any(u in region for u in n.users)
    ]
    leaving = [n for n in region if tokens.has(n) and any(user not in region for user in n.users)]
    # Positions enter once, for all layers.
    tables = {table for node in region if name_of(node) == ROTARY for table in node.all_input_nodes[1:]}
    if (crossings := len({*entering} - tables) + len(leaving)) > len(attentions) + 2:
        return Skipped(what=WHAT, reason=f"tokens meet others in {crossings} places between its attentions")
    _rewrite(module, _Writer(module.graph, mask, given=given), region, attentions, entering)
    return Applied(what=WHAT, detail="the tokens of a batch are one row; attention is told where each sequence begins")


def _packed_forms() -> dict[Any, Any]:
    """Attention's ops, and what each is of tokens in one row."""
    ops = torch.ops.kpdeploy
    return {
        ops.attention.default: ops.packed_attention.default,
        ops.attention_fp8.default: ops.packed_attention_fp8.default,
    }


def _shared_mask(attentions: Iterable[Node]) -> Node | str:
    masks = set()
    for node in attentions:
        lengths: Any = node.args[3]
        if lengths is None:
            return "an attention sees no padding mask"
        masks.add(lengths.args[0])
    if len(masks) != 1:
        return "its attentions have several padding masks" if masks else "there is no fused attention"
    mask: Node = masks.pop()
    return mask


def _region(graph: Graph, tokens: _Tokens, attentions: Iterable[Node]) -> set[Node]:
    """The nodes that can run on tokens of one row: attention, and those that treat each token alone, as far as they
    lie between two heavy ones."""
    attended = {n for n in attentions if all(map(tokens.has, n.args[:3]))}
    alone = attended | {node for node in graph.nodes if _treats_each_alone(node, tokens)}
    heavy = [node for node in alone if name_of(node) in HEAVY or node in attended]
    after = _reached(heavy, lambda node: (user for user in node.users if user in alone))
    before = _reached(heavy, lambda node: (maker for maker in node.all_input_nodes if maker in alone))
    kept = {node for node in alone if node in after and node in before}
    # Of an operator with several results, each is taken.
    kept |= {node for node in alone if node.target is operator.getitem and node.args[0] in kept}
    return kept


def _treats_each_alone(node: Node, tokens: _Tokens) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and _treats_each_alone(node.args[0], tokens)
    if (count := HEAVY.get(name_of(node), 0)) > 0:
        return all(map(tokens.has, node.args[:count])) and not any(map(tokens.has, node.args[count:]))
    if name_of(node) == ROTARY:
        return tokens.has(node.args[0]) and all(map(tokens.has_or_shares, node.args[1:3]))
    if not LIGHT.get(name_of(node), _never)(node):
        return False
    others = [a for a in node.all_input_nodes if not tokens.has(a)]
    return tokens.has(node.args[0]) and all(_is_a_channel(other) for other in others)


def _is_a_channel(node: Node) -> bool:
    """One number for all tokens, or one for each channel."""
    found = node.meta.get("val")
    return isinstance(found, (int, float)) or (isinstance(found, torch.Tensor) and found.dim() <= 1)


def _reached(starts: Iterable[Node], following: Callable[[Node], Iterator[Node]]) -> set[Node]:
    found, pending = set(starts), list(starts)
    while pending:
        for node in following(pending.pop()):
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


class _Writer:
    """Adds the calls between the padded batch and its tokens. `added` are all of them."""

    def __init__(self, graph: Graph, mask: Node, *, given: bool) -> None:
        self.graph = graph
        self.added: set[Node] = set()
        with graph.inserting_before(_following(mask)):
            if given:
                self.sources, self.targets, self.offsets = map(graph.placeholder, PLACES)
            self.sizes = [self.call(aten.sym_size.int, mask, 0), self.call(aten.sym_size.int, mask, 1)]
            self.batch = self.places = self.call(operator.mul, *self.sizes)
            if given:
                # One place more, for tokens that belong nowhere.
                self.places = self.call(operator.add, self.batch, 1)
            else:
                flat = self.call(aten.reshape.default, mask, [-1])
                found = self.call(aten.reshape.default, self.call(aten.nonzero.default, flat), [-1])
                self.sources = self.targets = found
                ends = self.call(aten.cumsum.default, self.call(aten.sum.dim_IntList, mask, [-1]), 0)
                self.offsets = self.call(aten.constant_pad_nd.default, ends, [1, 0])

    def call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        self.added.add(node)
        return node

    def packed(self, value: Node, before: Node | None = None) -> Node:
        """[1, T, N] of [B, S, N]; or `before` a node, of [1, S, N] that each row has."""
        with self.graph.inserting_before(before or _following(value)):
            rows = self.call(aten.expand.default, value, [self.sizes[0], -1, -1]) if before else value
            flat = self.call(aten.reshape.default, rows, [-1, value.meta["val"].shape[2]])
            return self.call(aten.unsqueeze.default, self.call(aten.index_select.default, flat, 0, self.sources), 0)

    def unpacked(self, value: Node) -> Node:
        """[B, S, N] of [1, T, N]; zeros where there is no token."""
        width = value.meta["val"].shape[2]
        with self.graph.inserting_before(_following(value)):
            blank = self.call(aten.new_zeros.default, value, [self.places, width])
            rows = self.call(aten.reshape.default, value, [-1, width])
            filled = self.call(aten.index_put.default, blank, [self.targets], rows)
            if self.places is not self.batch:
                filled = self.call(aten.slice.Tensor, filled, 0, 0, self.batch)
            return self.call(aten.reshape.default, filled, [*self.sizes, width])


def _rewrite(
    module: GraphModule, writer: _Writer, region: set[Node], attentions: Iterable[Node], entering: Iterable[Node]
) -> None:
    _pack_tables(module.graph, writer, region, entering)
    for value in entering:
        value.replace_all_uses_with(writer.packed(value), delete_user_cb=lambda user: user in region)
    for node in attentions:
        args = (*node.args[:3], writer.offsets, *node.args[4:])
        made = insert(node, _packed_forms()[node.target], args, node)
        node.replace_all_uses_with(made)
        region.add(made)
    for node in [n for n in module.graph.nodes if n in region and any(user not in region for user in n.users)]:
        node.replace_all_uses_with(writer.unpacked(node), delete_user_cb=lambda user: user not in region | writer.added)
    if writer.places is not writer.batch:
        # An exported module takes a pytree, which it checks, and which knows nothing of the inputs that were added.
        module.graph.set_codegen(torch.fx.graph.CodeGen())
        module._forward_pre_hooks.clear()
    sweep(module)


def _pack_tables(graph: Graph, writer: _Writer, region: set[Node], entering: Iterable[Node]) -> None:
    """Give each token its own row of the cosines and sines that all rows share."""
    tables: dict[Node, Node] = {}
    for node in [n for n in graph.nodes if n in region and name_of(n) == ROTARY]:
        for table in node.all_input_nodes[1:]:
            if table not in entering:
                if table not in tables:
                    tables[table] = writer.packed(table, node)
                node.replace_input_with(table, tables[table])


def _following(node: Node) -> Node:
    """The first node behind this one before which calls may stand."""
    behind = node.next
    while behind.op in ("placeholder", "get_attr"):
        behind = behind.next
    return behind
