"""packed_attention: attention of sequences that lie one after the other, with no padding between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import attention
from kpdeploy.ops.op import Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """[1, T, heads·D] from query [1, T, heads·D] and key, value [1, T, kv_heads·D]; D is 1 to 256.

    `offsets`, int64 [B + 1], 0 = offsets[0] ≤ offsets[1] ≤ … ≤ offsets[B] ≤ T: sequence b is rows offsets[b] to
    offsets[b + 1] of all of them, and its queries see its own keys alone; `causal`: up to themselves. Rows from
    offsets[B] on, as a batch has that was filled up to one of few sizes, give 0.
    """
    import torch

    out = torch.zeros_like(query)
    for first, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = slice(first, end)
        out[:, rows] = attention.reference(
            query[:, rows], key[:, rows], value[:, rows], None, heads, kv_heads, scale, causal
        )
    return out


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    return query.new_empty(query.shape)


PLACES = ("sources", "targets", "offsets")
"""The inputs, all int64, that tell a program without padding where tokens are, where it does not look for them
itself: `sources` [T], their places in the batch, counted over its rows; `targets` [T], the same, where B * S is for a
token that belongs nowhere; `offsets` [B + 1], where the tokens of each row begin."""

ONNX_BODY = """
PackedAttention <heads, kv_heads, scale, causal> (query, key, value, offsets) => (out) {
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
    rows_1 = Shape <start = 1, end = 2> (query)
    rows = Squeeze (rows_1, first)
    width = Shape <start = 2, end = 3> (key)
    size = Div (width, kv_heads_1)

    grouped = Concat <axis = 0> (batch, rows_1, kv_heads_1, group_1, size)
    split = Concat <axis = 0> (batch, rows_1, kv_heads_1, size)
    query_rows = Reshape (query, grouped)
    key_rows = Reshape (key, split)
    value_rows = Reshape (value, split)
    query_heads = Transpose <perm = [0, 2, 3, 1, 4]> (query_rows)
    key_heads = Transpose <perm = [0, 2, 3, 1]> (key_rows)
    value_heads = Transpose <perm = [0, 2, 1, 3]> (value_rows)
    two = Constant <value_ints = [2]> ()
    key_columns = Unsqueeze (key_heads, two)
    value_columns = Unsqueeze (value_heads, two)

    column = Range (zero, rows, one)
    row = Unsqueeze (column, last)
    begun = LessOrEqual (offsets, row)
    counted = Cast <to = 7> (begun)
    of_row_1 = ReduceSum (counted, last)
    of_row = Squeeze (of_row_1, last)
    all_1 = Shape (offsets)
    all = Squeeze (all_1, first)
    in_one = Less (of_row_1, all)
    same = Equal (of_row_1, of_row)
    own = And (same, in_one)
    seen_causally = LessOrEqual (column, row)
    causal = Constant <value_int: int = @causal> ()
    not_causal = Equal (causal, zero)
    seen = Or (seen_causally, not_causal)
    visible = And (own, seen)

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
    joined = Transpose <perm = [0, 3, 1, 2, 4]> (mixed)
    whole = Shape (query)
    out = Reshape (joined, whole)
}
"""
"""Queries are [1, kv_heads, group, T, D], keys and values [1, kv_heads, 1, T, D]. `of_row`: how many offsets are at or
before a row, so that rows of one sequence have one number, and those behind the last one the number of all."""


PACKED_ATTENTION = Op(
    name="packed_attention",
    schema="packed_attention(Tensor query, Tensor key, Tensor value, Tensor offsets, int heads, int kv_heads, "
    "float scale, bool causal) -> Tensor",
    onnx="PackedAttention",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
