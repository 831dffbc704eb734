"""packed_attention_fp8: packed_attention whose result is 8-bit, for a product that reads it so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_quantize, packed_attention
from kpdeploy.ops.op import gpu_op

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
    out_scale: Tensor,
) -> Tensor:
    """packed_attention(…) / out_scale, saturated, as float8_e4m3fn; out_scale is float32, one element.

    What is quantized is the unrounded result.
    """
    out = packed_attention.reference(query.double(), key, value, offsets, heads, kv_heads, scale, causal)
    return fp8_quantize.reference(out, out_scale)


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
    out_scale: Tensor,
) -> Tensor:
    return fp8_quantize.fake(query, out_scale)


PACKED_ATTENTION_FP8 = gpu_op(
    name="packed_attention_fp8",
    schema="packed_attention_fp8(Tensor query, Tensor key, Tensor value, Tensor offsets, int heads, int kv_heads, "
    "float scale, bool causal, Tensor out_scale) -> Tensor",
    reference=reference,
    fake=fake,
)
