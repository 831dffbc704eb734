"""add_layer_norm: the residual sum, and its layer norm over the last dim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops import layer_norm
from kpdeploy.ops.op import SHIFT, Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(sum), sum), sum = x + residual, both [..., N]: no broadcasting. The norm is of the unrounded sum."""
    total = x.double() + residual.double()
    return layer_norm.reference(total, weight, bias, eps).to(x.dtype), total.to(x.dtype)


def fake(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


ONNX_BODY = (
    """
AddLayerNorm <eps> (x, residual, weight, bias) => (normalized, sum) {
"""
    + SHIFT
    + """\
    sum = Add (x, residual)
    normalized = LayerNormalization <axis = -1, epsilon: float = @eps> (sum, weight, shift)
}
"""
)


ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    schema="add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> "
    "(Tensor normalized, Tensor sum)",
    onnx="AddLayerNorm",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
