"""fp8_attention_add_layer_norm: the same with a product of 8-bit floats, and its result in such, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import attention_add_layer_norm, fp8_add_layer_norm, fp8_quantize, linear_activation
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    out_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(layer_norm(sum), sum, layer_norm(sum) / out_scale as float8_e4m3fn), all [B, S, N].

    weight is float8_e4m3fn [N, heads·D], and attention's result over x_scale becomes such; weight_scale and bias as in
    fp8_linear_activation, out_scale as in fp8_add_layer_norm, all else as in attention_add_layer_norm.
    """
    attended = attention_add_layer_norm.attended_by(query, key, value, lengths, offsets, heads, scale, causal)
    x = fp8_quantize.reference(attended, x_scale)
    wide = (weight.double() * weight_scale.double().reshape(-1, 1), None if bias is None else bias.double())
    product = linear_activation.reference(x.double() * x_scale.double(), *wide, "none")
    normalized, total, quantized = fp8_add_layer_norm.reference(
        product, residual, norm_weight, norm_bias, eps, out_scale
    )
    return normalized.to(query.dtype), total.to(query.dtype), quantized


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    out_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return fp8_add_layer_norm.fake(residual, residual, norm_weight, norm_bias, eps, out_scale)


FP8_ATTENTION_ADD_LAYER_NORM = gpu_op(
    name="fp8_attention_add_layer_norm",
    schema="fp8_attention_add_layer_norm(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? offsets, "
    "int heads, float scale, bool causal, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, "
    "Tensor residual, Tensor norm_weight, Tensor? norm_bias, float eps, Tensor out_scale) -> "
    "(Tensor normalized, Tensor sum, Tensor quantized)",
    reference=reference,
    fake=fake,
    dtypes=("bfloat16",),
)
