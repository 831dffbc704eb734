"""rms_norm over the last dim: x / sqrt(mean(x²) + eps) · weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., N] from x [..., N] and weight [N]."""
    wide = x.double()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(x.dtype)


def fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


ONNX_BODY = """
RmsNorm <eps> (x, weight) => (out) {
    squares = Mul (x, x)
    last = Constant <value_ints = [-1]> ()
    mean = ReduceMean (squares, last)
    eps = Constant <value_float: float = @eps> ()
    eps_like = CastLike (eps, x)
    shifted = Add (mean, eps_like)
    deviation = Sqrt (shifted)
    ratio = Div (x, deviation)
    out = Mul (ratio, weight)
}
"""


RMS_NORM = Op(
    name="rms_norm",
    schema="rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    onnx="RmsNorm",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
