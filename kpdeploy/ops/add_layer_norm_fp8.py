"""add_layer_norm_fp8: the residual sum, and its layer norm over the last dim as 8-bit floats alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_add_layer_norm
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum, add_layer_norm(sum) / out_scale as float8_e4m3fn), sum = x + residual, both [..., N].

    fp8_add_layer_norm without the norm in x's dtype.
    """
    return fp8_add_layer_norm.reference(x, residual, weight, bias, eps, out_scale)[1:]


def fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor
) -> tuple[Tensor, Tensor]:
    return fp8_add_layer_norm.fake(x, residual, weight, bias, eps, out_scale)[1:]


ADD_LAYER_NORM_FP8 = gpu_op(
    name="add_layer_norm_fp8",
    schema="add_layer_norm_fp8(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> "
    "(Tensor sum, Tensor quantized)",
    reference=reference,
    fake=fake,
)
