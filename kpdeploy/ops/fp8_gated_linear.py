"""fp8_gated_linear: SiLU(x Wgᵀ) · (x Wuᵀ) of 8-bit x and weights; the output may be 8-bit for the next layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_quantize, gated_linear
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    x_scale: Tensor,
    gate_scale: Tensor,
    up_scale: Tensor,
    out_scale: Tensor | None,
) -> Tensor:
    """[..., N] from x [..., K] and two weights [N, K], all float8_e4m3fn.

    Scales are as in fp8_linear_activation: of one element, or one a row of x and of each weight. Gives bfloat16; with
    out_scale (one element) float8_e4m3fn, of the result divided by it.
    """
    import torch

    gate = gate_weight.double() * gate_scale.double().reshape(-1, 1)
    up = up_weight.double() * up_scale.double().reshape(-1, 1)
    out = gated_linear.reference(x.double() * x_scale.double(), gate, up)
    return out.to(torch.bfloat16) if out_scale is None else fp8_quantize.reference(out, out_scale)


def fake(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    x_scale: Tensor,
    gate_scale: Tensor,
    up_scale: Tensor,
    out_scale: Tensor | None,
) -> Tensor:
    import torch

    dtype = torch.bfloat16 if out_scale is None else torch.float8_e4m3fn
    return x.new_empty((*x.shape[:-1], up_weight.shape[0]), dtype=dtype)


FP8_GATED_LINEAR = gpu_op(
    name="fp8_gated_linear",
    schema="fp8_gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor x_scale, Tensor gate_scale, "
    "Tensor up_scale, Tensor? out_scale) -> Tensor",
    reference=reference,
    fake=fake,
    dtypes=("float8_e4m3fn",),
)
