"""The same graph in fewer bits, on another device: weights are cast once, activations where a kernel wants them so."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.ops import NAMESPACE, OPS
from kpdeploy.optimize.graph import aten, insert, is_call, name_of, parameter, sweep

KERNELS = (
    aten.linear.default, aten.addmm.default, aten.matmul.default, aten.bmm.default, aten.conv1d.default,
    aten.conv2d.default, aten.layer_norm.default, aten.group_norm.default, aten.batch_norm.default,
    aten.scaled_dot_product_attention.default,
)  # fmt: skip
"""Operators of torch that want one dtype of all of their tensors; so do all of ours."""


def place(module: GraphModule, device: torch.device) -> None:
    """Move a module in place: its tensors, and those that its graph makes."""
    module.to(device)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = torch.fx.node.map_aggregate(node.args, lambda a: _moved(a, device))
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda a: _moved(a, device))
    module.recompile()


def _moved(value: Any, device: torch.device) -> Any:
    return device if isinstance(value, torch.device) else value


def lower(module: GraphModule, dtype: torch.dtype) -> None:
    """Let a float32 module compute in another dtype, in place. Its inputs and outputs stay float32.

    What a graph computes in float32 on its own, such as positions, meets the kernels in their dtype. Angles stay in
    float32: the 2047th position times a frequency of 8 bits is turns away from where it was.
    """
    angles = _angles(module)
    kept = {str(node.target): parameter(module, node) for node in angles if node.op == "get_attr"}
    module.to(dtype)
    for name, tensor in kept.items():
        owner, _, own = name.rpartition(".")
        module.get_submodule(owner)._buffers[own] = tensor
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "output":
            node.args = torch.fx.node.map_arg(node.args, partial(_cast, casts, node, torch.float32))
        elif _is_kernel(node) and node not in angles:
            kinds = [torch.float32 if wide else dtype for wide in _wide(node)]
            node.args = tuple(
                torch.fx.node.map_arg(value, partial(_cast, casts, node, kind))
                for value, kind in zip(node.args, kinds, strict=True)
            )
    sweep(module)


def _angles(module: GraphModule) -> set[Node]:
    """What leads to a sine or cosine and to nothing else, or to what an op wants in float32: an outer product of
    positions and frequencies, say, but no layer of a network. Frequencies are buffers; what is trained goes with the
    rest."""
    found: set[Node] = set()
    for node in reversed(module.graph.nodes):
        alone = bool(node.users) and all(user in found or _only_wide(node, user) for user in node.users)
        layer = _is_kernel(node) and not is_call(node, aten.matmul.default, aten.bmm.default)
        trained = node.op == "get_attr" and isinstance(parameter(module, node), torch.nn.Parameter)
        if is_call(node, aten.sin.default, aten.cos.default) or (alone and not layer and not trained):
            found.add(node)
    return found


def _wide(call: Node) -> list[bool]:
    """For each argument of a call, whether it is float32 whatever the others are."""
    op = OPS.get(name_of(call).removeprefix(f"{NAMESPACE}::"))
    names = [name for _, name in op.parameters] if op else []
    return [op is not None and names[index] in op.wide for index in range(len(call.args))]


def _only_wide(value: Node, call: Node) -> bool:
    """A call that takes the value in a list wants it as it wants the list."""
    taken = [wide for argument, wide in zip(call.args, _wide(call), strict=True) if argument is value]
    return bool(taken) and all(taken)


def _is_kernel(node: Any) -> bool:
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return node.target in KERNELS or getattr(node.target, "namespace", "") == "kpdeploy"


def _cast(casts: dict[tuple[Node, torch.dtype], Node], before: Node, dtype: torch.dtype, value: Node) -> Node:
    """A value of floats in this dtype, cast once; weights and what kernels give are of the lower one already, and
    integers stay."""
    found = value.meta.get("val")
    lowered = value.op == "get_attr" and dtype is not torch.float32
    if lowered or not isinstance(found, torch.Tensor) or not found.is_floating_point():
        return value
    maker = value.args[0] if value.target is operator.getitem else value
    if _is_kernel(maker) and dtype is not torch.float32:
        return value
    if (value, dtype) not in casts:
        casts[value, dtype] = node = insert(before, aten.to.dtype, (value, dtype))
        node.meta["val"] = found.to(dtype)
    return casts[value, dtype]
