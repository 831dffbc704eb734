"""linear_add: x Wᵀ + bias + residual, as a layer's output is added to what goes past it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import linear_activation
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """[..., N] from x [..., K], weight [N, K], bias [N] or None and residual [..., N]: added before the rounding."""
    product = linear_activation.reference(x.double(), weight.double(), None if bias is None else bias.double(), "none")
    return (product + residual.double()).to(x.dtype)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return linear_activation.fake(x, weight, bias, "none")


LINEAR_ADD = gpu_op(
    name="linear_add",
    schema="linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    reference=reference,
    fake=fake,
)
