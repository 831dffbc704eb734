"""attention_add_layer_norm: attention, a linear of its result, the residual sum, and that sum's layer norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import add_layer_norm, attention, linear_activation, packed_attention
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def attended_by(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """attention or packed_attention, in float64."""
    rest = (heads, heads, scale, causal)
    if offsets is not None:
        return packed_attention.reference(query.double(), key, value, offsets, *rest)
    return attention.reference(query.double(), key, value, lengths, *rest)


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
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(sum), sum), sum = attention · weightᵀ + bias + residual, both [B, S, N].

    query [B, S, heads·D], key and value [B, Sk, heads·D], weight [N, heads·D], residual [B, S, N]; all else as in
    attention, linear_activation and add_layer_norm. With `offsets` sequences are packed in one row, as in
    packed_attention, and there are no `lengths`.
    """
    attended = attended_by(query, key, value, lengths, offsets, heads, scale, causal)
    product = linear_activation.reference(attended, weight, None if bias is None else bias.double(), "none")
    normalized, total = add_layer_norm.reference(product, residual, norm_weight, norm_bias, eps)
    return normalized.to(query.dtype), total.to(query.dtype)


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
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return add_layer_norm.fake(residual, residual, norm_weight, norm_bias, eps)


ATTENTION_ADD_LAYER_NORM = gpu_op(
    name="attention_add_layer_norm",
    schema="attention_add_layer_norm(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? offsets, "
    "int heads, float scale, bool causal, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, "
    "Tensor? norm_bias, float eps) -> (Tensor normalized, Tensor sum)",
    reference=reference,
    fake=fake,
)
