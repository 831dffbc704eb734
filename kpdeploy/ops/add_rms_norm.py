"""add_rms_norm: the residual sum, and its RMS norm over the last dim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import rms_norm
from kpdeploy.ops.op import Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum), sum = x + residual, both [..., N]: no broadcasting. The norm is of the unrounded sum."""
    total = x.double() + residual.double()
    return rms_norm.reference(total, weight, eps).to(x.dtype), total.to(x.dtype)


def fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


ONNX_BODY = """
AddRmsNorm <eps> (x, residual, weight) => (normalized, sum) {
    sum = Add (x, residual)
    squares = Mul (sum, sum)
    last = Constant <value_ints = [-1]> ()
    mean = ReduceMean (squares, last)
    eps = Constant <value_float: float = @eps> ()
    eps_like = CastLike (eps, sum)
    shifted = Add (mean, eps_like)
    deviation = Sqrt (shifted)
    ratio = Div (sum, deviation)
    normalized = Mul (ratio, weight)
}
"""


ADD_RMS_NORM = Op(
    name="add_rms_norm",
    schema="add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normalized, Tensor sum)",
    onnx="AddRmsNorm",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
