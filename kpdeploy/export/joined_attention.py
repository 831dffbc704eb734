"""Attention in ONNX to queries, keys and values that one product gave: they stay side by side in one tensor.

ONNX Runtime's tensors have no strides, so that a Split in front of attention copies all three. The op library takes
them as they are, by an op that is ONNX's alone: com.kpdeploy:JoinedAttention.
"""

from __future__ import annotations

from typing import Any

from kpdeploy.ops import ONNX_DOMAIN

NAME = "JoinedAttention"

BODY = """
JoinedAttention <heads, kv_heads, scale, causal> (joined, lengths) => (out) {
    last = Constant <value_ints = [-1]> ()
    two = Constant <value_int = 2> ()
    heads = Constant <value_int: int = @heads> ()
    kv_heads = Constant <value_int: int = @kv_heads> ()
    kv_twice = Mul (kv_heads, two)
    parts = Add (heads, kv_twice)
    width = Shape <start = -1> (joined)
    size = Div (width, parts)
    own = Mul (size, heads)
    other = Mul (size, kv_heads)
    sizes = Concat <axis = 0> (own, other, other)
    query, key, value = Split <axis = -1> (joined, sizes)
    out = com.kpdeploy.Attention <heads: int = @heads, kv_heads: int = @kv_heads, scale: float = @scale,
        causal: int = @causal> (query, key, value, lengths)
}
"""
"""[B, S, heads·D] from `joined` [B, S, (heads + 2 kv_heads)·D], as the op `attention` gives it for the three parts."""


def join(graph: Any) -> int:
    """Replace each Split whose parts are one attention's, and nobody else's, by an attention to the whole, in place.
    Returns how many there were."""
    import onnx_ir as ir

    found = [(node, split) for node in graph if (split := _split_of(node)) is not None]
    sizes = {value for _, split in found for value in split.inputs[1:] if value is not None}
    for node, split in found:
        joined = ir.node(
            NAME,
            [split.inputs[0], node.inputs[3]],
            attributes=dict(node.attributes),
            domain=ONNX_DOMAIN,
            name=node.name,
        )
        joined.outputs[0].dtype, joined.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
        joined.outputs[0].name = node.outputs[0].name
        graph.insert_before(node, [joined])
        ir.convenience.replace_all_uses_with(node.outputs[0], joined.outputs[0], replace_graph_outputs=True)
        graph.remove([node, split], safe=True)
    for value in sizes:
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(value.name)
    return len(found)


def _split_of(node: Any) -> Any:
    """The Split in front of an attention that can go."""
    if (node.domain, node.op_type) != (ONNX_DOMAIN, "Attention"):
        return None
    parts = node.inputs[:3]
    split = parts[0].producer() if parts[0] is not None else None
    if split is None or split.op_type != "Split" or tuple(parts) != tuple(split.outputs):
        return None
    whole, sizes = split.inputs[0], _sizes_of(split)
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    if sizes is None or whole.shape is None or axis not in (-1, len(whole.shape) - 1):
        return None
    heads, kv_heads = (node.attributes[name].as_int() for name in ("heads", "kv_heads"))
    own, key, value = sizes
    one_size = key == value and own * kv_heads == key * heads
    alone = all(len(part.uses()) == 1 and not part.is_graph_output() for part in parts)
    return split if one_size and alone else None


def _sizes_of(split: Any) -> list[int] | None:
    """The sizes of a Split's three parts, where they are known."""
    if len(split.inputs) > 1:
        known = split.inputs[1].const_value
        return None if known is None else [int(size) for size in known.numpy()]
    shape = split.inputs[0].shape
    width = shape[-1] if shape is not None else None
    return [width // 3] * 3 if isinstance(width, int) and width % 3 == 0 else None
