"""fp8_linear_activation: activation(x Wᵀ · scales + bias) of 8-bit x and W; the output may be 8-bit for the next layer.

On GPUs of compute capability 9.0 and in torch alone: ONNX Runtime has no kernel of 8-bit floats to stand in for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import fp8_quantize, linear_activation
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    activation: str,
) -> Tensor:
    """[..., N] from x [..., K] and weight [N, K], both float8_e4m3fn, and bias bfloat16 [N] or None.

    The float32 scales say what 1 stands for: one element, or one a row of x ([..., 1]), and of the weight ([N]). Gives
    bfloat16; with out_scale (float32, one element) float8_e4m3fn, of the result divided by it.
    """
    import torch

    wide_x = x.double() * x_scale.double()
    wide_weight = weight.double() * weight_scale.double().reshape(-1, 1)
    wide_bias = None if bias is None else bias.double()
    out = linear_activation.reference(wide_x, wide_weight, wide_bias, activation)
    return out.to(torch.bfloat16) if out_scale is None else fp8_quantize.reference(out, out_scale)


def fake(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    activation: str,
) -> Tensor:
    import torch

    dtype = torch.bfloat16 if out_scale is None else torch.float8_e4m3fn
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


FP8_LINEAR_ACTIVATION = gpu_op(
    name="fp8_linear_activation",
    schema="fp8_linear_activation(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, "
    "Tensor? out_scale, str activation) -> Tensor",
    reference=reference,
    fake=fake,
    dtypes=("float8_e4m3fn",),
)
