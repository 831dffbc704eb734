"""fp8_quantize: x over a scale, as 8-bit floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
"""Of float8_e4m3fn: what is beyond is given as this."""


def reference(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, saturated: float8_e4m3fn [..., N] from x [..., N] of any float dtype and a scale of one element."""
    import torch

    return (x.double() / scale.double()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def fake(x: Tensor, scale: Tensor) -> Tensor:
    import torch

    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn)


FP8_QUANTIZE = gpu_op(
    name="fp8_quantize",
    schema="fp8_quantize(Tensor x, Tensor scale) -> Tensor",
    reference=reference,
    fake=fake,
)
