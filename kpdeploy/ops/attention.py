"""attention: softmax(scale · Q Kᵀ) V for packed heads, with lengths in place of a padding mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """[B, Sq, heads·D] from query [B, Sq, heads·D] and key, value [B, Sk, kv_heads·D]; D is 1 to 256.

    `lengths`, int64 [B]: how many leading keys of each row count, 0 to Sk; None: all. It bounds the keys only: every
    query row is computed, so that padded rows come out as the unmodified model computes them (Sq = Sk does not tell a
    self-attention from a cross-attention). `causal`: query i sees keys j ≤ i + Sk - Sq. A query that sees no key
    gives 0.
    """
    import torch

    def split(tensor: Tensor, count: int) -> Tensor:
        batch, length, width = tensor.shape
        per_head = tensor.double().reshape(batch, length, count, width // count).transpose(1, 2)
        return per_head.repeat_interleave(heads // count, dim=1)

    q, k, v = split(query, heads), split(key, kv_heads), split(value, kv_heads)
    queries, keys = query.shape[1], key.shape[1]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(keys - queries)
    visible = visible.expand(query.shape[0], 1, queries, keys)
    if lengths is not None:
        visible = visible & (torch.arange(keys, device=query.device) < lengths[:, None, None, None])
    weights = (q @ k.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    return (weights @ v).transpose(1, 2).flatten(2).to(query.dtype)


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    return query.new_empty(query.shape)


HEADS = """\
    query_heads = Transpose <perm = [0, 2, 3, 1, 4]> (query_rows)
    key_heads = Transpose <perm = [0, 2, 3, 1]> (key_rows)
    value_heads = Transpose <perm = [0, 2, 1, 3]> (value_rows)
    two = Constant <value_ints = [2]> ()
    key_columns = Unsqueeze (key_heads, two)
    value_columns = Unsqueeze (value_heads, two)
"""
"""Lines of a function of ONNX: rows of packed heads as matrices of each head, keys transposed."""

ATTEND = """\
    scale = Constant <value_float: float = @scale> ()
    scale_like = CastLike (scale, query)
    lowest = Constant <value_float = -3.3e38> ()
    lowest_like = CastLike (lowest, query)
    nothing = Constant <value_float = 0.0> ()
    nothing_like = CastLike (nothing, query)
    products = MatMul (query_heads, key_columns)
    scores = Mul (products, scale_like)
    masked = Where (visible, scores, lowest_like)
    weights = Softmax <axis = -1> (masked)
    kept = Where (visible, weights, nothing_like)
    mixed = MatMul (kept, value_columns)
"""
"""Lines of a function of ONNX: the softmax of what is `visible`, times the values. A query that sees nothing gives
0."""

ONNX_BODY = (
    """
Attention <heads, kv_heads, scale, causal> (query, key, value, lengths) => (out) {
    one = Constant <value_int = 1> ()
    zero = Constant <value_int = 0> ()
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    heads = Constant <value_int: int = @heads> ()
    kv_heads = Constant <value_int: int = @kv_heads> ()
    group = Div (heads, kv_heads)
    kv_heads_1 = Reshape (kv_heads, last)
    group_1 = Reshape (group, last)
    batch = Shape <start = 0, end = 1> (query)
    queries_1 = Shape <start = 1, end = 2> (query)
    keys_1 = Shape <start = 1, end = 2> (key)
    queries = Squeeze (queries_1, first)
    keys = Squeeze (keys_1, first)

    grouped = Concat <axis = 0> (batch, queries_1, kv_heads_1, group_1, last)
    split = Concat <axis = 0> (batch, keys_1, kv_heads_1, last)
    query_rows = Reshape (query, grouped)
    key_rows = Reshape (key, split)
    value_rows = Reshape (value, split)
"""
    + HEADS
    + """\

    row = Range (zero, queries, one)
    column = Range (zero, keys, one)
    row_1 = Unsqueeze (row, last)
    behind = Sub (keys, queries)
    newest = Add (row_1, behind)
    seen_causally = LessOrEqual (column, newest)
    causal = Constant <value_int: int = @causal> ()
    not_causal = Equal (causal, zero)
    seen = Or (seen_causally, not_causal)
    all_keys = Expand (keys, batch)
    padded = Concat <axis = 0> (lengths, all_keys)
    bounds = Slice (padded, first, batch)
    inner = Constant <value_ints = [1, 2, 3, 4]> ()
    bound = Unsqueeze (bounds, inner)
    counted = Less (column, bound)
    visible = And (seen, counted)

"""
    + ATTEND
    + """\
    rows = Transpose <perm = [0, 3, 1, 2, 4]> (mixed)
    whole = Shape (query)
    out = Reshape (rows, whole)
}
"""
)
"""Queries are [B, kv_heads, group, Sq, D], keys and values [B, kv_heads, 1, Sk, D]."""


ATTENTION = Op(
    name="attention",
    schema="attention(Tensor query, Tensor key, Tensor value, Tensor? lengths, int heads, int kv_heads, float scale, "
    "bool causal) -> Tensor",
    onnx="Attention",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
