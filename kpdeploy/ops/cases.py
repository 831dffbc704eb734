"""Calls of every op with odd sizes and strides: what `kpdeploy ops validate` and the tests run.

One row an op in CASES. Sizes of zero, one row, a last dim below one vector and above many, rows apart in memory,
broadcast rows, lengths, empty sequences, and one large call of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kpdeploy.ops.op import Op

Arguments = tuple[Any, ...]
Named = tuple[str, Arguments]  # what is special, the arguments of the call: float32 tensors where it takes tensors
Case = tuple[str, str, Arguments]  # op, what is special, arguments

SHAPES = ((1, 1), (3, 7), (2, 5, 16), (4, 33), (2, 3, 384), (1, 1000), (70, 65), (0, 8), (2, 0, 8), (3, 100_003))
LINEARS = ((1, 1, 1), (1, 384, 7), (4, 33, 65), (5, 33, 65), (14, 16, 32), (15, 17, 31), (29, 1500, 33), (300, 64, 300),
           (257, 520, 1100), (0, 8, 8), (8, 0, 8), (8, 8, 0))  # fmt: skip
"""Rows, inputs, outputs."""
ATTENTIONS = ((2, 128, 128, 3, 3, 32), (1, 1, 77, 4, 2, 64), (2, 37, 53, 4, 1, 40), (1, 300, 300, 2, 2, 128),
              (3, 5, 520, 2, 2, 80), (1, 15, 1, 1, 1, 33), (2, 9, 4, 2, 2, 96), (1, 515, 770, 2, 1, 64),
              (0, 3, 3, 2, 2, 32), (2, 0, 3, 2, 2, 32), (2, 3, 0, 2, 2, 32))  # fmt: skip
"""Batch, queries, keys, heads, kv_heads, head size."""
PACKED = (((128, 128), 0, 3, 3, 32), ((1,), 0, 4, 2, 64), ((37, 0, 53, 1), 7, 4, 1, 40), ((300, 280, 5), 0, 2, 2, 128),
          ((0, 520, 9, 0), 100, 2, 2, 80), ((3,), 0, 1, 1, 33), ((), 5, 2, 2, 32), ((), 0, 2, 1, 32),
          ((0,), 0, 2, 1, 32), ((700, 260, 64, 1, 128, 65), 30, 2, 1, 64))  # fmt: skip
"""Lengths of the sequences, rows beyond them, heads, kv_heads, head size."""
ROTATIONS = ((2, 5, 3, 64, 64, 1), (1, 1, 40, 64, 64, 1), (3, 7, 2, 40, 16, 3), (2, 9, 1, 6, 6, 1), (1, 3, 5, 7, 2, 1),
             (4, 11, 3, 33, 32, 4), (1, 300, 8, 128, 128, 1), (2, 3, 2, 80, 20, 1), (3, 2, 2, 8, 0, 1),
             (0, 3, 2, 8, 8, 1), (2, 0, 2, 8, 8, 1), (2, 3, 1, 0, 0, 1))  # fmt: skip
"""Batch, rows, heads, head size, columns that turn, batch of cos and sin."""

TOLERANCES = {
    "kpdeploy": {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4},
    # Two products, rounded to bfloat16 before their activation.
    "onednn": {"float32": 2e-6, "bfloat16": 1e-2},
}
"""Largest ‖out - ref‖ / ‖ref‖, by provider and dtype; the reference works in float64 on the same rounded inputs."""

LOST_DIGITS = {"far from 0": 5, "far from 0, no bias": 5, "large scores": 20}
"""Where float32 itself loses digits: a mean of 100 leaves fewer for the differences, a score of 1000 for e^score."""


def tolerance(provider: str, dtype: str, what: str) -> float:
    """The largest error that a case may have."""
    return TOLERANCES[provider][dtype] * LOST_DIGITS.get(what, 1)


def _random(seed: int) -> Callable[..., Tensor]:
    """torch.randn of a seed of its own, whatever the process has drawn before."""
    import torch

    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def _spread(tensor: Tensor) -> Tensor:
    """The same values with room between rows, last dim contiguous."""
    import torch

    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def _rows() -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """What is special, x, a residual of its shape, weight, bias."""
    randn = _random(0)
    for shape in SHAPES:
        yield str(shape), randn(shape), randn(shape), randn(shape[-1]), randn(shape[-1])
    far, w, b = randn(5, 6, 40) + 100, randn(40), randn(40)
    x = far - 100
    yield "far from 0", far, far, w, b
    yield "spread rows", _spread(x), _spread(x * 0.5), w, b
    yield "swapped dims", x.transpose(0, 1), x.transpose(0, 1), w, b
    yield "broadcast residual", x, x[:1].expand(5, 6, 40), w, b


def _layer_norm() -> Iterator[Named]:
    for what, x, _, w, b in _rows():
        yield what, (x, w, b, 1e-5)
        yield f"{what}, no bias", (x, w, None, 1e-12)


def _rms_norm() -> Iterator[Named]:
    for what, x, _, w, _ in _rows():
        yield what, (x, w, 1e-6)


def _add_layer_norm() -> Iterator[Named]:
    for what, x, r, w, b in _rows():
        yield what, (x, r, w, b, 1e-12)
        yield f"{what}, no bias", (x, r, w, None, 1e-5)


def _add_rms_norm() -> Iterator[Named]:
    for what, x, r, w, _ in _rows():
        yield what, (x, r, w, 1e-6)


def _linear_activation() -> Iterator[Named]:
    from kpdeploy.ops.linear_activation import ACTIVATIONS

    randn = _random(1)
    for activation in ACTIVATIONS:
        x, w, b = randn(3, 11, 37) * 2, randn(45, 37), randn(45)
        yield activation, (x, w, b, activation)
        yield f"{activation}, no bias", (x, w, None, activation)
    for rows, k, n in LINEARS:
        yield f"{rows}x{k}x{n}", (randn(rows, k), randn(n, k), randn(n), "gelu")
    x, w = randn(4, 6, 24), randn(40, 24)
    yield "swapped dims", (x.transpose(0, 1), w, None, "silu")
    yield "spread rows", (_spread(x), _spread(w), None, "silu")


def _gated_linear() -> Iterator[Named]:
    randn = _random(2)
    for rows, k, n in LINEARS:
        yield f"{rows}x{k}x{n}", (randn(rows, k), randn(n, k) / (k or 1) ** 0.5, randn(n, k))
    x, w = randn(4, 6, 24), randn(40, 24)
    yield "swapped dims", (x.transpose(0, 1), w, w)
    yield "spread rows", (_spread(x), _spread(w), w)


def _attention() -> Iterator[Named]:
    import torch

    randn, chosen = _random(3), torch.Generator().manual_seed(3)
    for batch, queries, keys, heads, kv_heads, size in ATTENTIONS:
        q = randn(batch, queries, heads * size)
        k, v = randn(2, batch, keys, kv_heads * size)
        lengths = torch.randint(0, keys + 1, (batch,), generator=chosen)
        what = f"{batch}x{queries}x{keys} {heads}/{kv_heads} heads of {size}"
        yield what, (q, k, v, None, heads, kv_heads, size**-0.5, False)
        yield f"{what}, causal", (q, k, v, None, heads, kv_heads, size**-0.5, True)
        yield f"{what}, lengths", (q, k, v, lengths, heads, kv_heads, 0.3, False)
        yield f"{what}, lengths, causal", (q, k, v, lengths, heads, kv_heads, 0.3, True)
    q, k, v = randn(2, 50, 3 * 2 * 48).chunk(3, dim=-1)
    yield "slices of one projection", (q, k, v, torch.tensor([50, 13]), 2, 2, 0.14, False)
    yield "large scores", (q * 40, k * 40, v, None, 2, 2, 1.0, True)


def _offsets(lengths: tuple[int, ...]) -> Tensor:
    import torch

    return torch.tensor([0, *lengths]).cumsum(0)


def _packed_attention() -> Iterator[Named]:
    import torch

    randn = _random(4)
    for lengths, beyond, heads, kv_heads, size in PACKED:
        rows, offsets = sum(lengths) + beyond, _offsets(lengths)
        q, (k, v) = randn(1, rows, heads * size), randn(2, 1, rows, kv_heads * size)
        what = f"{len(lengths)} sequences, {rows} rows, {heads}/{kv_heads} heads of {size}"
        yield what, (q, k, v, offsets, heads, kv_heads, size**-0.5, False)
        yield f"{what}, causal", (q, k, v, offsets, heads, kv_heads, 0.3, True)
    q, k, v = randn(1, 90, 3 * 2 * 48).chunk(3, dim=-1)
    yield "slices of one projection", (q, k, v, torch.tensor([0, 33, 34, 80]), 2, 2, 0.14, False)
    yield "every second offset", (q, k, v, torch.tensor([0, 9, 33, 9, 80])[::2], 2, 2, 0.14, True)
    yield "large scores", (q * 40, k * 40, v, _offsets((50, 30)), 2, 2, 1.0, True)


def _rotary_embedding() -> Iterator[Named]:
    randn = _random(5)
    for batch, rows, heads, size, turned, tables in ROTATIONS:
        x, (cos, sin) = randn(batch, rows, heads * size), randn(2, tables, rows, turned)
        yield f"{batch}x{rows} {heads} heads of {size}, {turned} turn, {tables} tables", (x, cos, sin, heads)
    joined, (cos, sin) = randn(2, 9, 5 * 48), randn(2, 1, 9, 48)
    yield "some heads of a projection", (joined[:, :, 48:144], cos, sin, 2)
    yield "one table for all", (joined, cos.expand(2, 9, 48), sin.expand(2, 9, 48), 5)
    yield "spread rows", (_spread(joined), _spread(cos), _spread(sin), 5)
    cos, sin = randn(2, 2, 9, 24)
    yield "swapped dims", (joined.transpose(0, 1), cos.transpose(0, 1), sin.transpose(0, 1), 5)


CASES: dict[str, Callable[[], Iterator[Named]]] = {
    "attention": _attention,
    "packed_attention": _packed_attention,
    "linear_activation": _linear_activation,
    "gated_linear": _gated_linear,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "add_layer_norm": _add_layer_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary_embedding": _rotary_embedding,
}


def cases_of(op: str) -> list[Case]:
    """The cases of an op, the same ones every time."""
    return [(op, what, arguments) for what, arguments in CASES[op]()]


def all_cases() -> list[Case]:
    """The cases of all ops."""
    return [case for op in CASES for case in cases_of(op)]


def to_dtype(arguments: Arguments, dtype: torch.dtype, op: Op | None = None) -> Arguments:
    """The floating tensors of a call in another dtype, strides kept. Those that `op` wants in float32 stay."""
    import torch

    names = [name for _, name in op.parameters] if op else [""] * len(arguments)
    wide = op.wide if op else ()

    def one(value: Any, name: str) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if name in wide:
            return value
        # Strides of 0 share memory: they are written out.
        if value.numel() == 0 or not all(value.stride()):
            return value.to(dtype)
        reach = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
        room = torch.full((reach,), float("nan"), dtype=dtype)
        return room.as_strided(value.shape, value.stride()).copy_(value)

    return tuple(map(one, arguments, names))


def error(out: Tensor, ref: Tensor) -> float:
    """‖out - ref‖ / ‖ref‖; infinite where the shapes differ, or for a NaN."""
    if out.shape != ref.shape:
        return float("inf")
    if ref.numel() == 0:
        return 0.0
    distance = float((out.double() - ref).norm())
    length = float(ref.norm())
    found = distance / length if length else distance
    return found if found == found else float("inf")
