"""linear_activation: activation(x Wᵀ + bias)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import Op

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


LINEAR_ACTIVATION = Op(
    name="linear_activation",
    schema="linear_activation(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    onnx="LinearActivation",
    reference=reference,
    fake=fake,
)
