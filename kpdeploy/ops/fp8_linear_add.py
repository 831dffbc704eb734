"""fp8_linear_add: linear_add of 8-bit x and W, each times its scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_linear_activation, linear_add
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """[..., N] in bfloat16 from x [..., K] and weight [N, K], both float8_e4m3fn, and bias [N] or None and residual
    [..., N], both bfloat16; scales as in fp8_linear_activation."""
    wide = x.double() * x_scale.double(), weight.double() * weight_scale.double().reshape(-1, 1)
    return linear_add.reference(*wide, bias, residual).to(residual.dtype)


def fake(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    return fp8_linear_activation.fake(x, weight, x_scale, weight_scale, bias, None, "none")


FP8_LINEAR_ADD = gpu_op(
    name="fp8_linear_add",
    schema="fp8_linear_add(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, "
    "Tensor residual) -> Tensor",
    reference=reference,
    fake=fake,
    dtypes=("float8_e4m3fn",),
)
