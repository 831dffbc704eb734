"""fp8_layer_norm: layer norm over the last dim, and that as 8-bit floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_quantize, layer_norm
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(layer_norm(x), layer_norm(x) / out_scale as float8_e4m3fn), both [..., N]. out_scale is float32, one element."""
    normalized = layer_norm.reference(x.double(), weight, bias, eps)
    return normalized.to(x.dtype), fp8_quantize.reference(normalized, out_scale)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), fp8_quantize.fake(x, out_scale)


FP8_LAYER_NORM = gpu_op(
    name="fp8_layer_norm",
    schema="fp8_layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> "
    "(Tensor normalized, Tensor quantized)",
    reference=reference,
    fake=fake,
)
