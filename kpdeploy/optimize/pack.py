"""Padding drops out: the tokens of all rows become one long row, and attention is told where each sequence begins.

Between the first and the last layer nearly all operators treat each token alone. There a batch [B, S, …] whose padding
mask is known to be a prefix is as well one row [1, T, …] of its T real tokens: less to compute by the share of padding,
which no operator that keeps the batch can save. Outputs that show padded places would show zeros: the proof tells.

What enters is ids, where a model begins with embeddings; and where one token of each row is read behind the last layer,
nothing is laid out as a batch again.
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
from kpdeploy.optimize.graph import FIRST, aten, calls, insert, is_call, name_of, row_read, same_size, shape, sweep

WHAT = "padding dropped"


@dataclass(frozen=True)
class _Tokens:
    """The padding mask of the model, [B, S]: what has these two leading axes and a third is made of tokens."""

    mask: Node

    def has(self, value: Any) -> bool:
        return self._are(value, shape(self.mask)[0], 3)

    def share(self, value: Any, axes: int = 3) -> bool:
        """Is it [1, S, …], the same for the tokens of each row?"""
        return self._are(value, 1, axes)

    def _are(self, value: Any, rows: Any, axes: int) -> bool:
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return False
        sizes = shape(value)
        return len(sizes) == axes and same_size(sizes[0], rows) and same_size(sizes[1], shape(self.mask)[1])

    def has_or_share(self, value: Any) -> bool:
        return self.has(value) or self.share(value)

    def repeated(self, value: Node) -> Node | None:
        """[1, S, …] that a value is a copy of in each row; None where it is none."""
        row: Any = value.args[0] if is_call(value, aten.expand.default) else None
        found = self.share(row, len(shape(value))) and all(map(same_size, shape(row)[2:], shape(value)[2:]))
        return row if found else None


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

EMBEDDING = "aten::embedding"
"""Makes tokens of ids [B, S]."""

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
    entering = {value for node in region for value in node.all_input_nodes if tokens.has(value)} - region
    leaving = [n for n in region if tokens.has(n) and any(user not in region for user in n.users)]
    # Positions enter once, for all layers.
    tables = {table for node in region if name_of(node) == ROTARY for table in node.all_input_nodes[1:]}
    tables |= {value for value in entering if tokens.repeated(value)}
    if (crossings := len(entering - tables) + len(leaving)) > len(attentions) + 2:
        return Skipped(what=WHAT, reason=f"tokens meet others in {crossings} places between its attentions")
    _rewrite(module, _Writer(module.graph, tokens, given=given), region, attentions)
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
    lie between two heavy ones, or between embeddings and a heavy one that alone reads them."""
    attended = {n for n in attentions if all(map(tokens.has, n.args[:3]))}
    alone = attended | {node for node in graph.nodes if _treats_each_alone(node, tokens)}
    heavy = [node for node in alone if name_of(node) in HEAVY or node in attended]
    after = _reached(heavy, lambda node: (user for user in node.users if user in alone))
    before = _reached(heavy, lambda node: (maker for maker in node.all_input_nodes if maker in alone))
    kept = {node for node in alone if node in after and node in before}
    # Of an operator with several results, each is taken.
    kept |= {node for node in alone if node.target is operator.getitem and node.args[0] in kept}
    begun = [n for n in graph.nodes if tokens.has(n) and (name_of(n) == EMBEDDING or tokens.repeated(n))]
    embedded = alone & _reached(begun, lambda node: (user for user in node.users if user in alone))
    for node in reversed(graph.nodes):
        if node in embedded and node.users and all(user in kept for user in node.users):
            kept.add(node)
    return kept


def _treats_each_alone(node: Node, tokens: _Tokens) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and _treats_each_alone(node.args[0], tokens)
    if (count := HEAVY.get(name_of(node), 0)) > 0:
        return all(map(tokens.has, node.args[:count])) and not any(map(tokens.has, node.args[count:]))
    if name_of(node) == EMBEDDING:
        return tokens.has(node)
    if name_of(node) == ROTARY:
        return tokens.has(node.args[0]) and all(map(tokens.has_or_share, node.args[1:3]))
    if not LIGHT.get(name_of(node), _never)(node):
        return False
    others = [a for a in node.all_input_nodes if not tokens.has_or_share(a)]
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
    """Adds the calls between the padded batch and its tokens."""

    def __init__(self, graph: Graph, tokens: _Tokens, *, given: bool) -> None:
        self.graph = graph
        self.tokens = tokens
        self.given = given
        mask = tokens.mask
        with graph.inserting_before(_following(mask)):
            if given:
                self.sources, self.targets, self.offsets = map(graph.placeholder, PLACES)
            self.sizes = [self.call(aten.sym_size.int, mask, 0), self.call(aten.sym_size.int, mask, 1)]
            self.batch = self.places = self.call(operator.mul, *self.sizes)
            if given:
                # One place more, for tokens that belong nowhere.
                self.places = self.call(operator.add, self.batch, 1)
                self.columns = self.call(aten.remainder.Scalar, self.sources, self.sizes[1])
                last = self.call(operator.sub, self.call(aten.sym_size.int, self.sources, 0), 1)
                begins = self.call(aten.slice.Tensor, self.offsets, 0, 0, self.sizes[0])
                # Behind all tokens, where the last rows have none.
                self.firsts = self.call(aten.clamp.default, begins, None, last)
                self.empty = self.call(aten.eq.Scalar, self.call(aten.slice.Tensor, mask, 1, 0, 1), 0)
            else:
                flat = self.call(aten.reshape.default, mask, [-1])
                found = self.call(aten.reshape.default, self.call(aten.nonzero.default, flat), [-1])
                self.sources = self.targets = found
                # No remainder: ONNX takes none by a size.
                counts = self.call(aten.cumsum.default, self.call(aten.to.dtype, mask, torch.int64), 1)
                own = self.call(aten.index_select.default, self.call(aten.reshape.default, counts, [-1]), 0, found)
                self.columns = self.call(aten.sub.Tensor, own, 1)
                ends = self.call(aten.cumsum.default, self.call(aten.sum.dim_IntList, mask, [-1]), 0)
                self.offsets = self.call(aten.constant_pad_nd.default, ends, [1, 0])

    def call(self, target: Any, *args: Any) -> Node:
        return self.graph.call_function(target, args)

    def packed(self, value: Node, before: Node) -> Node:
        """[1, T, …] before a node: of [B, S, …], or of [1, S, …] that each row has."""
        row = value if self.tokens.share(value) else self.tokens.repeated(value)
        of, places = (row, self.columns) if row is not None else (value, self.sources)
        with self.graph.inserting_before(before):
            flat = self.call(aten.reshape.default, of, [-1, *shape(value)[2:]])
            return self.call(aten.unsqueeze.default, self.call(aten.index_select.default, flat, 0, places), 0)

    def firsts_of(self, value: Node) -> Node:
        """[B, 1, N] of [1, T, N]: the first token of each row; zeros where there is none."""
        with self.graph.inserting_before(_following(value)):
            flat = self.call(aten.reshape.default, value, [-1, shape(value)[2]])
            taken = self.call(aten.index_select.default, flat, 0, self.firsts)
            return self.call(aten.unsqueeze.default, self.call(aten.masked_fill.Scalar, taken, self.empty, 0), 1)

    def unpacked(self, value: Node) -> Node:
        """[B, S, N] of [1, T, N]; zeros where there is no token."""
        width = value.meta["val"].shape[2]
        with self.graph.inserting_before(_following(value)):
            blank = self.call(aten.new_zeros.default, value, [self.places, width])
            rows = self.call(aten.reshape.default, value, [-1, width])
            filled = self.call(aten.index_put.default, blank, [self.targets], rows)
            if self.given:
                filled = self.call(aten.slice.Tensor, filled, 0, 0, self.batch)
            return self.call(aten.reshape.default, filled, [*self.sizes, width])


def _rewrite(module: GraphModule, writer: _Writer, region: set[Node], attentions: Iterable[Node]) -> None:
    # In the graph's order: the same model gives the same artifact.
    inside = [node for node in module.graph.nodes if node in region]
    packed: dict[Node, Node] = {}
    for node in inside:
        for value in node.all_input_nodes:
            if value not in region and (writer.tokens.has_or_share(value) or _are_ids(value, node)):
                if value not in packed:
                    packed[value] = writer.packed(value, node)
                node.replace_input_with(value, packed[value])
    for node in attentions:
        args = (*node.args[:3], writer.offsets, *node.args[4:])
        made = insert(node, _packed_forms()[node.target], args, node)
        node.replace_all_uses_with(made)
        region.add(made)
    for node in [n for n in module.graph.nodes if n in region]:
        if outside := [user for user in node.users if user not in region]:
            firsts = writer.given and all(row_read(user) == FIRST for user in outside)
            made = writer.firsts_of(node) if firsts else writer.unpacked(node)
            for user in outside:
                user.replace_input_with(node, made)
    if writer.given:
        # An exported module takes a pytree, which it checks, and which knows nothing of the inputs that were added.
        module.graph.set_codegen(torch.fx.graph.CodeGen())
        module._forward_pre_hooks.clear()
    sweep(module)


def _are_ids(value: Node, node: Node) -> bool:
    return name_of(node) == EMBEDDING and value is node.args[1]


def _following(node: Node) -> Node:
    """The first node behind this one before which calls may stand."""
    behind = node.next
    while behind.op in ("placeholder", "get_attr"):
        behind = behind.next
    return behind
