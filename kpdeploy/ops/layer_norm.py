"""layer_norm over the last dim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import SHIFT, Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """[..., N] from x [..., N], weight [N] and bias [N] or None."""
    from torch.nn import functional

    shift = None if bias is None else bias.double()
    return functional.layer_norm(x.double(), x.shape[-1:], weight.double(), shift, eps).to(x.dtype)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


ONNX_BODY = (
    """
LayerNorm <eps> (x, weight, bias) => (out) {
"""
    + SHIFT
    + """\
    out = LayerNormalization <axis = -1, epsilon: float = @eps> (x, weight, shift)
}
"""
)


LAYER_NORM = Op(
    name="layer_norm",
    schema="layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    onnx="LayerNorm",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
