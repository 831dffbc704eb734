"""activation(x Wᵀ + b) becomes one op: the linear's result is never written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.optimize.graph import Finding, Match, Refusal, argument, aten, insert, is_call, shape, used_once

OP = "linear_activation"


def find(module: GraphModule) -> Iterator[Finding]:
    for node in list(module.graph.nodes):
        activation, source = _activation(node)
        if source is None:
            continue
        linear = linear_of(source)
        if linear is None:
            made_by = source.target if source.op == "call_function" else source.op
            yield Refusal(node=node, reason=f"{activation} follows {made_by}, not a linear")
        elif (not used_once(source) and activation != "gelu_tanh") or len(_outside_users(source, node)) > 0:
            yield Refusal(node=node, reason="the linear's result is used elsewhere too")
        else:
            yield Match(node=node, apply=partial(_rewrite, node, source, activation))


def _activation(node: Node) -> tuple[str, Node | None]:
    """The name of the activation that a node computes, and its input; None if it computes none."""
    if is_call(node, aten.gelu.default):
        name = "gelu_tanh" if argument(node, "approximate") == "tanh" else "gelu"
    elif is_call(node, aten.relu.default):
        name = "relu"
    elif is_call(node, aten.silu.default):
        name = "silu"
    else:
        return ("gelu_tanh", _tanh_formula(node))
    source = node.args[0]
    return name, source if isinstance(source, Node) else None


def _tanh_formula(node: Node) -> Node | None:
    """x of 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), as GPT-2 writes it out."""
    half, bracket = _operands(node, aten.mul.Tensor)
    x = _scaled(half, 0.5)
    tanh: Any = _plus(bracket, 1.0)
    if x is None or not is_call(tanh, aten.tanh.default):
        return None
    inner: Any = _scaled(tanh.args[0], math.sqrt(2 / math.pi))
    first, cubic = _operands(inner, aten.add.Tensor)
    cube: Any = _scaled(cubic, 0.044715)
    if first is not x or not is_call(cube, aten.pow.Tensor_Scalar):
        return None
    return x if cube.args[0] is x and cube.args[1] == 3 else None


def _operands(node: Any, target: Any) -> tuple[Node | None, Node | None]:
    if not is_call(node, target) or len(node.args) != 2:
        return None, None
    a, b = node.args
    return (a if isinstance(a, Node) else None), (b if isinstance(b, Node) else None)


def _scaled(node: Any, factor: float) -> Node | None:
    """x of x · factor."""
    if not is_call(node, aten.mul.Tensor):
        return None
    x, number = node.args
    close = isinstance(number, (int, float)) and math.isclose(number, factor, rel_tol=1e-5)
    return x if close and isinstance(x, Node) else None


def _plus(node: Any, number: float) -> Any:
    """x of x + number."""
    if not is_call(node, aten.add.Tensor) or node.args[1] != number:
        return None
    return node.args[0]


def _outside_users(source: Node, node: Node) -> list[Node]:
    """Users of a linear's result that are no part of the activation's formula."""
    inside = {node}
    pending = [node]
    while pending:
        for maker in pending.pop().all_input_nodes:
            if maker is not source and maker not in inside:
                inside.add(maker)
                if len(inside) < 12:
                    pending.append(maker)
    return [user for user in source.users if user not in inside]


def linear_of(source: Any) -> tuple[Node, Node, Node | None] | None:
    """x, weight [N, K] or [K, N], bias of a linear, or of a Conv1D (addmm over flattened rows, seen through a view)."""
    if is_call(source, aten.linear.default):
        return source.args[0], source.args[1], argument(source, "bias")
    if is_call(source, aten.view.default, aten.reshape.default) and is_call(source.args[0], aten.addmm.default):
        addmm = source.args[0]
        rows = addmm.args[1]
        if is_call(rows, aten.view.default, aten.reshape.default) and used_once(addmm):
            return rows.args[0], addmm.args[2], addmm.args[0]
    return None


def _rewrite(node: Node, source: Node, activation: str) -> None:
    found = linear_of(source)
    assert found is not None
    replace_by_op(node, source, found, activation)


def replace_by_op(node: Node, source: Node, found: tuple[Node, Node, Node | None], activation: str) -> None:
    """Let the op take the place of a node; `source` is the linear in it, and `found` what linear_of says of that."""
    x, weight, bias = found
    if not is_call(source, aten.linear.default):
        weight = insert(node, aten.t.default, (weight,))
        weight.meta["val"] = shape_of_transposed(found[1])
    fused = insert(node, torch.ops.kpdeploy.linear_activation.default, (x, weight, bias, activation), node)
    node.replace_all_uses_with(fused)


def shape_of_transposed(weight: Node) -> torch.Tensor:
    rows, columns = shape(weight)
    found: torch.Tensor = weight.meta["val"].new_empty((columns, rows))
    return found
