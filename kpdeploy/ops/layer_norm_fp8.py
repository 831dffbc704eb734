"""layer_norm_fp8: layer norm over the last dim, as 8-bit floats alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_layer_norm
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor) -> Tensor:
    """layer_norm(x) / out_scale as float8_e4m3fn, [..., N]: fp8_layer_norm without the norm in x's dtype."""
    return fp8_layer_norm.reference(x, weight, bias, eps, out_scale)[1]


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_scale: Tensor) -> Tensor:
    return fp8_layer_norm.fake(x, weight, bias, eps, out_scale)[1]


LAYER_NORM_FP8 = gpu_op(
    name="layer_norm_fp8",
    schema="layer_norm_fp8(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> Tensor",
    reference=reference,
    fake=fake,
)
