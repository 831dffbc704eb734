"""rms_norm_fp8: RMS norm over the last dim, as 8-bit floats alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_rms_norm
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float, out_scale: Tensor) -> Tensor:
    """rms_norm(x) / out_scale as float8_e4m3fn, [..., N]: fp8_rms_norm without the norm in x's dtype."""
    return fp8_rms_norm.reference(x, weight, eps, out_scale)[1]


def fake(x: Tensor, weight: Tensor, eps: float, out_scale: Tensor) -> Tensor:
    return fp8_rms_norm.fake(x, weight, eps, out_scale)[1]


RMS_NORM_FP8 = gpu_op(
    name="rms_norm_fp8",
    schema="rms_norm_fp8(Tensor x, Tensor weight, float eps, Tensor out_scale) -> Tensor",
    reference=reference,
    fake=fake,
)
