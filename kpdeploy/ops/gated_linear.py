"""gated_linear: SiLU(x Wgᵀ) · (x Wuᵀ), the first half of a Llama MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """[..., N] from x [..., K] and two weights [N, K]."""
    from torch.nn import functional

    gate = functional.linear(x.double(), gate_weight.double())
    return (functional.silu(gate) * functional.linear(x.double(), up_weight.double())).to(x.dtype)


def fake(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], up_weight.shape[0]))


ONNX_BODY = """
GatedLinear (x, gate_weight, up_weight) => (out) {
    gate_columns = Transpose <perm = [1, 0]> (gate_weight)
    up_columns = Transpose <perm = [1, 0]> (up_weight)
    gate = MatMul (x, gate_columns)
    up = MatMul (x, up_columns)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    out = Mul (silu, up)
}
"""


GATED_LINEAR = Op(
    name="gated_linear",
    schema="gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight) -> Tensor",
    onnx="GatedLinear",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
)
