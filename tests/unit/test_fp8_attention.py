"""Attention in 8 bits, as its references say it: what the rotation keeps, and what each rounding costs."""

from __future__ import annotations

import pytest
import torch

from kpdeploy.ops import attention, fp8_attention, fp8_attention_operands
from kpdeploy.ops.fp8_quantize import LARGEST

E4M3 = torch.float8_e4m3fn


def normal(*shape: int, outliers: bool = False) -> torch.Tensor:
    x = torch.randn(shape)
    return (x + 10 * torch.randn(shape) * (torch.rand(shape) < 1e-3) if outliers else x).bfloat16()


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.double() - ref).norm() / ref.norm())


@pytest.mark.parametrize("size", [64, 128])
def test_the_rotation_keeps_products(size: int) -> None:
    a, b = torch.randn(2, 9, size, dtype=torch.float64)
    turned = [fp8_attention_operands.turned(x) for x in (a, b)]
    assert error(turned[0] @ turned[1].T / size, a @ b.T) < 1e-12
    spike = torch.zeros(size, dtype=torch.float64)
    spike[3] = 5
    assert fp8_attention_operands.turned(spike).abs().unique().tolist() == [5]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["all keys", "lengths"])
def test_attention_of_the_operands_is_near_that_of_the_inputs(size: int, causal: bool, given: bool) -> None:
    torch.manual_seed(1)
    query, key, value = normal(2, 70, 4 * size), normal(2, 200, 2 * size), normal(2, 200, 2 * size)
    lengths = torch.tensor([200, 77]) if given else None
    exact = attention.reference(query.double(), key.double(), value.double(), lengths, 4, 2, size**-0.5, causal)
    operands = fp8_attention_operands.reference(query, key, value, lengths, 4, 2)
    out = fp8_attention.reference(*operands, lengths, None, size**-0.5, causal)
    assert out.dtype == torch.bfloat16
    assert error(out, exact) < 0.06
    eight = fp8_attention.reference(*operands, lengths, torch.tensor(0.01), size**-0.5, causal)
    assert error(eight.double() * 0.01, exact) < 0.07


def test_outliers_cost_less_than_in_a_plain_cast() -> None:
    torch.manual_seed(2)
    inputs = [normal(1, 300, 4 * 128, outliers=True) for _ in range(3)]

    def cast(x: torch.Tensor) -> torch.Tensor:
        scale = x.double().abs().max() / LARGEST
        return (x / scale).to(E4M3).double() * scale

    def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention.reference(query.double(), key.double(), value.double(), None, 4, 4, 128**-0.5, False)

    ref = exact(*inputs)
    operands = fp8_attention_operands.reference(*inputs, None, 4, 4)
    ours = fp8_attention.reference(*operands, None, None, 128**-0.5, False)
    assert error(ours, ref) < 0.8 * error(exact(*map(cast, inputs)), ref)


def test_values_and_keys_of_zeros_are_zeros() -> None:
    zeros = torch.zeros(1, 130, 64, dtype=torch.bfloat16)
    operands = fp8_attention_operands.reference(normal(1, 5, 64), zeros, zeros, None, 1, 1)
    assert all(x.float().isfinite().all() for x in operands)
    assert not fp8_attention.reference(*operands, None, None, 0.125, False).any()
