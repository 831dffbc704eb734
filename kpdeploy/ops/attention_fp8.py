"""attention_fp8: attention whose result is 8-bit, for a product that reads it so. Queries, keys and values are not.

On GPUs and in torch alone. fp8_attention, on the other hand, multiplies in 8 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import attention, fp8_quantize
from kpdeploy.ops.op import gpu_op

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
    out_scale: Tensor,
) -> Tensor:
    """attention(…) / out_scale, saturated, as float8_e4m3fn; out_scale is float32, one element.

    What is quantized is attention's unrounded result.
    """
    out = attention.reference(query.double(), key, value, lengths, heads, kv_heads, scale, causal)
    return fp8_quantize.reference(out, out_scale)


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
    out_scale: Tensor,
) -> Tensor:
    return fp8_quantize.fake(query, out_scale)


ATTENTION_FP8 = gpu_op(
    name="attention_fp8",
    schema="attention_fp8(Tensor query, Tensor key, Tensor value, Tensor? lengths, int heads, int kv_heads, "
    "float scale, bool causal, Tensor out_scale) -> Tensor",
    reference=reference,
    fake=fake,
)
