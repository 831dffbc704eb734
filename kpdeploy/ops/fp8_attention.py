"""fp8_attention: attention of 8-bit queries, keys and values, its weights in 8 bits too; the output may be 8-bit.

On GPUs of compute capability 9.0 and in torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import attention, fp8_quantize
from kpdeploy.ops.fp8_attention_operands import KEYS, in_order
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    query8: Tensor,
    key8: Tensor,
    value8: Tensor,
    query_scale: Tensor,
    block_scale: Tensor,
    lengths: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """[B, Sq, heads·D] of what fp8_attention_operands gives; lengths and causal are as in attention, scale is above 0.

    Gives bfloat16; with out_scale (float32, one element) float8_e4m3fn, of the result divided by it. Exact but for
    that: kernels round the weights to float8_e4m3fn, which costs about 3 % of each.
    """
    import torch

    (heads, _, size), (kv_heads, keys) = query8.shape[1:], key8.shape[1:3]
    places = in_order(torch.arange(value8.shape[-1], device=value8.device)).argsort()[:keys]
    of_key = block_scale.double().repeat_interleave(KEYS, 2)[:, :, :keys]
    q = query8.double() * query_scale.double()[..., None]
    k = key8.double() * of_key[..., :1]
    v = value8.double()[..., places].mT * of_key[..., 1:2].exp2()
    q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    out = attention.reference(q, k, v, lengths, heads, kv_heads, scale / size, causal)
    return out.to(torch.bfloat16) if out_scale is None else fp8_quantize.reference(out, out_scale)


def fake(
    query8: Tensor,
    key8: Tensor,
    value8: Tensor,
    query_scale: Tensor,
    block_scale: Tensor,
    lengths: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    import torch

    batch, heads, queries, size = query8.shape
    dtype = torch.bfloat16 if out_scale is None else torch.float8_e4m3fn
    return query8.new_empty((batch, queries, heads * size), dtype=dtype)


FP8_ATTENTION = gpu_op(
    name="fp8_attention",
    schema="fp8_attention(Tensor query8, Tensor key8, Tensor value8, Tensor query_scale, Tensor block_scale, "
    "Tensor? lengths, Tensor? out_scale, float scale, bool causal) -> Tensor",
    reference=reference,
    fake=fake,
    dtypes=("float8_e4m3fn",),
)
