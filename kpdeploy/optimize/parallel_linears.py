"""Linears of one input, such as an attention's query, key and value, become one product on weights side by side.

Its result is cut into views: every consumer reads strided rows, and nothing is copied. The weights are joined here,
once. Linears with an activation join those with the same one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import Finding, Match, Refusal, argument, aten, dtype, insert, is_call, parameter, take

OP = "parallel_linears"


def find(module: GraphModule) -> Iterator[Finding]:
    fused = torch.ops.kpdeploy.linear_activation.default
    groups: dict[tuple[Node, Any, str, torch.dtype], list[Node]] = {}
    for node in module.graph.nodes:
        if is_call(node, aten.linear.default, fused):
            activation = argument(node, "activation", "") if node.target is fused else ""
            groups.setdefault((node.args[0], node.target, activation, dtype(node)), []).append(node)
    readers = _readers(module)
    for linears in (group for group in groups.values() if len(group) > 1):
        reasons = {node: reason for node in linears if (reason := _refusal(module, node, readers))}
        for node, reason in reasons.items():
            yield Refusal(node=node, reason=reason)
        joined = [node for node in linears if node not in reasons]
        if len(joined) > 1:
            yield Match(node=joined[0], apply=partial(_rewrite, module, joined))


def _refusal(module: GraphModule, linear: Node, readers: Counter[int]) -> str:
    weight, bias = argument(linear, "weight"), argument(linear, "bias")
    tensor = parameter(module, weight)
    if tensor is None or (bias is not None and parameter(module, bias) is None):
        return "its weights are computed, not constant"
    if tensor.dim() != 2:
        return "its weight is no matrix"
    if readers[id(tensor)] > 1:
        return "its weight is used elsewhere too"
    return "its result is an output" if any(user.op == "output" for user in linear.users) else ""


def _readers(module: GraphModule) -> Counter[int]:
    """How many nodes use each tensor of the module, by the tensor's id: one may have several names."""
    found: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found[id(parameter(module, node))] += len(node.users)
    return found


def _rewrite(module: GraphModule, linears: list[Node]) -> None:
    first = linears[0]
    weights = [parameter(module, argument(node, "weight")) for node in linears]
    widths = [len(weight) for weight in weights if weight is not None]
    weight = _constant(module, first, torch.cat([w for w in weights if w is not None]), "weight")
    bias = _joined_bias(module, linears, widths)
    rest = first.args[3:] if first.target is not aten.linear.default else ()
    product = insert(first, first.target, (first.args[0], weight, bias, *rest))
    product.meta["val"] = torch.cat([node.meta["val"] for node in linears], -1)
    parts = insert(first, aten.split_with_sizes.default, (product, widths, -1))
    parts.meta["val"] = product.meta["val"].split_with_sizes(widths, -1)
    taken = [take(first, parts, index, linear) for index, linear in enumerate(linears)]
    for part, linear in zip(taken, linears, strict=True):
        linear.replace_all_uses_with(part)
        for user in part.users:
            # A view of dense memory may be a copy of strided memory: the next capture finds out which it is.
            if is_call(user, aten.view.default):
                user.target = aten.reshape.default
        olds = (argument(linear, "weight"), argument(linear, "bias"))
        module.graph.erase_node(linear)
        for old in olds:
            _forget(module, old)


def _joined_bias(module: GraphModule, linears: list[Node], widths: list[int]) -> Node | None:
    """The biases side by side, zeros for a linear that has none; None where none has one."""
    biases = [parameter(module, argument(node, "bias")) for node in linears]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    whole = [like.new_zeros(n) if bias is None else bias for bias, n in zip(biases, widths, strict=True)]
    return _constant(module, linears[0], torch.cat(whole), "bias")


def _constant(module: GraphModule, before: Node, tensor: torch.Tensor, kind: str) -> Node:
    """A new parameter of the module, read before a node."""
    index = next(i for i in itertools.count() if not hasattr(module, f"{OP}_{i}_{kind}"))
    name = f"{OP}_{index}_{kind}"
    module.register_parameter(name, torch.nn.Parameter(tensor.detach(), requires_grad=False))
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    node.meta["val"] = before.meta["val"].new_empty(tensor.shape)
    return node


def _forget(module: GraphModule, old: Node | None) -> None:
    """Take a parameter that was joined out of the module, unless something else reads it."""
    if old is not None and not old.users:
        module.graph.erase_node(old)
        owner, _, name = str(old.target).rpartition(".")
        delattr(module.get_submodule(owner), name)
