"""A captured model in another form: on another device, in fewer bits, without padding."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kpdeploy.decision import Decision, Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import Tensors
from kpdeploy.ops import NAMESPACE
from kpdeploy.optimize import attended, fp8, linear_add, pack, positions, precision, read_rows, unread
from kpdeploy.optimize.graph import aten, calls, insert, is_call, name_of, parameter, sweep


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The module, what was decided, and what each product costs in 8 bits (none in more). `constant`: what its fused
    ops take for weights, biases and scales are tensors that it holds, and no results."""

    module: GraphModule
    decisions: tuple[Decision, ...] = ()
    layers: tuple[fp8.Layer, ...] = ()
    constant: bool = False


def lowered(
    program: Any,
    *,
    bits: str,
    dropped: bool,
    device: str,
    samples: Sequence[Tensors] = (),
    budget: float = 0,
    told: bool = True,
    whole: bool = False,
) -> Lowered:
    """A copy of an exported program's module in `bits`: float32, float16, bfloat16 or fp8; its inputs and outputs stay.

    `dropped`: without padding, of which the module is `told` by three inputs more (kpdeploy.optimize.pack), or which it
    finds in the mask. `samples` are inputs that fp8 takes its scales from, `budget` the error that it may have on them.
    `whole`: with ops of which ONNX has no form (kpdeploy.optimize.attended, linear_add).

    Raises:
        ExportFailed: no product fits in 8 bits, or padding cannot be dropped.
    """
    # A copy: it shares its weights with the model that the proof asks.
    module: GraphModule = copy.deepcopy(program.module(check_guards=False))
    decisions: tuple[Decision, ...] = ()
    layers: tuple[fp8.Layer, ...] = ()
    with torch.no_grad():
        _fold(module)
        positions.settle(module)
        # With its index: torch.export tells "cuda" from "cuda:0".
        precision.place(module, torch.empty(0, device=device).device)
        if bits != "float32":
            precision.lower(module, torch.bfloat16 if bits == "fp8" else getattr(torch, bits))
        # Of all rows: the one that is read of a long sequence is calmer than that of a short one.
        largest = fp8.largest(module, samples) if bits == "fp8" else {}
        read_rows.settle(module, attention=not dropped)
        if bits == "fp8":
            decisions, layers = fp8.lower(module, samples, budget, largest)
        if dropped and isinstance(found := pack.pack(module, given=told), Skipped):
            raise ExportFailed("padding cannot be dropped", why=found.reason)
        if whole and bits != "float32":
            attended.fuse(module)
            linear_add.fuse(module)
        if bits == "fp8":
            unread.drop(module)
        _line_up(module)
    constant = all(map(_weights_are_held, module.graph.nodes))
    return Lowered(module=module, decisions=decisions, layers=layers, constant=constant)


def _weights_are_held(node: Node) -> bool:
    if not name_of(node).startswith(NAMESPACE):
        return True
    names: list[str] = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    taken = [a for name, a in zip(names, node.args, strict=False) if name.endswith(("weight", "bias", "scale"))]
    return all(value.op == "get_attr" for value in taken if isinstance(value, Node))


VIEWS = (aten.slice.Tensor, aten.split_with_sizes.default)


def _line_up(module: GraphModule) -> None:
    """Columns of a joined product that are appended to a cache are copied out of it first: torch.cat goes element by
    element where one of its parts has gaps, and the cache is the larger part. Among results alone a copy is only one
    kernel more."""
    for node in calls(module.graph, aten.cat.default):
        if not any(part.op in ("get_attr", "placeholder") for part in node.all_input_nodes):
            continue
        for part in node.all_input_nodes:
            maker = part.args[0] if part.target is operator.getitem else part
            if is_call(maker, *VIEWS):
                node.replace_input_with(part, insert(node, aten.contiguous.default, (part,), part))
    sweep(module)


MADE = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.scalar_tensor.default)
"""What gives the same tensor each time, of numbers alone."""


def _fold(module: GraphModule) -> None:
    """What a graph computes of weights alone is computed now: once, and a constant to the kernels."""
    held: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if (value := _constant(module, node, held)) is not None:
            held[node] = value
    for node, value in held.items():
        outside = [user for user in node.users if user not in held]
        if node.op == "get_attr" or not outside or not isinstance(value, torch.Tensor):
            continue
        module.register_buffer(f"folded_{node.name}", value.detach())
        with module.graph.inserting_before(node):
            made = module.graph.get_attr(f"folded_{node.name}")
        made.meta["val"] = node.meta.get("val", value)
        node.replace_all_uses_with(made)
    sweep(module)
    _forget(module)


def _constant(module: GraphModule, node: Node, held: dict[Node, Any]) -> Any:
    """What a node gives if all that it takes is held: a tensor, or several; else None."""
    if node.op == "get_attr":
        return parameter(module, node)
    known = isinstance(node.target, torch._ops.OpOverload) and not node.is_impure()
    made = not node.all_input_nodes and is_call(node, *MADE)
    if not (known or node.target is operator.getitem) or not (node.all_input_nodes or made):
        return None
    if any(maker not in held for maker in node.all_input_nodes):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _forget(module: GraphModule) -> None:
    """Let go of the tensors that the graph does not read."""
    names = (str(node.target).rpartition(".") for node in module.graph.nodes if node.op == "get_attr")
    read = {(module.get_submodule(owner), own) for owner, _, own in names}
    for part in list(module.modules()):
        for own in [*part._parameters, *part._buffers]:
            if (part, own) not in read:
                delattr(part, own)
