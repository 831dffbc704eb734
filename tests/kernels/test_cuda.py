"""The CUDA kernels, through torch and through ONNX Runtime's CUDA provider, against the references in float64.

They need an NVIDIA GPU. Elsewhere each test is skipped and says what was not run. benchmarks/cuda_kernels.py keeps what
they found on a real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kpdeploy.export.capture import program_of
from kpdeploy.load.describe import model_from_module
from kpdeploy.load.flat import Flat
from kpdeploy.ops import GPU_OPS, OPS, Op, calls, measured
from kpdeploy.ops.cases import Arguments, Case, cases_of, error, to_dtype, tolerance
from kpdeploy.ops.libraries import constant_weights
from kpdeploy.ops.linear_activation import ACTIVATIONS
from kpdeploy.signature import parse_inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROVIDER = "CUDAExecutionProvider"


@pytest.fixture
def gpu(registered: None) -> None:
    """A GPU, a torch that sees it, and a library with CUDA kernels."""
    if not torch.cuda.is_available():
        pytest.skip(f"NOT RUN: the CUDA kernels through torch {torch.__version__}, which sees no GPU here")
    try:
        torch.ops.kpdeploy.rms_norm(torch.ones(1, 1, device="cuda"), torch.ones(1, device="cuda"), 0.0)
    except RuntimeError as refused:
        if "built without CUDA" not in str(refused):
            raise
        pytest.skip(f"NOT RUN: the CUDA kernels, with a GPU in this machine: {refused}")


@pytest.fixture
def cuda_provider(gpu: None, onnx_library: str) -> str:
    """The op library, where ONNX Runtime has its CUDA provider."""
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip(f"NOT RUN: the CUDA kernels through ONNX Runtime {onnxruntime.__version__}, without {PROVIDER}")
    return onnx_library


def on_gpu(arguments: Arguments) -> Arguments:
    """The same tensors on the GPU, with their strides and where they start in their memory."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        memory = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
        return memory.cuda().as_strided(value.shape, value.stride(), value.storage_offset())

    return tuple(one(value) for value in arguments)


def gpu_cases(op: str) -> list[Case]:
    """The cases of every device, and those that the CUDA kernels have ways of their own for."""
    return [*cases_of(op), *((op, what, arguments) for what, arguments in OWN[op]())]


def _norms(residual: bool, bias: bool) -> Iterator[tuple[str, Arguments]]:
    torch.manual_seed(4)
    for rows, n in ((4096, 1024), (33, 9001), (65, 16384), (300, 1032)):
        x, r, w, b = torch.randn(rows, n), torch.randn(rows, n), torch.randn(n), torch.randn(n)
        yield f"{rows}x{n}", (x, *((r,) if residual else ()), w, *((b,) if bias else ()), 1e-5)
    x, r = torch.randn(2, 7, 65)[:, :, 1:], torch.randn(2, 7, 64)  # starts off every boundary
    w, b = torch.randn(64), torch.randn(64)
    yield "off boundary", (x, *((r,) if residual else ()), w, *((b,) if bias else ()), 1e-5)
    x, r = torch.randn(3, 70, 64), torch.randn(1, 70, 64).expand(3, 70, 64)
    yield "one residual for all", (x, *((r,) if residual else ()), w, *((b,) if bias else ()), 1e-5)
    x, r = torch.randn(1024, 768), torch.randn(1024, 768)  # begins early, spread over the chip
    w, b = torch.randn(768), torch.randn(768)
    yield "1024x768", (x, *((r,) if residual else ()), w, *((b,) if bias else ()), 1e-5)


TILES = ((1600, 40, 1500), (1601, 37, 1501))
"""Enough for large tiles, with chunks of 16 bytes and without."""


def _linears(gated: bool) -> Iterator[tuple[str, Arguments]]:
    torch.manual_seed(5)
    shapes = (*TILES, (1024, 1024, 4096), (2000, 1003, 777), (1, 4096, 1024), (3, 4095, 1000), (128, 4096, 1024))
    for rows, k, n in shapes:
        x, w, b = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
        yield f"{rows}x{k}x{n}", (x, torch.randn(n, k) / k**0.5, w) if gated else (x, w, b, "gelu")
    x, w = torch.randn(40, 65)[:, 1:], torch.randn(72, 64)
    yield "off boundary", (x, w, w * 0.5) if gated else (x, w, None, "silu")
    x = torch.randn(3, 8, 5, 64).permute(2, 0, 1, 3)  # rows that no single stride describes
    yield "rows in three strides", (x, w, w * 0.5) if gated else (x, w, None, "relu")


def _attentions() -> Iterator[tuple[str, Arguments]]:
    torch.manual_seed(6)
    for batch, queries, keys, heads, kv_heads, size in (
        (4, 2048, 2048, 8, 8, 128), (2, 1024, 1024, 8, 2, 64), (1, 300, 500, 2, 1, 256), (1, 70, 90, 2, 2, 200),
        (2, 65, 65, 3, 1, 7), (1, 9, 33, 5, 5, 1), (3, 1, 1000, 8, 2, 128), (1, 4096, 100, 2, 2, 32),
        # For compute capability 9.0: runs of 128 and 256 queries, more and fewer than multiprocessors, tails.
        (1, 65, 1, 1, 1, 64), (5, 129, 200, 2, 1, 64), (9, 600, 600, 12, 12, 64), (40, 100, 100, 12, 12, 64),
        (2, 500, 90, 3, 3, 128), (3, 515, 770, 10, 2, 128), (1, 200, 300, 2, 2, 128),
        # Few queries: shares of the keys, groups that leave rows of a block empty, more queries than a block has.
        (1, 1, 8192, 32, 8, 128), (2, 5, 700, 12, 4, 64), (1, 70, 1100, 2, 1, 128), (1, 3, 333, 7, 1, 64),
        (150, 1, 40, 2, 1, 64), (2, 64, 64, 2, 2, 128),
    ):  # fmt: skip
        q, k, v = (torch.randn(batch, n, h * size) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))
        lengths = torch.randint(0, keys + 1, (2 * batch,))[::2]
        what = f"{batch}x{queries}x{keys} {heads}/{kv_heads} heads of {size}"
        yield what, (q, k, v, None, heads, kv_heads, size**-0.5, False)
        yield f"{what}, lengths, causal", (q, k, v, lengths, heads, kv_heads, size**-0.5, True)
    q, k, v = torch.randn(2, 50, 3 * 2 * 64 + 1)[:, :, 1:].chunk(3, dim=-1)
    yield "off boundary", (q, k, v, torch.tensor([50, 13]), 2, 2, 0.14, False)


def _packed_attentions() -> Iterator[tuple[str, Arguments]]:
    torch.manual_seed(7)
    for lengths, beyond, heads, kv_heads, size in (
        # For compute capability 9.0: runs of 128 and 256 queries, more and fewer than multiprocessors, tails.
        ((65, 1, 0, 129, 128, 256, 257, 300), 70, 12, 12, 64), ((2048, 300, 5), 0, 8, 2, 128),
        ((64,) * 40, 1, 12, 12, 64), ((1,) * 70, 3, 2, 1, 128), ((600,) * 9, 200, 12, 12, 64),
        ((), 300, 2, 2, 64), ((0, 0), 0, 2, 2, 128), ((500, 90), 17, 3, 3, 128), ((300, 500), 1, 2, 1, 256),
    ):  # fmt: skip
        rows, offsets = sum(lengths) + beyond, torch.tensor([0, *lengths]).cumsum(0)
        q, k, v = torch.randn(1, rows, (heads + 2 * kv_heads) * size).split(
            (heads * size, kv_heads * size, kv_heads * size), dim=-1
        )
        what = f"{len(lengths)} sequences, {rows} rows, {heads}/{kv_heads} heads of {size}"
        yield what, (q, k, v, offsets, heads, kv_heads, size**-0.5, False)
        yield f"{what}, causal", (q, k, v, offsets, heads, kv_heads, size**-0.5, True)


def _rotations() -> Iterator[tuple[str, Arguments]]:
    torch.manual_seed(8)
    for batch, rows, heads, size, turned, tables in (
        # A thread takes four heads, or fewer are left; chunks of 16 bytes, and none; columns that stay.
        (1, 2048, 40, 64, 64, 1), (2, 1024, 13, 128, 64, 2), (3, 700, 9, 96, 80, 1), (32, 1, 40, 64, 64, 1),
        (1, 3000, 6, 60, 60, 1), (2, 1500, 5, 64, 40, 1),
    ):  # fmt: skip
        x, (cos, sin) = torch.randn(batch, rows, heads * size), torch.randn(2, tables, rows, turned)
        yield f"{batch}x{rows} {heads} heads of {size}, {turned} turn", (x, cos, sin, heads)
    x, (cos, sin) = torch.randn(2, 70, 10 * 64 + 1)[:, :, 1:], torch.randn(2, 2, 70, 64)
    yield "off boundary", (x[:, :, : 8 * 64], cos, sin, 8)
    x, (cos, sin) = torch.randn(2, 70, 10 * 64), torch.randn(2, 2, 70, 65)[..., 1:]
    yield "tables off boundary", (x[:, :, : 8 * 64], cos, sin, 8)


OWN = {
    "attention": _attentions,
    "packed_attention": _packed_attentions,
    "linear_activation": functools.partial(_linears, False),
    "gated_linear": functools.partial(_linears, True),
    "layer_norm": functools.partial(_norms, False, True),
    "rms_norm": functools.partial(_norms, False, False),
    "add_layer_norm": functools.partial(_norms, True, True),
    "add_rms_norm": functools.partial(_norms, True, False),
    "rotary_embedding": _rotations,
}


HOPPER_SHAPES = ((1, 72, 40), (2, 200, 88), (13, 528, 136), (60, 336, 80), (130, 144, 272), (700, 1040, 1312),
                 (4096, 1024, 4096), (9, 4096, 8192),
                 # A row whose columns several warps share; K shared by clusters of 2 and 4; blocks that share nothing.
                 (1, 2056, 72), (128, 768, 768), (100, 4112, 272), (128, 768, 3072), (260, 1040, 144),
                 (700, 1040, 2000), (30, 1040, 144), (1, 1928, 72))  # fmt: skip
"""Rows, inputs, outputs, in multiples of 16 bytes: every kernel for compute capability 9.0, tails and many tiles."""


@pytest.fixture
def hopper(gpu: None) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("NOT RUN: the kernels for compute capability 9.0: this GPU has another one")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_products_for_hopper_give_the_reference(shape: tuple[int, int, int], dtype: str, hopper: None) -> None:
    rows, k, n = shape
    x, w, g, b = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n, k) / k**0.5, torch.randn(n)
    cases: list[tuple[str, Arguments]] = [("gated_linear", (x, g, w))]
    cases += [
        ("linear_add", (x, w, b, torch.randn(rows, n + 8)[:, :n])),
        ("linear_add", (x, w, None, b.expand(rows, n))),
    ]
    cases += [("linear_activation", (x, w, b, activation)) for activation in ACTIVATIONS]
    for name, plain in cases:
        op, arguments = (OPS | GPU_OPS)[name], to_dtype(plain, DTYPES[dtype])
        found = worst(through_torch(op, arguments), expected(op, arguments))
        assert found <= tolerance("kpdeploy", dtype, ""), (name, arguments[-1] if name == "linear_activation" else "")


@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "quantized"])
@pytest.mark.parametrize("each", [False, True], ids=["one scale", "row scales"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_products_of_8_bit_floats_give_the_reference(
    shape: tuple[int, int, int], each: bool, quantized: bool, hopper: None
) -> None:
    rows, k, n = (-(-size // 16) * 16 if index else size for index, size in enumerate(shape))
    op, kind = GPU_OPS["fp8_linear_activation"], torch.float8_e4m3fn
    x, w = torch.randn(rows, k).to(kind), (torch.randn(n, k) * 9).to(kind)
    x_scale = torch.rand(rows, 1) + 0.1 if each else torch.tensor(0.5)
    weight_scale = (torch.rand(n) + 0.1 if each else torch.tensor([0.7])) / k**0.5 / 9
    bias, out_scale = torch.randn(n).bfloat16(), torch.tensor(0.05)
    for activation in ("none", "gelu", "relu"):
        arguments = (x, w, x_scale, weight_scale, bias, out_scale if quantized else None, activation)
        (out,) = through_torch(op, arguments)
        given = on_gpu((x, w, x_scale, weight_scale, bias, None, activation))
        product = (given[0].double() * given[2]) @ (given[1].double() * given[3].double().reshape(-1, 1)).T
        ref = OPS["linear_activation"].reference(product, torch.eye(n).cuda(), given[4].double(), activation).cpu()
        assert out.dtype == (kind if quantized else torch.bfloat16)
        assert error(out.double() * (0.05 if quantized else 1), ref) <= (4e-2 if quantized else 4e-3), activation
        if activation == "none" and not quantized:
            residual = torch.randn(rows, n + 8).bfloat16()[:, :n]
            (out,) = through_torch(GPU_OPS["fp8_linear_add"], (x, w, x_scale, weight_scale, bias, residual))
            assert error(out.double(), ref + residual.double()) <= 4e-3


def test_8_bit_floats_that_cannot_be_copied_are_one_clear_error(hopper: None) -> None:
    x, w = (torch.ones(shape, device="cuda").to(torch.float8_e4m3fn) for shape in ((4, 24), (32, 24)))
    one = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="a multiple of 16 bytes"):
        torch.ops.kpdeploy.fp8_linear_activation(x, w, one, one, None, None, "none")
    with pytest.raises(RuntimeError, match=r"x_scale is \[3\]: one element, or 4, fit"):
        torch.ops.kpdeploy.fp8_linear_activation(x, w, one.expand(3).clone(), one, None, None, "none")


def test_one_row_of_8_bit_floats_may_have_any_number_of_outputs(hopper: None) -> None:
    kind, scale = torch.float8_e4m3fn, torch.tensor(0.5)
    x, w, b = torch.randn(1, 64).to(kind), torch.randn(37, 64).to(kind), torch.randn(37).bfloat16()
    for out_scale in (None, torch.tensor(0.25)):
        arguments = (x, w, scale, scale, b, out_scale, "silu")
        (out,) = through_torch(GPU_OPS["fp8_linear_activation"], arguments)
        ref = GPU_OPS["fp8_linear_activation"].reference(*arguments)
        assert error(out.double(), ref.double()) <= (4e-3 if out_scale is None else 3e-2)


def test_products_of_one_row_read_no_further_than_its_inputs(hopper: None) -> None:
    """Rows 16 bytes apart, whose last 16 are not all theirs: NaN beyond them."""
    one = torch.ones(1)
    for kind, wide in ((torch.bfloat16, 72), (torch.float8_e4m3fn, 80)):
        x, g, w = (torch.randn(rows, 70) / 8 for rows in (1, 40, 40))
        given = [torch.nn.functional.pad(t, (0, wide - 70), value=torch.nan).to(kind)[:, :70] for t in (x, g, w)]
        cases = (
            [("linear_activation", (given[0], given[2], None, "none")), ("gated_linear", tuple(given))]
            if kind is torch.bfloat16
            else [
                ("fp8_linear_activation", (given[0], given[2], one, one, None, None, "none")),
                ("fp8_gated_linear", (*given, one, one, one, None)),
            ]
        )
        for name, arguments in cases:
            op = (OPS | GPU_OPS)[name]
            assert worst(through_torch(op, arguments), expected(op, arguments)) <= 6e-3, name


@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_constant_weights_give_the_same(shape: tuple[int, int, int], hopper: None) -> None:
    rows, k, n = shape
    shapes = ((rows, k), (n, k), (n, k), (n,), (rows, n))
    x, w, g, b, r = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    k8, n8 = k // 16 * 16, n // 16 * 16
    x8, w8, g8 = (t[:, :k8].contiguous().to(torch.float8_e4m3fn) for t in (x, w[:n8], g[:n8]))
    one, ops = torch.full((1,), 0.5, device="cuda"), torch.ops.kpdeploy

    def all_of_them() -> list[torch.Tensor]:
        outs = []
        for _ in range(3):  # each under way while the one before it ends
            outs += [ops.linear_activation(x, w, b, "gelu"), ops.gated_linear(x, g, w), ops.linear_add(x, w, b, r)]
            outs += [ops.fp8_linear_activation(x8, w8, one, one, b[:n8], one, "none")]
            outs += [ops.fp8_gated_linear(x8, g8, w8, one, one, one, None)]
        return [out.float() for out in outs]

    torch.cuda.synchronize()
    with constant_weights():
        constant = all_of_them()
    assert all(torch.equal(a, b) for a, b in zip(constant, all_of_them(), strict=True))


@pytest.mark.parametrize("shape", [s for s in HOPPER_SHAPES if s[1] * s[2] < 8_000_000], ids=str)
def test_a_weight_that_the_kernel_ahead_writes_is_waited_for(shape: tuple[int, int, int], hopper: None) -> None:
    rows, k, n = shape
    ops, ones = torch.ops.kpdeploy, torch.ones(k, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    graph, sources = torch.cuda.CUDAGraph(), torch.randn(2, n, k, device="cuda", dtype=torch.bfloat16)

    def chain() -> list[torch.Tensor]:
        outs = []
        for source in sources:
            w = ops.rms_norm(source, ones, 1e-6)
            outs += [ops.linear_activation(x, w, None, "none"), ops.gated_linear(x, w, w)]
        return outs

    chain()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(5):
        sources.normal_()
        graph.replay()
        for source, plain, gated in zip(sources, captured[::2], captured[1::2], strict=True):
            w = OPS["rms_norm"].reference(source, ones, 1e-6)
            for name, out, arguments in (
                ("linear_activation", plain, (x, w, None, "none")),
                ("gated_linear", gated, (x, w, w)),
            ):
                assert error(out.cpu(), calls.reference(OPS[name], arguments)[0].cpu()) <= 6e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [0, 1], ids=["aligned", "off boundary"])
def test_a_residual_is_added_in_rows_of_any_kind(dtype: str, off: int, gpu: None) -> None:
    torch.manual_seed(9)
    for batch, rows, k, n in ((1, 1, 64, 40), (2, 7, 65, 33), (2, 150, 96, 512), (3, 700, 192, 768), (2, 0, 64, 32)):
        x, w, b = torch.randn(batch, rows, k + 8)[..., off : off + k], torch.randn(n, k) / k**0.5, torch.randn(n)
        whole = torch.randn(batch, rows, n + 8)[..., off : off + n]
        for residual in (whole, whole[:1].expand(batch, rows, n)):
            arguments = to_dtype((x, w, b, residual), DTYPES[dtype])
            (out,), op = through_torch(GPU_OPS["linear_add"], arguments), GPU_OPS["linear_add"]
            assert out.shape == (batch, rows, n)
            assert rows == 0 or worst((out,), expected(op, arguments)) <= tolerance("kpdeploy", dtype, "")


def test_a_residual_that_does_not_fit_is_one_clear_error(gpu: None) -> None:
    x, w, r = (torch.ones(shape, device="cuda") for shape in ((4, 24), (32, 24), (4, 31)))
    with pytest.raises(RuntimeError, match=r"linear_add: residual is \[4, 31\]"):
        torch.ops.kpdeploy.linear_add(x, w, None, r)
    with pytest.raises(RuntimeError, match="residual"):
        torch.ops.kpdeploy.linear_add(x, w, None, torch.ones(4, 32, device="cuda", dtype=torch.float16))


Choose = Callable[..., contextlib.AbstractContextManager[None]]


@pytest.fixture
def choose(gpu: None, torch_library: str) -> Choose:
    """Has calls go by one row for this GPU alone, handed to the library as an artifact's would be."""
    use = ctypes.CDLL(torch_library).kpdeploy_use_gpu_providers
    use.argtypes = (ctypes.c_char_p,)

    @contextlib.contextmanager
    def chosen(*cells: Any) -> Iterator[None]:
        row = "\t".join(map(str, (torch.cuda.get_device_name(), *cells)))
        assert use(f"{measured.TABLE.read_text().splitlines()[0]}\n{row}\n".encode()) == 0
        try:
            assert use(b"no table\nof ours\n") != 0  # and what held before stays
            yield
        finally:
            assert use(None) == 0

    return chosen


FP8_ATTENTIONS = ((1, 128, 128, 1, 1, 128), (2, 200, 333, 4, 2, 128), (1, 65, 1, 1, 1, 128), (3, 515, 770, 6, 2, 128),
                  (2, 1, 500, 4, 1, 128), (5, 129, 200, 2, 1, 64), (3, 600, 600, 4, 4, 64),
                  (2, 500, 90, 3, 3, 128))  # fmt: skip
"""Batch, queries, keys, heads, heads of keys, size: tails of blocks and runs, more and fewer runs than
multiprocessors."""


def fp8_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Arguments, torch.Tensor]:
    """Query, key and value, slices of one tensor where they can be; and lengths."""
    batch, queries, keys, heads, kv_heads, size = shape
    query = torch.randn(batch, queries, (heads + 1) * size)[:, :, :-size]
    key, value = torch.randn(batch, keys, 2 * kv_heads * size).chunk(2, dim=-1)
    return to_dtype((query, key, value), dtype), torch.randint(0, keys + 1, (2 * batch,))[::2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", FP8_ATTENTIONS, ids=str)
def test_operands_of_attention_in_8_bits_give_the_reference(shape: tuple[int, ...], dtype: str, hopper: None) -> None:
    inputs, lengths = fp8_inputs(shape, DTYPES[dtype])
    op, kinds = GPU_OPS["fp8_attention_operands"], 3 * [torch.float8_e4m3fn] + 2 * [torch.float32]
    for some in (None, lengths):
        outs = through_torch(op, (*inputs, some, *shape[3:5]))
        refs = op.reference(*inputs, some, *shape[3:5])
        assert [out.dtype for out in outs] == kinds
        # Float32 and float64 differ where two 8-bit floats are as near: a few of the 16384 of a small call.
        for out, ref, most in zip(outs, refs, (1e-2, 1e-2, 1e-2, 1e-6, 1e-6), strict=True):
            assert error(out.double(), ref.double()) <= most


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", FP8_ATTENTIONS, ids=str)
def test_attention_in_8_bits_is_near_that_of_the_inputs(shape: tuple[int, ...], causal: bool, hopper: None) -> None:
    (query, key, value), lengths = fp8_inputs(shape, torch.bfloat16)
    heads, size, ops = shape[3:5], shape[5], torch.ops.kpdeploy
    for some in (None, lengths):
        arguments = (query, key, value, some, *heads, size**-0.5, causal)
        (ref,) = expected(OPS["attention"], arguments)
        moved = on_gpu(arguments)
        with outputs_poisoned():
            operands = ops.fp8_attention_operands(*moved[:4], *heads)
            out = ops.fp8_attention(*operands, moved[3], None, size**-0.5, causal)
            scale = torch.full((1,), 0.01, device="cuda")
            eight = ops.fp8_attention(*operands, moved[3], scale, size**-0.5, causal)
        assert (out.dtype, eight.dtype) == (torch.bfloat16, torch.float8_e4m3fn)
        assert error(out.cpu(), ref) <= 0.1
        assert error(eight.double().cpu() * 0.01, ref) <= 0.12


def test_keys_beyond_the_length_are_not_read_in_8_bits(hopper: None) -> None:
    (query, key, value), _ = fp8_inputs((2, 200, 333, 4, 2, 128), torch.bfloat16)
    query, key, value, lengths = on_gpu((query, key, value, torch.tensor([333, 11])))
    ops = torch.ops.kpdeploy

    def attended(lengths: torch.Tensor) -> torch.Tensor:
        operands = ops.fp8_attention_operands(query, key, value, lengths, 4, 2)
        out: torch.Tensor = ops.fp8_attention(*operands, lengths, None, 0.1, False)
        return out

    clean = attended(lengths)
    key[1, 11:] = torch.nan
    value[1, 11:] = torch.nan
    assert torch.equal(attended(lengths), clean)
    out = attended(torch.tensor([333, 334], device="cuda"))
    assert out[1].isnan().all()
    assert torch.equal(out[0], clean[0])
    key[1, 7] = torch.nan
    assert attended(lengths)[1].isnan().all()


def test_attention_in_8_bits_that_cannot_be_is_one_clear_error(hopper: None) -> None:
    ops = torch.ops.kpdeploy
    x = torch.randn(2, 40, 256, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="heads of 32: 8-bit floats are for heads of 64 and 128"):
        ops.fp8_attention_operands(x, x, x, None, 8, 8)
    with pytest.raises(RuntimeError, match="query is float32, not bfloat16"):
        ops.fp8_attention_operands(x.float(), x, x, None, 2, 2)
    operands = ops.fp8_attention_operands(x, x, x, None, 2, 2)
    with pytest.raises(RuntimeError, match="scale is 0, not above 0"):
        ops.fp8_attention(*operands, None, None, 0.0, False)
    with pytest.raises(RuntimeError, match=r"query_scale is \[1, 2, 40\], not \[2, 2, 40\]"):
        ops.fp8_attention(*operands[:3], operands[3][:1], operands[4], None, None, 0.1, False)


@pytest.mark.parametrize("provider", ["kpdeploy", "cublaslt"])
def test_either_provider_of_a_product_gives_the_reference(provider: str, choose: Choose) -> None:
    for dtype in DTYPES:
        for activation in ("none", "relu", "gelu_tanh"):
            x, w, b = torch.randn(96, 128), torch.randn(160, 128) / 11, torch.randn(160)
            arguments = to_dtype((x, w, b, activation), DTYPES[dtype])
            with choose("linear_activation", dtype, activation, 96, 128, 160, provider):
                outs = through_torch(OPS["linear_activation"], arguments)
            found = worst(outs, expected(OPS["linear_activation"], arguments))
            assert found <= 1.5 * tolerance("kpdeploy", dtype, ""), (dtype, activation)
        arguments = to_dtype((x, w, b, torch.randn(96, 200)[:, :160]), DTYPES[dtype])
        with choose("linear_activation", dtype, "none", 96, 128, 160, provider):
            outs = through_torch(GPU_OPS["linear_add"], arguments)
        assert worst(outs, expected(GPU_OPS["linear_add"], arguments)) <= 1.5 * tolerance("kpdeploy", dtype, ""), dtype


ATTENTION_HEADS = (*range(8, 129, 8), 36, 256)
"""Every one that the kernels for compute capability 9.0 take, and two that they leave to the general one."""


def head_cases(size: int) -> list[tuple[str, Arguments]]:
    """Calls of every kernel for heads of one size."""
    torch.manual_seed(size)
    cases: list[tuple[str, Arguments]] = []
    for batch, queries, keys, heads, kv_heads in (
        (2, 300, 300, 4, 2), (3, 130, 70, 3, 3), (1, 1, 8192, 8, 2), (2, 5, 700, 6, 2), (9, 100, 100, 5, 1),
        (1, 600, 1100, 2, 1), (2, 128, 128, 4, 2),
    ):  # fmt: skip
        q, k, v = (torch.randn(batch, n, h * size) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))
        lengths = torch.randint(0, keys + 1, (batch,))
        for given, causal in ((None, False), (None, True), (lengths, False), (lengths, True)):
            cases.append(("attention", (q, k, v, given, heads, kv_heads, size**-0.5, causal)))
    for each, beyond in (((65, 1, 0, 129, 300), 7), ((700, 1), 0)):
        rows, offsets = sum(each) + beyond, torch.tensor([0, *each]).cumsum(0)
        q, k, v = torch.randn(1, rows, 6 * size).split((4 * size, size, size), dim=-1)
        cases += [("packed_attention", (q, k, v, offsets, 4, 1, size**-0.5, causal)) for causal in (False, True)]
    return cases


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", ATTENTION_HEADS)
def test_heads_of_every_size_give_the_reference(size: int, dtype: str, hopper: None, choose: Choose) -> None:
    for name, plain in head_cases(size):
        arguments = to_dtype(plain, DTYPES[dtype])
        q, k, _, lengths, heads, kv_heads, _, causal = arguments
        shape = (*q.shape[:2], k.shape[1], heads, kv_heads, size, "yes" if causal and q.shape[1] > 1 else "no")
        with choose("attention", dtype, *shape, int(lengths is not None), "kpdeploy"):
            outs = through_torch(OPS[name], arguments)
        found = worst(outs, expected(OPS[name], arguments))
        assert found <= tolerance("kpdeploy", dtype, ""), (name, [tuple(t.shape) for t in plain[:3]], plain[3:])


@pytest.fixture
def cudnn(choose: Choose, hopper: None) -> Callable[[Arguments], torch.Tensor]:
    """Runs attention by cuDNN, and sees to it that cuDNN's kernels run."""
    try:
        ctypes.CDLL("libcudnn.so.9")
    except OSError as missing:
        pytest.skip(f"NOT RUN: cuDNN's attention, with a GPU in this machine: {missing}")

    def run(arguments: Arguments) -> torch.Tensor:
        q, k, _, lengths, heads, kv_heads, _, causal = arguments
        size, dtype = q.shape[2] // heads, str(q.dtype).removeprefix("torch.")
        shape = (*q.shape[:2], k.shape[1], heads, kv_heads, size, "yes" if causal and q.shape[1] > 1 else "no")
        moved = on_gpu(arguments)
        with choose("attention", dtype, *shape, int(lengths is not None), "cudnn"), outputs_poisoned():
            torch.ops.kpdeploy.attention(*moved)  # makes the plan
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                out = torch.ops.kpdeploy.attention(*moved)
                torch.cuda.synchronize()
        names = [event.name for event in seen.events()]
        assert any("cudnn" in name for name in names), names
        return out

    return run


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnns_attention_gives_the_reference(dtype: str, cudnn: Callable[[Arguments], torch.Tensor]) -> None:
    torch.manual_seed(9)
    for batch, queries, keys, heads, kv_heads, size in (
        (2, 300, 300, 4, 2, 256), (3, 130, 70, 3, 3, 192), (4, 1, 700, 6, 2, 256), (2, 65, 65, 2, 1, 136),
        (2, 256, 256, 2, 2, 128), (1, 1, 4096, 8, 2, 64), (2, 100, 500, 4, 4, 256),
    ):  # fmt: skip
        q, k, v = (torch.randn(batch, n, h * size) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))
        for causal in (False, True)[: 1 + (queries <= keys)]:
            arguments = to_dtype((q, k, v, None, heads, kv_heads, size**-0.5, causal), DTYPES[dtype])
            found = error(cudnn(arguments).cpu(), expected(OPS["attention"], arguments)[0])
            assert found <= 1.5 * tolerance("kpdeploy", dtype, ""), (q.shape, k.shape, causal)


def test_cudnn_keeps_the_rows_of_a_batch_apart(cudnn: Callable[[Arguments], torch.Tensor]) -> None:
    for keys in (70, 200, 333):  # a block of keys ends where the next row begins
        q, k, v = torch.randn(3, 3, keys, 2 * 256).bfloat16()
        out = cudnn((q, k, v, None, 2, 2, 0.06, False))
        for tensor in (q, k, v):
            tensor[1] = torch.nan
        found = cudnn((q, k, v, None, 2, 2, 0.06, False))
        assert torch.equal(found[::2], out[::2])
        assert found[1].isnan().all()


def test_a_cuda_graph_replays_cudnns_attention(cudnn: Callable[[Arguments], torch.Tensor], choose: Choose) -> None:
    op = torch.ops.kpdeploy.attention
    for queries in (300, 1):  # one of them with keys shared among blocks, whose parts meet in memory
        q, k, v = (torch.randn(2, n, 2 * 256, device="cuda").bfloat16() for n in (queries, 4096, 4096))
        cudnn((q, k, v, None, 2, 2, 0.06, False))
        with choose("attention", "bfloat16", 2, queries, 4096, 2, 2, 256, "no", 0, "cudnn"):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = op(q, k, v, None, 2, 2, 0.06, False)
            for _ in range(3):
                q.normal_()
                graph.replay()
                wanted = op(q, k, v, None, 2, 2, 0.06, False)
                assert error(captured.cpu(), wanted.double().cpu()) <= tolerance("kpdeploy", "bfloat16", "")


def test_a_call_that_cudnn_does_not_take_is_ours(choose: Choose, hopper: None) -> None:
    """Rows that 16 bytes do not divide, lengths, and a plan that would have to be made while a graph is captured."""
    op = OPS["attention"]
    q, k, v = torch.randn(3, 2, 50, 2 * 250).bfloat16()
    with choose("attention", "bfloat16", 2, 50, 50, 2, 2, 250, "no", 0, "cudnn"):
        arguments: Arguments = (q, k, v, None, 2, 2, 0.06, False)
        assert worst(through_torch(op, arguments), expected(op, arguments)) <= tolerance("kpdeploy", "bfloat16", "")
    q, k, v = torch.randn(3, 4, 50, 2 * 256).bfloat16()
    k[1, 7:] = v[1, 7:] = torch.nan
    with choose("attention", "bfloat16", 4, 50, 50, 2, 2, 256, "no", 1, "cudnn"):
        (out,) = through_torch(op, (q, k, v, torch.tensor([50, 7, -1, 51]), 2, 2, 0.06, False))
        k[1, 7:] = v[1, 7:] = 0
        (ref,) = expected(op, (q[:2], k[:2], v[:2], torch.tensor([50, 7]), 2, 2, 0.06, False))
        assert error(out[:2], ref) <= tolerance("kpdeploy", "bfloat16", "")
        assert out[2:].isnan().all()
    q, k, v = torch.randn(3, 2, 50, 2 * 248).bfloat16()
    with choose("attention", "bfloat16", 2, 50, 50, 2, 2, 248, "yes", 0, "cudnn"):
        arguments = (q, k[:, :40], v[:, :40], None, 2, 2, 0.06, True)
        assert worst(through_torch(op, arguments), expected(op, arguments)) <= tolerance("kpdeploy", "bfloat16", "")
    q, k, v = torch.randn(3, 1, 77, 2 * 256, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with choose("attention", "bfloat16", 1, 77, 77, 2, 2, 256, "no", 0, "cudnn"), torch.cuda.graph(graph):
        captured = torch.ops.kpdeploy.attention(q, k, v, None, 2, 2, 0.06, False)
    graph.replay()
    ref = calls.reference(op, (q, k, v, None, 2, 2, 0.06, False))[0]
    assert error(captured.cpu(), ref.cpu()) <= tolerance("kpdeploy", "bfloat16", "")


@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "quantized"])
@pytest.mark.parametrize("each", [False, True], ids=["one scale", "row scales"])
@pytest.mark.parametrize("shape", [s for s in HOPPER_SHAPES if s[0] != 4096], ids=str)
def test_gated_products_of_8_bit_floats_give_the_reference(
    shape: tuple[int, int, int], each: bool, quantized: bool, hopper: None
) -> None:
    rows, k, n = (-(-size // 16) * 16 if index else size for index, size in enumerate(shape))
    x, g, w = torch.randn(rows, k), torch.randn(n, k) * 9, torch.randn(n, k) * 9
    scales = [(torch.rand(n) + 0.1 if each else torch.tensor([0.7])) / k**0.5 / 9 for _ in range(2)]
    x_scale, out_scale = torch.rand(rows, 1) + 0.1 if each else torch.tensor(0.5), torch.tensor(0.05)
    given = (*(t.to(torch.float8_e4m3fn) for t in (x, g, w)), x_scale, *scales)
    (out,) = through_torch(GPU_OPS["fp8_gated_linear"], (*given, out_scale if quantized else None))
    wide = tuple(t.double() for t in on_gpu(given))
    ref = (
        OPS["gated_linear"]
        .reference(wide[0] * wide[3], wide[1] * wide[4].reshape(-1, 1), wide[2] * wide[5].reshape(-1, 1))
        .cpu()
    )
    assert out.dtype == (torch.float8_e4m3fn if quantized else torch.bfloat16)
    assert error(out.double() * (0.05 if quantized else 1), ref) <= (4e-2 if quantized else 6e-3)


@pytest.mark.parametrize("rows", [1, 20, 33, 200])
def test_gated_products_of_8_bit_floats_take_strided_rows_and_none(rows: int, hopper: None) -> None:
    kind, one = torch.float8_e4m3fn, torch.tensor(0.3)
    x, g, w = (torch.randn(n, 256).to(kind)[:, 16:112] for n in (rows, 272, 272))
    op = GPU_OPS["fp8_gated_linear"]
    for out_scale in (None, torch.tensor(2.0)):
        arguments = (x, g, w, one, one, one, out_scale)
        (out,) = through_torch(op, arguments)
        assert error(out.double(), op.reference(*arguments).double()) <= (6e-3 if out_scale is None else 3e-2)
        assert through_torch(op, (x[:0], *arguments[1:]))[0].shape == (0, 272)


NORMS = [name for name in OPS if name.endswith("norm")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["fp8_{}", "{}_fp8"], ids=["too", "alone"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_that_quantize_give_the_reference(norm: str, form: str, dtype: str, gpu: None) -> None:
    op = GPU_OPS[form.format(norm)]
    for _, what, plain in gpu_cases(norm):
        arguments = (*to_dtype(plain, DTYPES[dtype]), torch.tensor([0.02]))
        outs, refs = through_torch(op, arguments), expected(op, arguments)
        for out, ref in zip(outs[:-1], refs[:-1], strict=True):
            assert error(out, ref) <= tolerance("kpdeploy", dtype, what), what
        # Float32 and float64 differ where two 8-bit floats are as near.
        assert outs[-1].dtype == torch.float8_e4m3fn
        assert error(outs[-1].double(), refs[-1].double()) <= 5e-3, what


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_in_8_bits_alone_is_that_of_both(norm: str, gpu: None) -> None:
    """Bit for bit, and named in its errors."""
    with_both, by_itself = (getattr(torch.ops.kpdeploy, name) for name in (f"fp8_{norm}", f"{norm}_fp8"))
    for _, what, plain in gpu_cases(norm):
        arguments = on_gpu((*to_dtype(plain, torch.bfloat16), torch.tensor([0.02])))
        both, alone = (tuple_of(op(*arguments)) for op in (with_both, by_itself))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(alone, both[1:], strict=True)), what
    with pytest.raises(RuntimeError, match=rf"{norm}_fp8: out_scale is \[2\]: one element fits"):
        by_itself(*arguments[:-1], arguments[-1].expand(2).clone())


ATTENDED = ((1, 128, 12), (2, 100, 12), (2, 128, 12), (4, 64, 12), (3, 17, 12), (1, 200, 16), (1, 50, 2), (2, 33, 1),
            (1, 300, 12), (5, 129, 12))  # fmt: skip
"""Batch, length and heads of 64: 16 and 32 rows to a cluster, tails, one head, and more than one kernel takes."""


def _attended(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """Query, key, value, lengths, heads, scale; weight, bias, residual, and the norm's weight and bias."""
    batch, length, heads = shape
    width = heads * 64
    q, k, v = torch.randn(batch, length, 3 * width).to(dtype).chunk(3, dim=-1)
    lengths = torch.randint(0, length + 1, (2 * batch,))[::2]
    w = (torch.randn(width, width) / width**0.5).to(dtype)
    r = torch.randn(batch, length, width).to(dtype)
    bias, weight, shift = torch.randn(3, width).to(dtype)
    return (q, k, v, lengths, None, heads, 0.125), (w, bias, r, weight, shift)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENDED, ids=str)
def test_attention_with_its_output_and_norm_gives_the_reference(
    shape: tuple[int, int, int], dtype: str, causal: bool, gpu: None
) -> None:
    op = GPU_OPS["attention_add_layer_norm"]
    attention, (w, bias, r, weight, shift) = _attended(shape, DTYPES[dtype])
    for lengths, b, s in ((attention[3], bias, shift), (None, None, None)):
        arguments = (*attention[:3], lengths, *attention[4:], causal, w, b, r, weight, s, 1e-5)
        assert worst(through_torch(op, arguments), expected(op, arguments)) <= tolerance("kpdeploy", dtype, "")


PACKED = ((128,), (100,), (60, 68), (16, 16, 1, 95), (1,) * 40, (7, 0, 0, 200, 13), (0, 0), (250, 4, 2), (300, 20))
"""Lengths of packed sequences; twelve tokens more belong to none of them."""


def _packed(each: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """As _attended."""
    (q, k, v, *_), others = _attended((1, sum(each) + 12, 12), dtype)
    return (q, k, v, None, torch.tensor([0, *each]).cumsum(0), 12, 0.125), others


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", PACKED, ids=str)
def test_packed_attention_with_its_output_and_norm_gives_the_reference(
    each: tuple[int, ...], dtype: str, causal: bool, gpu: None
) -> None:
    attention, (w, bias, r, weight, shift) = _packed(each, DTYPES[dtype])
    op, arguments = GPU_OPS["attention_add_layer_norm"], (*attention, causal, w, bias, r, weight, shift, 1e-5)
    assert worst(through_torch(op, arguments), expected(op, arguments)) <= tolerance("kpdeploy", dtype, "")


@pytest.mark.parametrize("each", PACKED, ids=str)
def test_packed_attention_with_its_output_in_8_bits_and_norm_gives_the_reference(
    each: tuple[int, ...], hopper: None
) -> None:
    attention, (w, bias, r, weight, shift) = _packed(each, torch.bfloat16)
    w8, scale, x_scale = (w * 300).to(torch.float8_e4m3fn), torch.tensor([0.7 / 300]), torch.tensor([0.007])
    arguments = (*attention, False, w8, x_scale, scale, bias, r, weight, shift, 1e-5, torch.tensor([0.02]))
    op = GPU_OPS["fp8_attention_add_layer_norm"]
    outs, refs = through_torch(op, arguments), expected(op, arguments)
    assert worst(outs[:-1], refs[:-1]) <= 6e-3
    assert error(outs[-1].double(), refs[-1].double()) <= 4e-2


def test_packed_attention_with_its_output_keeps_a_sequences_nan_to_itself(hopper: None) -> None:
    attention, others = _packed((30, 45, 53), torch.bfloat16)
    *(q, k, v), _, offsets, heads, scale = on_gpu(attention)
    given, op = on_gpu(others), torch.ops.kpdeploy.attention_add_layer_norm
    clean = op(q, k, v, None, offsets, heads, scale, False, *given, 1e-5)[0]
    for tensor in (q, k, v):
        tensor[:, 30:75] = torch.nan
    out = op(q, k, v, None, offsets, heads, scale, False, *given, 1e-5)[0]
    assert out[:, 30:75].isnan().all()
    assert torch.equal(out[:, :30], clean[:, :30])
    assert torch.equal(out[:, 75:], clean[:, 75:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 19])
def test_attention_with_its_output_of_fewer_queries_than_keys_gives_the_reference(
    queries: int, causal: bool, hopper: None
) -> None:
    op = GPU_OPS["attention_add_layer_norm"]
    (q, k, v, *rest), (w, bias, r, weight, shift) = _attended((3, 61, 4), torch.bfloat16)
    arguments = (q[:, :queries], k, v, *rest, causal, w, bias, r[:, :queries], weight, shift, 1e-5)
    assert worst(through_torch(op, arguments), expected(op, arguments)) <= tolerance("kpdeploy", "bfloat16", "")


@pytest.mark.parametrize("each", [False, True], ids=["one scale", "row scales"])
@pytest.mark.parametrize("shape", ATTENDED, ids=str)
def test_attention_with_its_output_in_8_bits_and_norm_gives_the_reference(
    shape: tuple[int, int, int], each: bool, hopper: None
) -> None:
    op = GPU_OPS["fp8_attention_add_layer_norm"]
    attention, (w, bias, r, weight, shift) = _attended(shape, torch.bfloat16)
    w8, x_scale, out_scale = (w * 300).to(torch.float8_e4m3fn), torch.tensor([0.007]), torch.tensor([0.02])
    scales = (torch.rand(w.shape[0]) + 0.5 if each else torch.tensor([0.7])) / 300
    arguments = (*attention, False, w8, x_scale, scales, bias, r, weight, shift, 1e-5, out_scale)
    outs, refs = through_torch(op, arguments), expected(op, arguments)
    assert worst(outs[:-1], refs[:-1]) <= 6e-3
    assert outs[-1].dtype == torch.float8_e4m3fn
    assert error(outs[-1].double(), refs[-1].double()) <= 4e-2


@pytest.mark.parametrize("shape", ATTENDED, ids=str)
def test_attention_with_its_output_reads_no_key_beyond_the_length(shape: tuple[int, int, int], hopper: None) -> None:
    attention, others = _attended(shape, torch.bfloat16)
    *(q, k, v), lengths, _, heads, scale = on_gpu(attention)
    others, ops = on_gpu(others), torch.ops.kpdeploy
    outs = []
    with constant_weights():
        for beyond in (0.0, torch.nan):
            for tensor in (k, v):
                for i, length in enumerate(lengths.tolist()):
                    tensor[i, length:] = beyond
            torch.cuda.synchronize()
            outs.append(ops.attention_add_layer_norm(q, k, v, lengths, None, heads, scale, False, *others, 1e-5))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert all(out.isfinite().all() for out in outs[1])
    lengths[0] = -1
    out = ops.attention_add_layer_norm(q, k, v, lengths, None, heads, scale, False, *others, 1e-5)[0]
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_gives_the_reference(dtype: str, gpu: None) -> None:
    torch.manual_seed(7)
    wide = torch.randn(33, 104)
    inputs = [torch.randn(shape) for shape in ((1,), (3, 7), (2, 5, 16), (70, 65), (0, 8), (515, 768), (1, 100_003))]
    inputs += [wide[:, :96], wide[:, 1:], torch.randn(4, 6, 48).transpose(0, 1), wide[:1].expand(5, 104)]
    op, scale = GPU_OPS["fp8_quantize"], torch.tensor(0.3)
    for plain in inputs:
        (x,) = to_dtype((plain,), DTYPES[dtype])
        (out,) = through_torch(op, (x, scale))
        assert out.is_contiguous()
        assert error(out.double(), op.reference(x, scale).double()) <= 5e-3, x.shape
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 0.0], dtype=DTYPES[dtype])
    found = through_torch(op, (x, scale))[0].double()
    assert found[0].isnan()
    assert found[1:].tolist() == [448, -448, 448, -448, 0]


CALLS = pytest.mark.parametrize(
    ("queries", "heads", "size"),
    [(40, 2, 36), (40, 2, 32), (40, 1, 64), (300, 2, 64), (200, 1, 128), (300, 2, 24), (200, 3, 88), (40, 1, 104)],
)
"""By the general kernel, and on compute capability 9.0 by those for few and for many queries."""


QUANTIZED = ("attention", "packed_attention")
"""Ops that have a form, <name>_fp8, that gives its result in 8 bits."""


def scale_for(result: torch.Tensor) -> torch.Tensor:
    """With which 8-bit floats hold a result."""
    most = float(result.double().abs().amax()) if result.numel() else 0.0
    return torch.tensor([max(most, 1e-3) / 400])


def rounded(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A value that has gone through 8-bit floats."""
    return GPU_OPS["fp8_quantize"].reference(value, scale).double() * scale.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_attention_that_quantizes_gives_the_reference(name: str, dtype: str, gpu: None) -> None:
    for _, what, plain in gpu_cases(name):
        arguments = to_dtype(plain, DTYPES[dtype])
        (ref,) = expected(OPS[name], arguments)
        scale = scale_for(ref)
        (out,) = through_torch(GPU_OPS[f"{name}_fp8"], (*arguments, scale))
        assert out.dtype == torch.float8_e4m3fn
        # Where attention's own error takes a value to the other 8-bit float, that is at most twice as much farther off.
        most = error(rounded(ref, scale), ref) + 2 * tolerance("kpdeploy", dtype, what)
        assert error(out.double() * scale.double(), ref) <= most, what


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", ATTENTION_HEADS)
def test_heads_of_every_size_are_quantized_as_they_come_out(size: int, dtype: str, hopper: None) -> None:
    for name, plain in head_cases(size):
        arguments = to_dtype(plain, DTYPES[dtype])
        (wide,) = through_torch(OPS[name], arguments)
        scale = scale_for(wide)
        (out,) = through_torch(GPU_OPS[f"{name}_fp8"], (*arguments, scale))
        most = error(rounded(wide, scale), wide.double()) + 2 * tolerance("kpdeploy", dtype, "")
        assert error(out.double() * scale.double(), wide.double()) <= most, (name, plain[3:])


@CALLS
def test_what_attention_in_8_bits_does_not_see(queries: int, heads: int, size: int, gpu: None) -> None:
    """Keys beyond a length, rows beyond all sequences, queries without keys, lengths that are none."""
    ops, scale = torch.ops.kpdeploy, torch.full((1,), 0.02, device="cuda")
    for dtype in DTYPES.values():
        q, k, v = torch.randn(3, 4, queries, heads * size, device="cuda", dtype=dtype)
        lengths = torch.tensor([queries, 11, 0, queries + 1], device="cuda")
        call = (heads, heads, 0.2, False, scale)
        with outputs_poisoned():
            clean = ops.attention_fp8(q, k, v, lengths, *call)
        k[1, 11:] = v[1, 11:] = torch.nan
        assert torch.equal(bits(ops.attention_fp8(q, k, v, lengths, *call)), bits(clean))
        assert clean[:2].float().isfinite().all()
        assert not clean[2].float().any()
        assert clean[3].isnan().all()
        v[0] *= 1e4
        large = ops.attention_fp8(q, k, v, lengths, *call)[0].float()
        assert large.abs().amax() == 448
        flat = [t[:2].reshape(1, 2 * queries, heads * size) for t in (q, k, k)]
        offsets = torch.tensor([0, queries, queries], device="cuda")
        with outputs_poisoned():
            packed = ops.packed_attention_fp8(*flat, offsets, *call)
        assert packed[:, :queries].float().isfinite().all()
        assert not packed[:, queries:].float().any()


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.uint8)


@CALLS
def test_a_batch_in_8_bits_is_its_rows(queries: int, heads: int, size: int, gpu: None) -> None:
    ops, scale = torch.ops.kpdeploy, torch.full((1,), 0.01, device="cuda")
    q, k, v = torch.randn(3, 3, queries, heads * size, device="cuda").bfloat16()
    for causal in (False, True):
        call = (heads, heads, 0.2, causal, scale)
        whole = ops.attention_fp8(q, k, v, None, *call)
        rows = [ops.attention_fp8(q[i : i + 1], k[i : i + 1], v[i : i + 1], None, *call) for i in range(3)]
        assert torch.equal(bits(whole), bits(torch.cat(rows)))


@pytest.mark.parametrize("shape", [(2, 300, 300, 4, 2, 64), (3, 100, 100, 5, 1, 128), (1, 1, 8192, 32, 8, 128),
                                   (2, 77, 77, 2, 2, 256)], ids=str)  # fmt: skip
def test_a_cuda_graph_replays_attention_in_8_bits(shape: tuple[int, ...], gpu: None) -> None:
    batch, queries, keys, heads, kv_heads, size = shape
    q, k, v = (
        torch.randn(batch, n, h * size, device="cuda").bfloat16()
        for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )
    op, scale = torch.ops.kpdeploy.attention_fp8, torch.full((1,), 0.001, device="cuda")
    op(q, k, v, None, heads, kv_heads, size**-0.5, True, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(q, k, v, None, heads, kv_heads, size**-0.5, True, scale)
    for _ in range(3):
        q.normal_()
        scale.mul_(2)
        graph.replay()
        wanted = op(q, k, v, None, heads, kv_heads, size**-0.5, True, scale)
        assert torch.equal(bits(captured), bits(wanted))


def test_attention_in_8_bits_that_cannot_quantize_is_one_clear_error(gpu: None) -> None:
    x, one = torch.randn(2, 40, 64, device="cuda"), torch.ones(1, device="cuda")
    call = (None, 2, 2, 0.2, False)
    with pytest.raises(RuntimeError, match=r"out_scale is \[2\]: one element fits"):
        torch.ops.kpdeploy.attention_fp8(x, x, x, *call, one.expand(2).clone())
    with pytest.raises(RuntimeError, match="out_scale is on the CPU"):
        torch.ops.kpdeploy.attention_fp8(x, x, x, *call, one.cpu())
    with pytest.raises(RuntimeError, match="offsets has not the shape"):
        torch.ops.kpdeploy.packed_attention_fp8(x, x, x, x[0, :1, :0].long(), 2, 2, 0.2, False, one)


def tuple_of(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def size_of(arguments: Arguments) -> int:
    return sum(a.numel() for a in arguments if isinstance(a, torch.Tensor))


def expected(op: Op, arguments: Arguments) -> tuple[torch.Tensor, ...]:
    """The float64 reference, on the CPU; of large calls on the GPU."""
    large = size_of(arguments) > 1_000_000
    return tuple(ref.cpu() for ref in calls.reference(op, on_gpu(arguments) if large else arguments))


@contextlib.contextmanager
def outputs_poisoned() -> Iterator[None]:
    """Memory that torch allocates holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with fill_uninitialized_memory, on by default
    try:
        assert torch.empty_strided((99,), (1,), device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def through_torch(op: Op, arguments: Arguments) -> tuple[torch.Tensor, ...]:
    moved = on_gpu(arguments)
    with outputs_poisoned():
        outs = getattr(torch.ops.kpdeploy, op.name)(*moved)
    return tuple(out.cpu() for out in tuple_of(outs))


@functools.lru_cache(maxsize=8)
def session_of(model: bytes, library: str, provider: str = PROVIDER) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(provider == PROVIDER)))
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def through_onnxruntime(op: Op, arguments: Arguments, library: str, constant: bool = False) -> tuple[torch.Tensor, ...]:
    """Inputs and outputs are torch's memory on the GPU; the outputs held NaN."""
    from onnx import TensorProto

    kinds = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16}
    session = session_of(calls.onnx_model(op, arguments, constant=constant), library)
    dense = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments)
    tensors = [a for a in on_gpu(dense) if isinstance(a, torch.Tensor) or a is None]
    fakes = op.fake(*dense)
    outs = [torch.full(f.shape, torch.nan, dtype=f.dtype, device="cuda") for f in tuple_of(fakes)]
    spare = torch.empty(1, device="cuda")  # an empty tensor has no address, and ONNX Runtime wants one
    binding = session.io_binding()
    wanted = {entry.name for entry in session.get_inputs()}
    for index, tensor in enumerate(tensors):
        if f"i{index}" in wanted:
            kind = kinds.get(tensor.dtype, TensorProto.INT64)
            address = tensor.data_ptr() or spare.data_ptr()
            binding.bind_input(f"i{index}", "cuda", 0, kind, tuple(tensor.shape), address)
    for index, out in enumerate(outs):
        address = out.data_ptr() or spare.data_ptr()
        binding.bind_output(f"o{index}", "cuda", 0, kinds[out.dtype], tuple(out.shape), address)
    torch.cuda.synchronize()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return tuple(out.cpu() for out in outs)


def worst(outs: tuple[torch.Tensor, ...], refs: tuple[torch.Tensor, ...]) -> float:
    return max(error(out, ref) for out, ref in zip(outs, refs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_torch_gives_the_reference(name: str, dtype: str, gpu: None) -> None:
    for _, what, plain in gpu_cases(name):
        arguments = to_dtype(plain, DTYPES[dtype], OPS[name])
        outs = through_torch(OPS[name], arguments)
        assert all(out.dtype == DTYPES[dtype] for out in outs)
        assert worst(outs, expected(OPS[name], arguments)) <= tolerance("kpdeploy", dtype, what), what


@pytest.mark.parametrize("constant", [False, True], ids=["inputs", "constants"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_onnx_runtime_gives_the_reference(name: str, dtype: str, constant: bool, cuda_provider: str) -> None:
    for _, what, plain in gpu_cases(name)[:: 4 if constant else 1]:
        arguments = to_dtype(plain, DTYPES[dtype], OPS[name])
        outs = through_onnxruntime(OPS[name], arguments, cuda_provider, constant)
        assert worst(outs, expected(OPS[name], arguments)) <= tolerance("kpdeploy", dtype, what), what


def one_of(name: str, dtype: torch.dtype = torch.float32) -> Arguments:
    """An ordinary call of an op, on the GPU."""
    small = (case for case in cases_of(name) if case[2][0].numel() < 3000)
    return on_gpu(to_dtype(max(small, key=lambda case: case[2][0].numel())[2], dtype, OPS[name]))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, gpu: None) -> None:
    torch.library.opcheck(getattr(torch.ops.kpdeploy, name).default, one_of(name, torch.float16))


def test_ops_run_on_the_current_stream_after_what_is_queued_there(gpu: None) -> None:
    stream, x, w = torch.cuda.Stream(), torch.zeros(64, 512, device="cuda"), torch.ones(512, device="cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy / 64
        x.copy_(torch.arange(512.0, device="cuda").expand(64, 512))
        out = torch.ops.kpdeploy.rms_norm(x, w, 0.0)
    stream.synchronize()
    assert error(out.cpu(), calls.reference(OPS["rms_norm"], (x.cpu(), w.cpu(), 0.0))[0]) < 2e-6


@pytest.mark.parametrize("name", OPS)
def test_a_cuda_graph_replays_an_op(name: str, gpu: None) -> None:
    arguments = one_of(name)
    op = getattr(torch.ops.kpdeploy, name)
    op(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*arguments)
    arguments[0].mul_(0.5)
    graph.replay()
    wanted = op(*arguments)
    for out, ref in zip(tuple_of(captured), tuple_of(wanted), strict=True):
        assert torch.equal(out, ref)


class Block(torch.nn.Module):
    """Ops in a row, in bfloat16 on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"up": (96, 64), "gate": (96, 64), "down": (64, 96), "ones": (64,)}.items():
            self.register_buffer(name, torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 8)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.kpdeploy
        a = ops.attention(x, x, x, lengths, 2, 2, 0.18, True)
        h, s = ops.add_layer_norm(a, x, self.ones, None, 1e-5)
        m = ops.linear_activation(ops.gated_linear(h, self.gate, self.up), self.down, self.ones, "gelu")
        out: torch.Tensor = ops.rms_norm(m + s, self.ones, 1e-5)
        return out


SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
aoti = sys.argv[2].endswith("aoti.pt2")
model = torch._inductor.aoti_load_package(sys.argv[2]) if aoti else torch.export.load(sys.argv[2]).module()
x, lengths, wanted = torch.load(sys.argv[3])
out = model(x, lengths)
assert (out - wanted).norm() <= 1e-2 * wanted.norm(), (out - wanted).abs().max()
print(out.device, "kpdeploy" in sys.modules)
"""


class Plain(torch.nn.Module):
    """The same inputs, without an op of ours."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x.relu() * lengths[:, None, None]


def alone(artifact: str, folder: Path, library: str, model: torch.nn.Module) -> subprocess.CompletedProcess[str]:
    """The artifact of a model, run by a process that has torch and the library, and no kpdeploy."""
    path = folder / artifact
    x, lengths = torch.randn(3, 21, 64, device="cuda", dtype=torch.bfloat16), torch.tensor([21, 1, 7], device="cuda")
    program = torch.export.export(model, (x, lengths))
    if artifact.endswith("aoti.pt2"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        torch.export.save(program, path)
    torch.save((x, lengths, model(x, lengths)), folder / "case.pt")
    command = [sys.executable, "-X", "faulthandler", "-c", SCRIPT, library, str(path), str(folder / "case.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("artifact", ["saved.pt2", "aoti.pt2"])
def test_an_artifact_runs_on_the_gpu_with_the_library_alone(
    artifact: str, tmp_path: Path, gpu: None, torch_library: str
) -> None:
    done = alone(artifact, tmp_path, torch_library, Block())
    if done.returncode == -11 and alone(f"plain_{artifact}", tmp_path, torch_library, Plain()).returncode == -11:
        pytest.skip(f"NOT RUN: {artifact} on a GPU: torch {torch.__version__} crashes on one of its own operators, too")
    assert (done.returncode, done.stdout) == (0, "cuda:0 False\n"), done.stderr[-4000:]


class Asked(torch.nn.Module):
    """Asks about a size what torch.export cannot settle."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[1] * x.shape[1] % 3 != 2)
        out: torch.Tensor = self.linear(x)
        return out


def test_a_graph_that_asserts_sizes_is_captured_on_the_gpu(gpu: None) -> None:
    signature = parse_inputs(["x:float32[batch=1..4,seq=1..9,8]"])
    described = model_from_module(Asked(), signature, name="asked", source={}, keywords=False)
    program = program_of(replace(described, module=Flat(Asked().cuda(), None)))
    assert program.module()(torch.ones(1, 9, 8, device="cuda"))[0].is_cuda


def test_a_second_gpu_is_made_current(cuda_provider: str) -> None:
    import onnxruntime

    if torch.cuda.device_count() < 2:
        pytest.skip("NOT RUN: kernels on a GPU that is not the current one: this machine has one")
    x, w = torch.randn(8, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    out = torch.ops.kpdeploy.rms_norm(x, w, 1e-6)
    assert torch.cuda.current_device() == 0
    assert error(out.cpu(), calls.reference(OPS["rms_norm"], (x.cpu(), w.cpu(), 1e-6))[0]) < 2e-6
    with pytest.raises(RuntimeError, match="weight is on GPU 0, and x on GPU 1"):
        torch.ops.kpdeploy.rms_norm(x, w.to("cuda:0"), 1e-6)

    arguments = (x.cpu(), w.cpu(), 1e-6)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(cuda_provider)
    model = calls.onnx_model(OPS["rms_norm"], arguments)
    with torch.cuda.device(0):  # ONNX Runtime leaves the GPU of its last run current
        session = onnxruntime.InferenceSession(model, options, providers=[(PROVIDER, {"device_id": 1})])
        (found,) = session.run(None, {"i0": arguments[0].numpy(), "i1": arguments[1].numpy()})
    assert torch.equal(torch.from_numpy(found), out.cpu())


@CALLS
def test_keys_beyond_the_length_are_not_read(queries: int, heads: int, size: int, gpu: None) -> None:
    for dtype in DTYPES.values():
        q, k, v = torch.randn(3, 2, queries, heads * size, device="cuda", dtype=dtype)
        lengths = torch.tensor([queries, 11], device="cuda")
        clean = torch.ops.kpdeploy.attention(q, k, v, lengths, heads, heads, 0.2, False)
        k[1, 11:] = torch.nan
        v[1, 11:] = torch.nan
        assert torch.equal(torch.ops.kpdeploy.attention(q, k, v, lengths, heads, heads, 0.2, False), clean)


@CALLS
def test_nan_and_infinity_in_a_key_that_counts_come_out(queries: int, heads: int, size: int, gpu: None) -> None:
    for dtype in DTYPES.values():
        q, k, v = torch.randn(3, 1, queries, heads * size, device="cuda", dtype=dtype)
        k[0, 7] = torch.nan
        assert torch.ops.kpdeploy.attention(q, k, v, None, heads, heads, 0.2, False).isnan().all()
        k[0, 7], v[0, 7] = 0, torch.inf
        assert torch.ops.kpdeploy.attention(q, k, v, None, heads, heads, 0.2, False).isinf().all()


@CALLS
def test_scores_that_rise_from_block_to_block(queries: int, heads: int, size: int, gpu: None) -> None:
    """The maximum so far is far too low for every next block of keys, whichever end is first."""
    for sign in (1, -1):
        q = torch.full((1, queries, heads * size), 1.0, device="cuda")
        k = torch.linspace(-sign, sign, 1000, device="cuda")[None, :, None].expand(1, 1000, heads * size).contiguous()
        v = torch.randn(1, 1000, heads * size, device="cuda")
        plain = (q, k, v, None, heads, heads, 2.0, False)
        for dtype in ("bfloat16", "float16"):
            arguments = on_gpu(to_dtype(plain, DTYPES[dtype]))
            out = torch.ops.kpdeploy.attention(*arguments)
            assert error(out.cpu(), expected(OPS["attention"], arguments)[0]) <= 2 * tolerance("kpdeploy", dtype, "")


@CALLS
@pytest.mark.parametrize("beyond", [False, True])
def test_a_length_out_of_range_gives_nan_in_its_row_alone(
    beyond: bool, queries: int, heads: int, size: int, gpu: None
) -> None:
    for dtype in DTYPES.values():
        q, k, v = torch.randn(3, 2, queries, heads * size, device="cuda", dtype=dtype)
        lengths = torch.tensor([queries + 1 if beyond else -1, queries], device="cuda")
        out = torch.ops.kpdeploy.attention(q, k, v, lengths, heads, heads, 0.2, False)
        assert out[0].isnan().all()
        assert torch.equal(out[1], torch.ops.kpdeploy.attention(q, k, v, None, heads, heads, 0.2, False)[1])


def test_keys_shared_among_blocks_give_the_same_again_and_again(hopper: None) -> None:
    """Decoding: in a graph that is replayed, and on streams that run beside each other."""
    op = torch.ops.kpdeploy.attention
    q, k, v = (torch.randn(1, n, h * 128, device="cuda").bfloat16() for n, h in ((1, 32), (8192, 8), (8192, 8)))
    calls_of = [(q * i, k, v, None, 32, 8, 0.1, False) for i in range(4)]
    wanted = [op(*call) for call in calls_of]
    graph, slot = torch.cuda.CUDAGraph(), q.clone()
    with torch.cuda.graph(graph):
        captured = [op(slot, *call[1:]) for call in calls_of]
    streams = [torch.cuda.Stream() for _ in calls_of]
    torch.cuda.synchronize()
    for i in range(20):
        slot.copy_(calls_of[i % 4][0])
        graph.replay()
        assert all(torch.equal(out, wanted[i % 4]) for out in captured), i
        torch.cuda.synchronize()
        outs = []
        for stream, call in zip(streams, calls_of, strict=True):
            with torch.cuda.stream(stream):
                outs += [op(*call) for _ in range(5)]
        torch.cuda.synchronize()
        assert all(torch.equal(out, wanted[j // 5]) for j, out in enumerate(outs)), i


@CALLS
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_read_nothing_of_each_other(
    causal: bool, queries: int, heads: int, size: int, gpu: None
) -> None:
    for dtype in DTYPES.values():
        q, k, v = torch.randn(3, 1, 2 * queries + 50, heads * size, device="cuda", dtype=dtype)
        offsets = torch.tensor([0, queries, queries, 2 * queries], device="cuda")
        call = (offsets, heads, heads, 0.2, causal)
        clean = torch.ops.kpdeploy.packed_attention(q, k, v, *call)
        assert not clean[:, 2 * queries :].any()
        for tensor in (q, k, v):
            tensor[:, queries:] = torch.nan
        out = torch.ops.kpdeploy.packed_attention(q, k, v, *call)
        assert torch.equal(out[:, :queries], clean[:, :queries])
        assert out[:, queries : 2 * queries].isnan().all()
        assert not out[:, 2 * queries :].any()


@CALLS
def test_offsets_out_of_range_read_and_write_nothing_else(queries: int, heads: int, size: int, gpu: None) -> None:
    for dtype in DTYPES.values():
        q, k, v = torch.randn(3, 1, 2 * queries, heads * size, device="cuda", dtype=dtype)
        wrong = torch.tensor([-(1 << 40), queries, 1 << 40, -5], device="cuda")
        torch.ops.kpdeploy.packed_attention(q, k, v, wrong, heads, heads, 0.2, False)
        beyond = torch.tensor([0, queries, 1 << 40], device="cuda")
        out = torch.ops.kpdeploy.packed_attention(q, k, v, beyond, heads, heads, 0.2, False)
        within = torch.tensor([0, queries, 2 * queries], device="cuda")
        assert torch.equal(out, torch.ops.kpdeploy.packed_attention(q, k, v, within, heads, heads, 0.2, False))


X, W = torch.ones(4, 8), torch.ones(6, 8)


@pytest.mark.parametrize(
    ("name", "arguments", "moved", "message"),
    [
        ("linear_activation", (X, W[:, :5], None, "gelu"), "01", "weight is [6, 5], which does not fit x [4, 8]"),
        ("linear_activation", (X, W, X[0], "gelu"), "012", "bias is [8]; [6] fits"),
        ("linear_activation", (X, W, None, "tanh"), "01", "activation is none of"),
        ("linear_activation", (X, W.half(), None, "gelu"), "01", "weight is float16, and x is float32"),
        ("linear_activation", (X, W, None, "gelu"), "0", "weight is on the CPU, and x on GPU 0"),
        ("linear_activation", (X, W, None, "gelu"), "1", "weight is on GPU 0, and x on the CPU"),
        ("gated_linear", (X, W, W[:3]), "012", "gate_weight is [6, 8], and up_weight is [3, 8]"),
        ("rms_norm", (X.double(), X[0].double(), 1e-5), "01", "the CUDA kernels take float32, bfloat16 and float16"),
        ("add_layer_norm", (X, X, X[0], None, 1e-5), "02", "residual is on the CPU, and x on GPU 0"),
        ("attention", (X, X, X, None, 2, 2, 1.0, False), "012", "query has 2 dims, not at least 3"),
        ("attention", (X[None], X[None], X[None], torch.tensor([4]), 2, 2, 1.0, False), "012",
         "lengths is on the CPU, and query on GPU 0"),
        ("attention", (X[None], X[None], X[None], torch.tensor([4, 4]), 2, 2, 1.0, False), "0123", "lengths has not"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_clear_error(name: str, arguments: Arguments, moved: str, message: str, gpu: None) -> None:
    """`moved`: which arguments are on the GPU."""
    given = [on_gpu((a,))[0] if str(i) in moved else a for i, a in enumerate(arguments)]
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.kpdeploy, name)(*given)
    assert message in str(raised.value)
    assert torch.ones(1, device="cuda").item() == 1  # the process and its GPU go on


def test_wrong_use_in_onnx_runtime_is_one_clear_error(cuda_provider: str) -> None:
    with pytest.raises(Exception, match=r"weight is \[6, 5\], which does not fit x \[4, 8\]"):
        through_onnxruntime(OPS["linear_activation"], (X, W[:, :5], None, "gelu"), cuda_provider)


def test_float16_on_the_cpu_is_cast_by_onnx_runtime_or_refused(onnx_library: str) -> None:
    """A library with CUDA kernels makes float16 a type of its ops; ONNX Runtime then casts around those for the CPU."""
    core = pytest.importorskip("kpdeploy._core")
    arguments = (torch.randn(4, 33).half(), torch.randn(33).half(), 1e-5)
    model = calls.onnx_model(OPS["rms_norm"], arguments)
    if not core.cuda():
        with pytest.raises(Exception, match=r"tensor\(float16\).* of operator \(RmsNorm\)"):
            session_of(model, onnx_library, "CPUExecutionProvider")
        return
    session = session_of(model, onnx_library, "CPUExecutionProvider")
    out = session.run(None, {"i0": arguments[0].numpy(), "i1": arguments[1].numpy()})[0]
    assert error(torch.from_numpy(out), calls.reference(OPS["rms_norm"], arguments)[0]) <= 5e-4
