"""Inputs for every op: each case is the arguments of one call, as torch tensors, with odd sizes and strides among them.

Lengths, zero rows, one row, a last dim below one vector and above many, rows apart in memory, broadcast rows.
"""

from __future__ import annotations

from typing import Any

import torch

Case = tuple[str, str, tuple[Any, ...]]  # op, what is special, arguments

SHAPES = ((1, 1), (3, 7), (2, 5, 16), (4, 33), (2, 3, 384), (1, 1000), (70, 65), (0, 8), (2, 0, 8))


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with room between rows, last dim contiguous."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def norm_cases() -> list[Case]:
    torch.manual_seed(0)
    found: list[Case] = []
    for shape in SHAPES:
        x, r, w, b = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
        found += _norms(str(shape), x, r, w, b)
    x, w, b = torch.randn(5, 6, 40) + 100, torch.randn(40), torch.randn(40)
    found += _norms("far from 0", x, x, w, b)
    x = x - 100
    found += _norms("spread rows", _spread(x), _spread(x * 0.5), w, b)
    found += _norms("swapped dims", x.transpose(0, 1), x.transpose(0, 1), w, b)
    found += _norms("broadcast residual", x, x[:1].expand(5, 6, 40), w, b)
    return found


def _norms(what: str, x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> list[Case]:
    return [
        ("layer_norm", what, (x, w, b, 1e-5)),
        ("layer_norm", f"{what}, no bias", (x, w, None, 1e-12)),
        ("rms_norm", what, (x, w, 1e-6)),
        ("add_layer_norm", what, (x, r, w, b, 1e-12)),
        ("add_layer_norm", f"{what}, no bias", (x, r, w, None, 1e-5)),
        ("add_rms_norm", what, (x, r, w, 1e-6)),
    ]


def linear_cases() -> list[Case]:
    torch.manual_seed(1)
    found: list[Case] = []
    for activation in ("none", "relu", "gelu", "gelu_tanh", "silu"):
        x, w, b = torch.randn(3, 11, 37) * 2, torch.randn(45, 37), torch.randn(45)
        found.append(("linear_activation", activation, (x, w, b, activation)))
        found.append(("linear_activation", f"{activation}, no bias", (x, w, None, activation)))
    for rows, k, n in ((1, 1, 1), (1, 384, 7), (4, 33, 65), (5, 33, 65), (14, 16, 32), (15, 17, 31), (29, 1500, 33),
                       (300, 64, 300), (0, 8, 8), (8, 0, 8), (8, 8, 0)):  # fmt: skip
        x, w, b, g = torch.randn(rows, k), torch.randn(n, k), torch.randn(n), torch.randn(n, k) / (k or 1) ** 0.5
        found.append(("linear_activation", f"{rows}x{k}x{n}", (x, w, b, "gelu")))
        found.append(("gated_linear", f"{rows}x{k}x{n}", (x, g, w)))
    x, w = torch.randn(4, 6, 24), torch.randn(40, 24)
    found.append(("linear_activation", "swapped dims", (x.transpose(0, 1), w, None, "silu")))
    found.append(("linear_activation", "spread rows", (_spread(x), _spread(w), None, "silu")))
    found.append(("gated_linear", "spread rows", (_spread(x), _spread(w), w)))
    return found


def attention_cases() -> list[Case]:
    torch.manual_seed(2)
    found: list[Case] = []
    for batch, queries, keys, heads, kv_heads, size in (
        (2, 128, 128, 3, 3, 32), (1, 1, 77, 4, 2, 64), (2, 37, 53, 4, 1, 40), (1, 300, 300, 2, 2, 128),
        (3, 5, 520, 2, 2, 80), (1, 15, 1, 1, 1, 33), (2, 9, 4, 2, 2, 96), (0, 3, 3, 2, 2, 32), (2, 0, 3, 2, 2, 32),
        (2, 3, 0, 2, 2, 32),
    ):  # fmt: skip
        q = torch.randn(batch, queries, heads * size)
        k, v = torch.randn(2, batch, keys, kv_heads * size)
        lengths = torch.randint(0, keys + 1, (batch,))
        what = f"{batch}x{queries}x{keys} {heads}/{kv_heads} heads of {size}"
        for causal in (False, True):
            found.append(("attention", f"{what} {causal}", (q, k, v, None, heads, kv_heads, size**-0.5, causal)))
            found.append(("attention", f"{what} lengths {causal}", (q, k, v, lengths, heads, kv_heads, 0.3, causal)))
    packed = torch.randn(2, 50, 3 * 2 * 48)
    q, k, v = packed.chunk(3, dim=-1)
    found.append(("attention", "slices of one projection", (q, k, v, torch.tensor([50, 13]), 2, 2, 0.14, False)))
    found.append(("attention", "large scores", (q * 40, k * 40, v, None, 2, 2, 1.0, True)))
    return found


ALL = [*norm_cases(), *linear_cases(), *attention_cases()]


def to_dtype(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The floating tensors of a call in another dtype, strides kept."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        return (
            torch.empty_strided(value.shape, value.stride(), dtype=dtype).copy_(value)
            if _fits(value)
            else (value.to(dtype))
        )

    return tuple(one(value) for value in arguments)


def _fits(value: torch.Tensor) -> bool:
    """Whether no two elements share memory."""
    return all(stride > 0 for stride in value.stride()) or value.numel() == 0


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """‖out - ref‖ / ‖ref‖; infinite for a NaN."""
    if ref.numel() == 0:
        return 0.0
    distance = float((out.double() - ref).norm())
    length = float(ref.norm())
    found = distance / length if length else distance
    return found if found == found else float("inf")
