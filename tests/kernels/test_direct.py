"""Every kernel of every instruction set on NumPy arrays, against the reference in float64."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from kpdeploy.ops import OPS, calls
from kpdeploy.ops.cases import Arguments, Case, all_cases, cases_of, error, to_dtype, tolerance

_core = pytest.importorskip("kpdeploy._core", reason="this installation has no kernels: csrc/BUILD.md")

ALL = all_cases()
DTYPES = (torch.float32, torch.bfloat16)
NAN = float("nan")


def call(op: str, arguments: Arguments, **options: Any) -> tuple[torch.Tensor, ...]:
    """The kernel's outputs, in buffers that held NaN."""
    return calls.direct(OPS[op], arguments, **options)


def expected(op: str, arguments: Arguments) -> tuple[torch.Tensor, ...]:
    return calls.reference(OPS[op], arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case[0]}: {case[1]}")
def test_a_kernel_gives_the_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    op, what, arguments = case
    arguments = to_dtype(arguments, dtype, OPS[op])
    for out, ref in zip(call(op, arguments), expected(op, arguments), strict=True):
        assert error(out, ref) <= tolerance("kpdeploy", str(dtype).removeprefix("torch."), what)


@pytest.mark.parametrize("op", ["linear_activation", "gated_linear"])
def test_a_packed_weight_gives_the_same(op: str, isa: str) -> None:
    for _, what, arguments in cases_of(op):
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


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_give_each_what_it_gets_alone(causal: bool) -> None:
    q, k, v = torch.randn(3, 1, 700, 64)
    k[0, 640:], v[0, 640:] = NAN, NAN  # beyond the last sequence
    ends = torch.tensor([0, 40, 40, 41, 300, 640])
    (whole,) = call("packed_attention", (q, k, v, ends, 2, 2, 0.2, causal), threads=3)
    for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = (q[:, first:end], k[:, first:end], v[:, first:end], None, 2, 2, 0.2, causal)
        assert error(whole[:, first:end], call("attention", alone)[0]) < 2e-7
    assert not whole[:, 640:].any()


def test_keys_beyond_the_length_are_not_read() -> None:
    q, k, v = torch.randn(3, 2, 40, 64)
    lengths = torch.tensor([40, 11])
    (clean,) = call("attention", (q, k, v, lengths, 2, 2, 0.2, False))
    k[1, 11:] = NAN
    v[1, 11:] = NAN
    assert torch.equal(call("attention", (q, k, v, lengths, 2, 2, 0.2, False))[0], clean)


def test_a_nan_stays_one(isa: str) -> None:
    x = torch.randn(6, 48)
    x[2, 5] = NAN
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
P = Q[:1]


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
        ("linear_activation", (X[:0], W[:, :5], B, "gelu", X[:0]), "weight is [6, 5], which does not"),
        ("gated_linear", (X, W[:, :5], W, np.ones((4, 6), np.float32)), "gate_weight is [6, 5], which does not"),
        ("gated_linear", (X, W, W[:3], np.ones((4, 6), np.float32)), "gate_weight is [6, 8], and up_weight is [3, 8]"),
        ("rms_norm", (X, np.ones(7, np.float32), 1e-5, X.copy()), "weight is [7]; [8] fits"),
        ("rms_norm", (X[:0], np.ones(7, np.float32), 1e-5, X[:0]), "weight is [7]; [8] fits"),
        ("rms_norm", (np.array(1, np.float32), X[0], 1e-5, X.copy()), "x has 0 dims"),
        ("add_rms_norm", (X, X[:1], X[0], 1e-5, X.copy(), X.copy()), "residual is [1, 8], and x is [4, 8]"),
        ("layer_norm", (X, W[0], W[0].view(np.int32).astype(np.int64), 1e-5, X.copy()), "bias is int64"),
        ("attention", (Q, Q, Q, None, 3, 3, 1.0, False, Q.copy()), "its last dim is not 3 heads"),
        ("rotary_embedding", (Q, Q[:, :2], Q, 1, Q.copy()), "cos is [2, 2, 8]; x is [2, 3, 8] in heads of 8"),
        ("rotary_embedding", (Q, Q, Q, 1, Q[:1].copy()), "out is [1, 3, 8], and x is [2, 3, 8]"),
        ("rotary_embedding", (Q, Q, Q, 0, Q.copy()), "its last dim is not 0 heads"),
        ("attention", (Q, Q, Q, None, 4, 3, 1.0, False, Q.copy()), "heads is 4, not a multiple of kv_heads 3"),
        ("attention", (Q, Q[:1], Q, None, 2, 2, 1.0, False, Q.copy()), "key is [1, 3, 8]"),
        ("attention", (Q, Q, Q[:, :2], None, 2, 2, 1.0, False, Q.copy()), "value is [2, 2, 8]"),
        ("attention", (Q, Q, Q, np.array([1, 4]), 2, 2, 1.0, False, Q.copy()), "lengths[1] is 4, with 3 keys"),
        ("attention", (Q, Q, Q, np.array([1]), 2, 2, 1.0, False, Q.copy()), "lengths has not the shape [2]"),
        ("attention", (Q, Q, Q, np.array([1, 2], np.int32), 2, 2, 1.0, False, Q.copy()), "lengths is not int64"),
        ("packed_attention", (Q, Q, Q, np.array([0, 3]), 2, 2, 1.0, False, Q.copy()), "query is [2, 3, 8], and key"),
        ("packed_attention", (P, P[:, :2], P[:, :2], np.array([0]), 2, 2, 1.0, False, P.copy()), "with as many rows"),
        (
            "packed_attention",
            (P, P, P, np.array([0, 7]), 2, 2, 1.0, False, P.copy()),
            "offsets[1] is 7, after 0 and with 3",
        ),
        ("packed_attention", (P, P, P, np.array([0, 2, 1]), 2, 2, 1.0, False, P.copy()), "offsets[2] is 1, after 2"),
        ("packed_attention", (P, P, P, np.array([1, 2]), 2, 2, 1.0, False, P.copy()), "offsets[0] is 1, not 0"),
        ("packed_attention", (P, P, P, np.array([], np.int64), 2, 2, 1.0, False, P.copy()), "shape [sequences + 1]"),
        ("packed_attention", (P, P, P, np.array([0], np.int32), 2, 2, 1.0, False, P.copy()), "offsets is not int64"),
    ],
)
def test_wrong_use_is_one_clear_error(op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the message is compared below)
        getattr(_core, op)(*arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("linear_activation", (X, None, B, "gelu", X), "incompatible function arguments"),
        ("linear_activation", (X, W.tolist(), B, "gelu", X), "incompatible function arguments"),
        ("layer_norm", (X, None, None, 1e-5, X), "incompatible function arguments"),
        ("attention", (Q, None, Q, None, 2, 2, 1.0, False, Q), "incompatible function arguments"),
        ("rms_norm", (X, X[0], X), "incompatible function arguments"),
    ],
)
def test_a_missing_array_is_a_type_error(op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(_core, op)(*arguments)


def test_an_output_that_cannot_be_written_is_an_error() -> None:
    out = np.ones((4, 8), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="an output is read-only"):
        _core.rms_norm(X, X[0], 1e-5, out)


def test_each_op_is_callable_by_its_own_name() -> None:
    for op in OPS.values():
        assert callable(getattr(_core, op.name))
        assert op.name in inspect.getdoc(getattr(_core, op.name))
