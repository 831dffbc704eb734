"""fp8_add_layer_norm: the residual sum, its layer norm over the last dim, and that as 8-bit floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import add_layer_norm, fp8_quantize
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(add_layer_norm(sum), sum, add_layer_norm(sum) / out_scale as float8_e4m3fn), sum = x + residual, all [..., N].

    The norm is of the unrounded sum, and what is quantized is the unrounded norm. out_scale is float32, one element.
    """
    normalized, total = add_layer_norm.reference(x.double(), residual, weight, bias, eps)
    return normalized.to(x.dtype), total.to(x.dtype), fp8_quantize.reference(normalized, out_scale)


def fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), fp8_quantize.fake(x, out_scale)


FP8_ADD_LAYER_NORM = gpu_op(
    name="fp8_add_layer_norm",
    schema="fp8_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> "
    "(Tensor normalized, Tensor sum, Tensor quantized)",
    reference=reference,
    fake=fake,
)
