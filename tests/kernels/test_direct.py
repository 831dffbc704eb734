"""Every kernel of every instruction set on NumPy arrays, against the reference in float64."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALL, Case, error, to_dtype

from kpdeploy.ops import OPS

_core = pytest.importorskip("kpdeploy._core", reason="this installation has no kernels: csrc/BUILD.md")

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
LOST_DIGITS = {"far from 0": 5, "far from 0, no bias": 5, "large scores": 20}
"""Where float32 itself loses digits: a mean of 100 leaves fewer for the differences, a score of 1000 for e^score."""
POISON = float("nan")


def array_of(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def call(op: str, arguments: tuple[Any, ...], **options: Any) -> tuple[torch.Tensor, ...]:
    """The kernel's outputs, in buffers that held NaN."""
    fake = OPS[op].fake(*arguments)
    outs = [torch.full_like(out, POISON) for out in (fake if isinstance(fake, tuple) else (fake,))]
    getattr(_core, op)(*map(array_of, arguments), *map(array_of, outs), **options)
    return tuple(outs)


def expected(op: str, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    ref = OPS[op].reference(*to_dtype(arguments, torch.float64))
    return ref if isinstance(ref, tuple) else (ref,)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case[0]}: {case[1]}")
def test_a_kernel_gives_the_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    op, what, arguments = case
    arguments = to_dtype(arguments, dtype)
    for out, ref in zip(call(op, arguments), expected(op, arguments), strict=True):
        assert error(out, ref) <= TOLERANCES[dtype] * LOST_DIGITS.get(what, 2 if op == "attention" else 1)


@pytest.mark.parametrize("op", ["linear_activation", "gated_linear"])
def test_a_packed_weight_gives_the_same(op: str, isa: str) -> None:
    for name, what, arguments in ALL:
        if name == op:
            for out, ref in zip(call(op, arguments, packed=True), expected(op, arguments), strict=True):
                assert error(out, ref) <= 1e-6, what


def test_threads_change_nothing() -> None:
    for op, what, arguments in ALL:
        for one, many in zip(call(op, arguments), call(op, arguments, threads=3), strict=True):
            assert torch.equal(one, many), (op, what)


def test_a_batch_gives_each_row_what_it_gets_alone() -> None:
    q, k, v = torch.randn(3, 5, 40, 64)
    lengths = torch.tensor([40, 1, 17, 39, 2])
    (whole,) = call("attention", (q, k, v, lengths, 2, 2, 0.2, False))
    for row in range(5):
        keys = int(lengths[row])
        alone = (q[row : row + 1], k[row : row + 1, :keys], v[row : row + 1, :keys], None, 2, 2, 0.2, False)
        assert torch.equal(call("attention", alone)[0], whole[row : row + 1])


def test_keys_beyond_the_length_are_not_read() -> None:
    q, k, v = torch.randn(3, 2, 40, 64)
    lengths = torch.tensor([40, 11])
    (clean,) = call("attention", (q, k, v, lengths, 2, 2, 0.2, False))
    k[1, 11:] = POISON
    v[1, 11:] = POISON
    assert torch.equal(call("attention", (q, k, v, lengths, 2, 2, 0.2, False))[0], clean)


def test_a_nan_stays_one(isa: str) -> None:
    x = torch.randn(6, 48)
    x[2, 5] = POISON
    w = torch.randn(40, 48)
    for out in (call("linear_activation", (x, w, None, "gelu")), call("rms_norm", (x, torch.ones(48), 1e-5))):
        assert out[0][2].isnan().all()
        assert not out[0][[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("shape", [(4096, 1024), (3, 100_003)])
def test_large_rows(shape: tuple[int, int]) -> None:
    x, r, w = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    arguments = (x, r, w, None, 1e-5)
    for out, ref in zip(
        call("add_layer_norm", arguments, threads=2), expected("add_layer_norm", arguments), strict=True
    ):
        assert error(out, ref) <= 1e-6


X, W, B = np.ones((4, 8), np.float32), np.ones((6, 8), np.float32), np.ones(6, np.float32)
Q = np.ones((2, 3, 8), np.float32)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (
            "linear_activation",
            (X, W[:, :5], B, "gelu", np.ones((4, 6), np.float32)),
            "weight is [6, 5], which does not",
        ),
        ("linear_activation", (X, W, B[:3], "gelu", np.ones((4, 6), np.float32)), "bias is [3]; [6] fits"),
        ("linear_activation", (X, W, B, "tanh", np.ones((4, 6), np.float32)), "activation is none of"),
        ("linear_activation", (X, W, B, "gelu", np.ones((4, 5), np.float32)), "out is [4, 5]"),
        ("linear_activation", (X, W.astype(np.float64), B, "gelu", np.ones((4, 6), np.float32)), "another dtype"),
        ("linear_activation", (X, W[0], B, "gelu", np.ones((4, 6), np.float32)), "weight has 1 dims, not at least 2"),
        ("linear_activation", (X.T, W, B, "gelu", np.ones((8, 6), np.float32)), "last dim of x is not contiguous"),
        ("rms_norm", (X.astype(np.float16), X[0].astype(np.float16), 1e-5, X.astype(np.float16)), "x is float16"),
        ("rms_norm", (X, np.ones(7, np.float32), 1e-5, X.copy()), "weight is [7]; [8] fits"),
        ("rms_norm", (np.array(1, np.float32), X[0], 1e-5, X.copy()), "x has 0 dims"),
        ("add_rms_norm", (X, X[:1], X[0], 1e-5, X.copy(), X.copy()), "residual is [1, 8], and x is [4, 8]"),
        ("layer_norm", (X, W[0], W[0].view(np.int32).astype(np.int64), 1e-5, X.copy()), "bias is int64"),
        ("attention", (Q, Q, Q, None, 3, 3, 1.0, False, Q.copy()), "its last dim is not 3 heads"),
        ("attention", (Q, Q, Q, None, 4, 3, 1.0, False, Q.copy()), "heads is 4, not a multiple of kv_heads 3"),
        ("attention", (Q, Q[:1], Q, None, 2, 2, 1.0, False, Q.copy()), "key is [1, 3, 8]"),
        ("attention", (Q, Q, Q[:, :2], None, 2, 2, 1.0, False, Q.copy()), "value is [2, 2, 8]"),
        ("attention", (Q, Q, Q, np.array([1, 4]), 2, 2, 1.0, False, Q.copy()), "lengths[1] is 4, with 3 keys"),
        ("attention", (Q, Q, Q, np.array([1]), 2, 2, 1.0, False, Q.copy()), "lengths has not the shape [2]"),
        ("attention", (Q, Q, Q, np.array([1, 2], np.int32), 2, 2, 1.0, False, Q.copy()), "lengths is not int64"),
    ],
)
def test_wrong_use_is_one_clear_error(op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the message is compared below)
        getattr(_core, op)(*arguments)
    assert message in str(raised.value)


def test_each_op_is_callable_by_its_own_name() -> None:
    for op in OPS.values():
        assert callable(getattr(_core, op.name))
        assert op.name in inspect.getdoc(getattr(_core, op.name))
