"""Looking at an exported graph and changing it: the few words in which the fusions are written."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import Max, Min

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Match:
    """A place where a fusion applies: `apply` rewrites the graph there."""

    node: Node
    apply: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A place that looks like the fusion's pattern and is not, for `reason`."""

    node: Node
    reason: str


Finding = Match | Refusal


def calls(graph: torch.fx.Graph, *targets: Any) -> Iterator[Node]:
    """The nodes that call one of the operators, in order. The graph may change while they are walked."""
    for node in list(graph.nodes):
        if is_call(node, *targets):
            yield node


def is_call(value: Any, *targets: Any) -> bool:
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def name_of(node: Any) -> str:
    """The operator that a node calls, such as "aten::linear"; empty for what is none."""
    known = isinstance(node, Node) and isinstance(node.target, torch._ops.OpOverload)
    return str(node.target._schema.name) if known else ""


def shape(node: Node) -> tuple[Any, ...]:
    """The shape of a node's tensor: ints, and SymInts for dynamic axes."""
    return tuple(node.meta["val"].shape)


def same_shape(a: Node, b: Node) -> bool:
    one, two = shape(a), shape(b)
    return len(one) == len(two) and all(statically_known_true(m == n) for m, n in zip(one, two, strict=True))


def same_size(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def dtype(node: Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


def used_once(node: Node) -> bool:
    return len(node.users) == 1


def argument(node: Any, name: str, default: Any = None) -> Any:
    """An argument of an operator call by its name in the schema, however it was passed."""
    if name in node.kwargs:
        return node.kwargs[name]
    for index, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            if index < len(node.args):
                return node.args[index]
            return declared.default_value if default is None else default
    return default


FIRST, LAST = (0, 1), (-1, 2**63 - 1)
"""One row, as torch's slices count them."""


def row_read(node: Any) -> tuple[int, int] | None:
    """The one row, FIRST or LAST, that a node takes of each sequence of [B, S, N]; None: it does something else."""
    if not is_call(node, aten.select.int, aten.slice.Tensor):
        return None
    if len(shape(node.args[0])) != 3 or argument(node, "dim") != 1:
        return None
    if node.target is aten.select.int:
        return {0: FIRST, -1: LAST}.get(node.args[2])
    found = (argument(node, "start"), argument(node, "end"))
    return found if found in (FIRST, LAST) and argument(node, "step") == 1 else None


def parameter(module: GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor of the module that a node reads; None if it is computed."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found = operator.attrgetter(str(node.target))(module)
    return found if isinstance(found, torch.Tensor) else None


def insert(before: Node, target: Any, args: tuple[Any, ...], like: Node | None = None) -> Node:
    """A new call before a node; `like` is the node whose tensor it takes the place of."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    if like is not None:
        node.meta["val"] = like.meta["val"]
    return node


def take(before: Node, pair: Node, index: int, like: Node) -> Node:
    """One of the results of an operator that gives several."""
    return insert(before, operator.getitem, (pair, index), like)


def sweep(module: GraphModule) -> None:
    """Remove what nothing uses, and make the module's code anew."""
    module.graph.eliminate_dead_code(is_impure_node=_matters)
    module.graph.lint()
    module.recompile()


def _matters(node: Node) -> bool:
    """Must a node stay that nothing uses? Attention need not, though torch takes it for random: it could drop out."""
    return node.is_impure() and not is_call(node, aten.scaled_dot_product_attention.default)


def drop_identities(module: GraphModule) -> None:
    """Take out calls that give their input back: dropout in evaluation, casts to the same dtype, views to the same
    shape, products with 1 and sums with 0; and assertions of what the capture has settled."""
    for node in list(module.graph.nodes):
        if _is_settled(node):
            module.graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_settled(node: Any) -> bool:
    """An assertion of what the capture has shown, or one about sizes that holds for all sizes."""
    if not is_call(node, aten._assert_scalar.default):
        guards = node.op == "call_module" and node.target == "_guards_fn"
        return guards or is_call(node, aten._assert_tensor_metadata.default)
    said = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    if not isinstance(said, torch.SymBool):
        return False
    # torch believes what is asserted, and its own minimum does not compare 64·s with 256·s, as strides of repeated
    # heads are compared: SymPy's does.
    return bool(said.node.expr.replace(Min, sympy.Min).replace(Max, sympy.Max) is sympy.true)


_NEUTRAL = {aten.mul.Tensor: 1, aten.add.Tensor: 0}
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten.expand.default)


def _is_identity(node: Any) -> bool:
    if is_call(node, aten.dropout.default):
        return not node.args[2]
    if is_call(node, aten.alias.default, aten.detach.default, aten.detach_.default):
        return True
    neutral = is_call(node, *_NEUTRAL) and node.args[1] == _NEUTRAL[node.target]
    if neutral or is_call(node, *_CASTS):
        source = node.args[0]
        return isinstance(source, Node) and dtype(source) == dtype(node)
    if is_call(node, *_VIEWS):
        source = node.args[0]
        return isinstance(source, Node) and same_shape(source, node)
    return False
