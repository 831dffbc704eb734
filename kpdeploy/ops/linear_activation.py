"""linear_activation: activation(x Wᵀ + bias)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import SHIFT, Op

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""gelu is x·Φ(x), by erf; gelu_tanh its tanh formula."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """[..., N] from x [..., K], weight [N, K] and bias [N] or None; `activation` is one of ACTIVATIONS."""
    from torch.nn import functional

    product = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    match activation:
        case "none":
            out = product
        case "relu":
            out = functional.relu(product)
        case "gelu":
            out = functional.gelu(product)
        case "gelu_tanh":
            out = functional.gelu(product, approximate="tanh")
        case "silu":
            out = functional.silu(product)
        case _:
            raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    return out.to(x.dtype)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


ONNX_BODY = (
    """
LinearActivation <activation> (x, weight, bias) => (out) {
    columns = Transpose <perm = [1, 0]> (weight)
    product = MatMul (x, columns)
"""
    + SHIFT
    + """\
    sum = Add (product, shift)
    chosen = Constant <value_string: string = @activation> ()
    none = Constant <value_string = "none"> ()
    relu = Constant <value_string = "relu"> ()
    gelu = Constant <value_string = "gelu"> ()
    gelu_tanh = Constant <value_string = "gelu_tanh"> ()
    is_none = Equal (chosen, none)
    is_relu = Equal (chosen, relu)
    is_gelu = Equal (chosen, gelu)
    is_gelu_tanh = Equal (chosen, gelu_tanh)
    out = If (is_gelu) <then_branch = by_erf () => (a) { a = Gelu (sum) }, else_branch = not_gelu () => (b) {
        b = If (is_relu) <then_branch = rectified () => (c) { c = Relu (sum) }, else_branch = not_relu () => (d) {
            d = If (is_gelu_tanh) <then_branch = by_tanh () => (e) {
                e = Gelu <approximate = "tanh"> (sum)
            }, else_branch = not_tanh () => (f) {
                f = If (is_none) <then_branch = linear () => (g) { g = Identity (sum) }, else_branch = silu () => (h) {
                    sigmoid = Sigmoid (sum)
                    h = Mul (sum, sigmoid)
                }>
            }>
        }>
    }>
}
"""
)


LINEAR_ACTIVATION = Op(
    name="linear_activation",
    schema="linear_activation(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    onnx="LinearActivation",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
