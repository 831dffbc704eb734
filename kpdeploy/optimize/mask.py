"""What an attention mask means: nothing, causal, a padding of known lengths, or something that no kernel here knows.

A mask is a small computation on sizes and on the padding mask that the user gives. Its meaning is found by running that
computation on a few random padded batches, not by recognizing how one release of one library writes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Graph, GraphModule, Node

from kpdeploy.inputs import proof_points, sample
from kpdeploy.signature import Signature


@dataclass(frozen=True)
class Meaning:
    """`lengths`: the input whose sum over its last axis is the number of keys; None: all keys count."""

    causal: bool
    lengths: Node | None


def meaning(module: GraphModule, mask: Node, signature: Signature) -> Meaning | str:
    """What the mask says about keys and queries, or why it cannot be said by lengths and causality."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    needed = _needed(mask)
    padding = [
        node
        for node, spec in zip(placeholders, signature.inputs, strict=True)
        if spec.values is not None and spec.values.kind == "prefix_mask" and node in needed
    ]
    if len(padding) > 1:
        return "its mask mixes several padding masks"
    program = _program(module, mask, needed)
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    rng = np.random.default_rng(0)
    for point in proof_points(signature, rng)[1:4] or [{}]:
        arrays = [torch.from_numpy(a) for a in sample(signature, point, rng).values()]
        try:
            found = program(*arrays)
        except Exception as error:
            return f"its mask cannot be computed alone ({type(error).__name__})"
        visible = _visible(found)
        if visible is None:
            return "it adds a bias that is no mask, such as relative positions"
        length = arrays[placeholders.index(padding[0])].sum(-1) if padding else None
        seen.append((visible, length))
    for causal in (False, True):
        for by_length in (False, True):
            if by_length and not padding:
                continue
            if all(_equal(v, causal=causal, lengths=n if by_length else None) for v, n in seen):
                return Meaning(causal, padding[0] if by_length else None)
    return "its mask is neither causal nor a padding of known lengths"


def _needed(node: Node) -> set[Node]:
    found, pending = {node}, [node]
    while pending:
        for maker in pending.pop().all_input_nodes:
            if maker not in found:
                found.add(maker)
                pending.append(maker)
    return found


def _program(module: GraphModule, mask: Node, needed: set[Node]) -> GraphModule:
    """The part of the graph that makes the mask, as a module of all inputs."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            # The exported module's inputs come through a pytree; here they are plain.
            copies[node].target = copies[node].name if node.op == "placeholder" else node.target
    graph.output(copies[mask])
    return GraphModule(module, graph)


def _visible(mask: torch.Tensor) -> torch.Tensor | None:
    """True where a key is seen; None where the mask is more than that."""
    if mask.dtype is torch.bool:
        return mask
    seen, hidden = mask == 0, mask <= torch.finfo(torch.float16).min
    return seen if bool((seen | hidden).all()) else None


def _equal(visible: torch.Tensor, *, causal: bool, lengths: torch.Tensor | None) -> bool:
    queries, keys = visible.shape[-2:]
    if causal and queries == 1 and keys != 1:
        return False
    expected = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        expected = expected.tril(keys - queries)
    if lengths is not None:
        expected = expected & (torch.arange(keys) < lengths[:, None, None, None])
    shape = torch.broadcast_shapes(expected.shape, visible.shape)
    return bool(torch.equal(visible.expand(shape), expected.expand(shape)))
