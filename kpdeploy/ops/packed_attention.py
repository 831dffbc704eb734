"""packed_attention: attention of sequences that lie one after the other, with no padding between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import attention
from kpdeploy.ops.attention import ATTEND, HEADS
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
itself: `sources` [T], T at least 1, their places in the batch, counted over its rows; `targets` [T], the same, where
B * S is for a token that belongs nowhere; `offsets` [B + 1], where the tokens of each row begin."""

ONNX_BODY = (
    """
PackedAttention <heads, kv_heads, scale, causal> (query, key, value, offsets) => (out) {
    one = Constant <value_int = 1> ()
    zero = Constant <value_int = 0> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    beyond = Constant <value_ints = [9223372036854775807]> ()
    heads = Constant <value_int: int = @heads> ()
    kv_heads = Constant <value_int: int = @kv_heads> ()
    group = Div (heads, kv_heads)
    kv_heads_1 = Reshape (kv_heads, last)
    group_1 = Reshape (group, last)
    rows_1 = Shape <start = 1, end = 2> (query)
    rows = Squeeze (rows_1, first)
    query_width = Shape <start = 2, end = 3> (query)
    width = Shape <start = 2, end = 3> (key)
    size = Div (width, kv_heads_1)

    starts = Slice (offsets, first, last)
    ends = Slice (offsets, second, beyond)
    counts = Sub (ends, starts)
    at_least_one = Concat <axis = 0> (counts, second)
    longest = ReduceMax <keepdims = 0> (at_least_one)
    longest_1 = Reshape (longest, last)
    batch_1 = Shape (starts)
    batch = Squeeze (batch_1, first)
    place = Range (zero, longest, one)
    start_1 = Unsqueeze (starts, last)
    count_1 = Unsqueeze (counts, last)
    real = Less (place, count_1)
    index_in_row = Add (start_1, place)
    index = Where (real, index_in_row, rows)

    row_more = Constant <value_ints = [0, 0, 0, 0, 1, 0]> ()
    query_more = Pad (query, row_more)
    key_more = Pad (key, row_more)
    value_more = Pad (value, row_more)
    query_batch = Gather <axis = 1> (query_more, index)
    key_batch = Gather <axis = 1> (key_more, index)
    value_batch = Gather <axis = 1> (value_more, index)
    grouped = Concat <axis = 0> (batch_1, longest_1, kv_heads_1, group_1, size)
    split = Concat <axis = 0> (batch_1, longest_1, kv_heads_1, size)
    query_rows = Reshape <allowzero = 1> (query_batch, grouped)
    key_rows = Reshape <allowzero = 1> (key_batch, split)
    value_rows = Reshape <allowzero = 1> (value_batch, split)
"""
    + HEADS
    + """\

    row = Unsqueeze (place, last)
    seen_causally = LessOrEqual (place, row)
    causal = Constant <value_int: int = @causal> ()
    not_causal = Equal (causal, zero)
    seen = Or (seen_causally, not_causal)
    inner = Constant <value_ints = [1, 2, 3]> ()
    counted = Unsqueeze (real, inner)
    visible = And (seen, counted)

"""
    + ATTEND
    + """\
    joined = Transpose <perm = [0, 3, 1, 2, 4]> (mixed)

    places_1 = Mul (batch_1, longest_1)
    places = Squeeze (places_1, first)
    flat_shape = Concat <axis = 0> (places_1, query_width)
    flat = Reshape <allowzero = 1> (joined, flat_shape)
    place_more = Constant <value_ints = [0, 0, 1, 0]> ()
    flat_more = Pad (flat, place_more)
    token = Range (zero, rows, one)
    token_1 = Unsqueeze (token, last)
    ended = LessOrEqual (ends, token_1)
    ended_counts = Cast <to = 7> (ended)
    of_row = ReduceSum <keepdims = 0> (ended_counts, last)
    in_one = Less (of_row, batch)
    starts_more = Concat <axis = 0> (starts, first)
    begun = Gather (starts_more, of_row)
    column = Sub (token, begun)
    row_begin = Mul (of_row, longest)
    own = Add (row_begin, column)
    taken = Where (in_one, own, places)
    picked = Gather <axis = 0> (flat_more, taken)
    out = Unsqueeze (picked, first)
}
"""
)
"""Sequences become rows as long as the longest, one row or place more is zeros: memory as of a padded batch."""


PACKED_ATTENTION = Op(
    name="packed_attention",
    schema="packed_attention(Tensor query, Tensor key, Tensor value, Tensor offsets, int heads, int kv_heads, "
    "float scale, bool causal) -> Tensor",
    onnx="PackedAttention",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
