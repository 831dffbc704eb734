"""Linears and norms on a GPU of compute capability 9.0 beside their strongest peers, in one run.

    python benchmarks/hopper_linear.py --json benchmarks/results/hopper_linear_h100.json
    python benchmarks/hopper_linear.py --measure kpdeploy/ops/gpu_measured.tsv   # who multiplies, for this GPU's rows

Times are medians of replays of CUDA graphs, in microseconds a call; the replays of all that is compared take turns, so
that none has the cooler chip, and calls rotate among sets of inputs that together exceed the second cache. Errors are
‖out - ref‖ / ‖ref‖ against float64 on fresh random inputs, into outputs that held NaN. Floors: bytes over the measured
rate of a device copy, operations over the measured rate of cuBLAS at 8192³.
"""

# ruff: noqa: B023 - each lambda is called in the turn of the loop that makes it

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kpdeploy.decision import Applied, Skipped  # noqa: E402
from kpdeploy.ops import GPU_OPS, OPS, calls, register  # noqa: E402
from kpdeploy.ops.libraries import TORCH, constant_weights, find  # noqa: E402
from kpdeploy.optimize.fp8 import weight_scales  # noqa: E402

Row = dict[str, Any]
Call = Callable[[], Any]
Graph = tuple[torch.cuda.CUDAGraph, int]
"""And how many calls it holds."""
BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
L2_BYTES = 50 << 20
COLUMNS = ["device", "op", "dtype", "activation", "rows", "inputs", "outputs", "provider"]
COLUMNS += ["kpdeploy_us", "cublaslt_us", "separate_us"]


class Library:
    """The provider of products, forced or as measured."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.set, self.use_constant_weights = library.kpdeploy_use_gpu_providers, library.kpdeploy_use_constant_weights
        self.set.argtypes = (ctypes.c_char_p,)

    def use(self, provider: str, **call: Any) -> None:
        """For one product; "": what was built in."""
        head = "\t".join(COLUMNS)
        row = "\t".join(map(str, ({"device": torch.cuda.get_device_name()} | call | {"provider": provider}).values()))
        text = f"{head}\n{row}\n".encode() if provider else None
        assert self.set(text) == 0

    def with_constant_weights(self, run: Sequence[Call], floor: float = 0) -> Graph:
        """The graph of calls whose weights are known not to change."""
        self.use_constant_weights(1)
        try:
            return graph_of(run, floor)
        finally:
            self.use_constant_weights(0)


def new(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def graph_of(run: Sequence[Call], floor: float = 0) -> Graph:
    """A graph of at least 20 calls, each input set in turn. What takes `floor` microseconds fills 4 ms: a chip that is
    at its limit of power slows down within that time, and a way that draws more shall not be helped by the others."""
    rounds = -(-max(20, round(4000 / floor) if floor > 15 else 0) // len(run))
    for one in run:
        one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for one in run:
                one()
    return graph, rounds * len(run)


def compared(graphs: dict[str, Graph], replays: int = 15) -> dict[str, float]:
    """Microseconds of one call by way."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(replays + 2):
        for name, (graph, count) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn > 1:
                found[name].append(start.elapsed_time(end) * 1e3 / count)
    return {name: round(statistics.median(times), 2) for name, times in found.items()}


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    found = float((out.double() - ref).norm() / ref.norm())
    return float(f"{found:.3g}") if found == found else float("inf")


def poisoned(run: Call) -> torch.Tensor:
    """The output of a call whose memory held NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with fill_uninitialized_memory, on by default
    try:
        out = run()
    finally:
        torch.use_deterministic_algorithms(False)
    return out[0] if isinstance(out, tuple) else out


def rates() -> Row:
    a = torch.empty(1 << 28, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    x, w, out = new(8192, 8192), new(8192, 8192), new(8192, 8192)
    x8, w8, one = x.to(F8), w.to(F8), torch.ones(1, device="cuda")
    times = compared(
        {
            "copy": graph_of([lambda: b.copy_(a)]),
            "bf16": graph_of([lambda: torch.mm(x, w.t(), out=out)]),
            "fp8": graph_of([lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=BF16, use_fast_accum=True)]),
        },
        replays=3,
    )
    operations = 2 * 8192**3
    return {
        "copy_gb_s": round(2 * a.numel() / times["copy"] / 1e3),
        "bf16_tflop_s": round(operations / times["bf16"] / 1e6),
        "fp8_tflop_s": round(operations / times["fp8"] / 1e6),
    }


def floor_us(measured: Row, bytes_moved: float, operations: float, dtype: str) -> float:
    memory = bytes_moved / measured["copy_gb_s"] / 1e3
    arithmetic = operations / measured[f"{dtype}_tflop_s"] / 1e6
    return round(max(memory, arithmetic), 2)


def sets_of(bytes_each: int) -> range:
    return range(max(1, min(16, -(-3 * L2_BYTES // bytes_each))))


BOTH = ("gelu", "gelu_tanh")
ENCODER = ((768, 2304, ("none",)), (768, 768, ("none",)), (768, 3072, ("gelu",)), (3072, 768, ("none",)))
"""Of BERT-base and ViT-B/16: queries, keys and values at once, what follows attention, and the two of the MLP."""
DECODER = ((2048, 3072, ("none",)), (2048, 2048, ("none",)), (8192, 2048, ("none",)))
"""Of a Llama of 1B, beside its gated product."""
SHAPES = (
    *((rows, 1024, 4096, BOTH) for rows in (4096, 1, 16, 128)),
    (1024, 768, 3072, ("gelu_tanh",)),
    *((rows, *of) for rows in (128, 1024, 6304, 12288) for of in ENCODER),
    *((rows, *of) for rows in (1, 32, 2048) for of in DECODER),
)
"""Rows, inputs, outputs, activations."""
GATED = ((4096, 1024, 4096), (1, 1024, 4096), (16, 1024, 4096), (1, 2048, 8192), (32, 2048, 8192), (2048, 2048, 8192))


def separately(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, activation: str) -> torch.Tensor:
    """torch's linear, and then its activation."""
    out = functional.linear(x, w, b)
    if activation == "none":
        return out
    return functional.gelu(out, approximate="tanh" if activation == "gelu_tanh" else "none")


def linears(library: Library, measured: Row) -> list[Row]:
    rows: list[Row] = []
    ops = torch.ops.kpdeploy
    for m, k, n, activations in SHAPES:
        sets = sets_of(2 * (m * k + n * k + m * n))
        xs, ws, b = [new(m, k) for _ in sets], [new(n, k) / k**0.5 for _ in sets], new(n)
        floor = floor_us(measured, 2 * (m * k + n * k + m * n), 2 * m * n * k, "bf16")
        for activation in activations:
            call = {"op": "linear_activation", "dtype": "bfloat16", "activation": activation}
            call |= {"rows": m, "inputs": k, "outputs": n}
            ours = [lambda i=i: ops.linear_activation(xs[i], ws[i], b, activation) for i in sets]
            separate = [lambda i=i: separately(xs[i], ws[i], b, activation) for i in sets]
            row: Row = call | {"floor_us": floor, "us": {}, "error": {}}
            (ref,) = calls.reference(OPS["linear_activation"], (xs[0], ws[0], b, activation))
            row["error"]["separate"] = error(separate[0](), ref)
            graphs = {"separate": graph_of(separate, floor)}
            if activation != "none":
                theirs = [lambda i=i: torch._addmm_activation(b, xs[i], ws[i].t(), use_gelu=True) for i in sets]
                graphs["cublaslt_epilogue_tanh"] = graph_of(theirs, floor)
            for provider in ("kpdeploy",) if activation == "gelu" else ("kpdeploy", "cublaslt"):
                library.use(provider, **call)
                row["error"][provider] = error(poisoned(ours[0]), ref)
                graphs[provider] = graph_of(ours, floor)
                if provider == "kpdeploy":
                    graphs["kpdeploy_constant_weights"] = library.with_constant_weights(ours, floor)
            library.use("")
            row["us"] = compared(graphs, replays=15 if m < 4096 else 9)
            rows.append(row)
            print(row, flush=True)
    for m, k, n in GATED:
        sets = sets_of(2 * (m * k + 2 * n * k + m * n))
        xs, ws, gs = ([new(*s) / s[1] ** 0.5 for _ in sets] for s in ((m, k), (n, k), (n, k)))
        xs = [x * k**0.5 for x in xs]
        ours = [lambda i=i: ops.gated_linear(xs[i], gs[i], ws[i]) for i in sets]
        separate = [lambda i=i: gated(xs[i], gs[i], ws[i]) for i in sets]
        row = {"op": "gated_linear", "dtype": "bfloat16", "rows": m, "inputs": k, "outputs": n}
        row["floor_us"] = floor_us(measured, 2 * (m * k + 2 * n * k + m * n), 4 * m * n * k, "bf16")
        floor = row["floor_us"]
        graphs = {"kpdeploy": graph_of(ours, floor), "separate": graph_of(separate, floor)}
        row["us"] = compared(graphs | {"kpdeploy_constant_weights": library.with_constant_weights(ours, floor)})
        (ref,) = calls.reference(OPS["gated_linear"], (xs[0], gs[0], ws[0]))
        row["error"] = {"kpdeploy": error(poisoned(ours[0]), ref), "separate": error(separate[0](), ref)}
        rows.append(row)
        print(row, flush=True)
    return rows


FP8_SHAPES = (
    *((rows, 1024, 4096, "gelu") for rows in (4096, 16)),
    (8192, 4096, 16384, "gelu"),
    *((rows, k, n, activation) for rows in (128, 1024, 6304, 12288) for k, n, (activation,) in ENCODER),
    *((rows, k, n, "none") for rows in (32, 2048) for k, n, _ in DECODER),
)


def fp8_linears(library: Library, measured: Row) -> list[Row]:
    rows: list[Row] = []
    ops = torch.ops.kpdeploy
    one = torch.ones(1, device="cuda")
    for m, k, n, activation in FP8_SHAPES:
        sets = sets_of(m * k + n * k + 2 * m * n)
        xs, ws, b = [new(m, k) for _ in sets], [new(n, k) / k**0.5 for _ in sets], new(n)
        x8, w8 = [x.to(F8) for x in xs], [w.to(F8) for w in ws]
        each, every = torch.rand(m, 1, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5
        arguments = {
            "kpdeploy": lambda i: (x8[i], w8[i], one, one, b, None, activation),
            "kpdeploy_row_scales": lambda i: (x8[i], w8[i], each, every, b, None, activation),
            "kpdeploy_fp8_out": lambda i: (x8[i], w8[i], one, one, b, one, activation),
        }
        ways: dict[str, Sequence[Call]] = {
            name: [lambda i=i, of=of: ops.fp8_linear_activation(*of(i)) for i in sets] for name, of in arguments.items()
        }
        ways["separate_bf16"] = [lambda i=i: separately(xs[i], ws[i], b, activation) for i in sets]
        scaled = [
            lambda i=i: torch._scaled_mm(x8[i], w8[i].t(), one, one, bias=b, out_dtype=BF16, use_fast_accum=True)
            for i in sets
        ]
        ways["separate"] = scaled if activation == "none" else [lambda of=of: functional.gelu(of()) for of in scaled]
        call = {"op": "fp8_linear_activation", "dtype": "float8_e4m3fn", "activation": activation}
        call |= {"rows": m, "inputs": k, "outputs": n}
        row: Row = call | {"floor_us": floor_us(measured, m * k + n * k + 2 * m * n, 2 * m * n * k, "fp8")}
        library.use("kpdeploy", **call)
        floor = row["floor_us"]
        graphs = {name: graph_of(run, floor) for name, run in ways.items()}
        graphs["kpdeploy_constant_weights"] = library.with_constant_weights(ways["kpdeploy"], floor)
        found = {name: poisoned(ways[name][0]) for name in arguments}
        if activation == "none":
            library.use("cublaslt", **call)
            graphs["cublaslt"] = graph_of(ways["kpdeploy"], floor)
            found["cublaslt"] = poisoned(ways["kpdeploy"][0])
        library.use("")
        row["us"] = compared(graphs, replays=15 if m < 8192 else 5)
        row["error"] = {}
        for name, out in found.items():
            given = (*arguments.get(name, arguments["kpdeploy"])(0)[:5], None, activation)  # the unrounded result
            wide = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in given)
            product = functional.linear(wide[0] * wide[2], wide[1] * wide[3].reshape(-1, 1), wide[4])
            row["error"][name] = error(out, product if activation == "none" else functional.gelu(product))
            del product, wide
        rows.append(row)
        print(row, flush=True)
    assert "fp8_linear_activation" in GPU_OPS
    return rows


FP8_GATED = ((1, 2048, 8192), (16, 2048, 8192), (32, 2048, 8192), (128, 2048, 8192), (2048, 2048, 8192),
             (4096, 1024, 4096))  # fmt: skip
"""Rows, inputs, outputs: of a Llama of 1B, and the shape that all tables have."""


def in_8_bits(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight by rows, and what 1 stands for in each."""
    scale = weight_scales(w)
    return (w.float() / scale[:, None]).to(F8), scale


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """By torch's separate ops, of bfloat16."""
    return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)


def fp8_gated(library: Library, measured: Row) -> list[Row]:
    """The gated product in 8 bits (weights scaled by row, x as a whole) beside ours of bfloat16 and torch's ops."""
    rows: list[Row] = []
    ops = torch.ops.kpdeploy
    for m, k, n in FP8_GATED:
        sets = sets_of(m * k + 2 * n * k + 2 * m * n)
        xs, gs, us = [new(m, k) for _ in sets], *([new(n, k) / k**0.5 for _ in sets] for _ in range(2))
        x_scale, out_scale = torch.tensor([6 / 448], device="cuda"), torch.tensor([0.02], device="cuda")
        x8 = [(x / x_scale).clamp(-448, 448).to(F8) for x in xs]
        g8, u8 = [in_8_bits(g) for g in gs], [in_8_bits(u) for u in us]
        rows_scale = x_scale.expand(m, 1).contiguous()

        def ours(i: int, out: torch.Tensor | None) -> torch.Tensor:
            return ops.fp8_gated_linear(x8[i], g8[i][0], u8[i][0], x_scale, g8[i][1], u8[i][1], out)

        def scaled(i: int) -> torch.Tensor:
            gate, up = (
                torch._scaled_mm(x8[i], w.t(), rows_scale, scale[None], out_dtype=BF16, use_fast_accum=True)
                for w, scale in (g8[i], u8[i])
            )
            return functional.silu(gate) * up

        ways: dict[str, Sequence[Call]] = {
            "kpdeploy": [lambda i=i: ours(i, None) for i in sets],
            "kpdeploy_fp8_out": [lambda i=i: ours(i, out_scale) for i in sets],
            "kpdeploy_bf16": [lambda i=i: ops.gated_linear(xs[i], gs[i], us[i]) for i in sets],
            "separate_bf16": [lambda i=i: gated(xs[i], gs[i], us[i]) for i in sets],
            "separate": [lambda i=i: scaled(i) for i in sets],
        }
        row: Row = {"op": "fp8_gated_linear", "dtype": "float8_e4m3fn", "rows": m, "inputs": k, "outputs": n}
        row["floor_us"] = floor = floor_us(measured, m * k + 2 * n * k + 2 * m * n, 4 * m * n * k, "fp8")
        graphs = {name: graph_of(run, floor) for name, run in ways.items()}
        for name in ("kpdeploy", "kpdeploy_fp8_out", "kpdeploy_bf16"):
            graphs[f"{name}_constant_weights"] = library.with_constant_weights(ways[name], floor)
        row["us"] = compared(graphs, replays=15 if m < 2048 else 9)
        given = (x8[0], g8[0][0], u8[0][0], x_scale, g8[0][1][:, None], u8[0][1][:, None])
        x, gate, up, by_x, by_gate, by_up = (t.double() for t in given)
        ref = functional.silu(x * by_x @ (gate * by_gate).T) * (x * by_x @ (up * by_up).T)
        row["error"] = {name: error(poisoned(ways[name][0]), ref) for name in ("kpdeploy", "separate")}
        row["error"]["kpdeploy_fp8_out"] = error(poisoned(ways["kpdeploy_fp8_out"][0]).double() * out_scale, ref)
        wide = gated(xs[0].double(), gs[0].double(), us[0].double())
        row["error"]["kpdeploy_of_bf16_inputs"] = error(poisoned(ways["kpdeploy"][0]), wide)
        rows.append(row)
        print(row, flush=True)
    return rows


def norms(measured: Row) -> list[Row]:
    rows: list[Row] = []
    ops = torch.ops.kpdeploy
    one = torch.ones(1, device="cuda")
    for m, n in ((4096, 1024), (16384, 4096), (128, 768), (1024, 768), (12288, 768), (1, 2048), (2048, 2048)):
        sets = sets_of(2 * 4 * m * n)
        xs, rs, w, b = [new(m, n) for _ in sets], [new(m, n) for _ in sets], new(n), new(n)
        both = {
            "add_layer_norm": (
                [lambda i=i: ops.add_layer_norm(xs[i], rs[i], w, b, 1e-5) for i in sets],
                [lambda i=i: functional.layer_norm(xs[i] + rs[i], (n,), w, b) for i in sets],
                (xs[0], rs[0], w, b, 1e-5),
            ),
            "add_rms_norm": (
                [lambda i=i: ops.add_rms_norm(xs[i], rs[i], w, 1e-6) for i in sets],
                [lambda i=i: functional.rms_norm(xs[i] + rs[i], (n,), w, 1e-6) for i in sets],
                (xs[0], rs[0], w, 1e-6),
            ),
        }
        quantized = {
            "add_layer_norm": [lambda i=i: ops.fp8_add_layer_norm(xs[i], rs[i], w, b, 1e-5, one) for i in sets],
            "add_rms_norm": [lambda i=i: ops.fp8_add_rms_norm(xs[i], rs[i], w, 1e-6, one) for i in sets],
        }
        source = [torch.stack((x, r)) for x, r in zip(xs, rs, strict=True)]
        target = [torch.empty_like(s) for s in source]
        copies = [lambda i=i: target[i].copy_(source[i]) for i in sets]
        for op, (ours, theirs, arguments) in both.items():
            row: Row = {"op": op, "dtype": "bfloat16", "rows": m, "width": n}
            row["floor_us"] = floor_us(measured, 8 * m * n, 0, "bf16")
            run_by = {
                "kpdeploy": ours,
                "torch": theirs,
                "copy_of_as_many_bytes": copies,
                "and_quantized": quantized[op],
            }
            row["us"] = compared({name: graph_of(run) for name, run in run_by.items()})
            row["gb_s"] = {
                name: round(8 * m * n / row["us"][name] / 1e3) for name in ("kpdeploy", "copy_of_as_many_bytes")
            }
            ref = calls.reference(OPS[op], arguments)[0]
            row["error"] = {"kpdeploy": error(poisoned(ours[0]), ref), "torch": error(theirs[0](), ref)}
            rows.append(row)
            print(row, flush=True)
    return rows


def fp8_norms(measured: Row) -> list[Row]:
    """Norms that quantize, which give their result in bfloat16 too, and which do not."""
    rows: list[Row] = []
    ops, scale = torch.ops.kpdeploy, torch.full((1,), 0.02, device="cuda")
    for m, n in ((6304, 768), (12288, 768), (2048, 2048), (16384, 4096), (1024, 768), (128, 768)):
        sets = sets_of(3 * m * n)
        xs, rs, w, b = [new(m, n) for _ in sets], [new(m, n) for _ in sets], new(n), new(n)
        for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):
            rest = (w, b, 1e-5) if "layer" in op else (w, 1e-6)
            given = [(x, r, *rest) if "add" in op else (x, *rest) for x, r in zip(xs, rs, strict=True)]
            plain, both, alone = (getattr(ops, name) for name in (op, f"fp8_{op}", f"{op}_fp8"))
            run_by = {
                "bf16": [lambda i=i: plain(*given[i]) for i in sets],
                "and_quantized": [lambda i=i: both(*given[i], scale) for i in sets],
                "quantized_alone": [lambda i=i: alone(*given[i], scale) for i in sets],
            }
            row: Row = {"op": op, "dtype": "bfloat16", "rows": m, "width": n}
            bytes_each = 7 if "add" in op else 3
            row["floor_us"] = {
                "and_quantized": floor_us(measured, (bytes_each + 2) * m * n, 0, "bf16"),
                "quantized_alone": floor_us(measured, bytes_each * m * n, 0, "bf16"),
            }
            row["us"] = compared({name: graph_of(run) for name, run in run_by.items()})
            ref = calls.reference(OPS[op], given[0])[0]
            row["error"] = {
                name: error(poisoned(lambda name=name: last(run_by[name][0]())).double() * scale, ref)
                for name in ("and_quantized", "quantized_alone")
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def ways_to_add(m: int, k: int, n: int) -> tuple[dict[str, Call], tuple[torch.Tensor, ...]]:
    """Calls by name; and what linear_add is given."""
    ops, one = torch.ops.kpdeploy, torch.full((1,), 0.5, device="cuda")
    x, w, b, r, *norm = new(m, k), new(n, k), new(n), new(m, n), new(n), new(n), 1e-5
    (x8, _), (w8, scale) = in_8_bits(x), in_8_bits(w)

    def product() -> torch.Tensor:
        return ops.linear_activation(x, w, b, "none")

    def fp8_product() -> torch.Tensor:
        return ops.fp8_linear_activation(x8, w8, one, scale, b, None, "none")

    def linear_add() -> torch.Tensor:
        return ops.linear_add(x, w, b, r)

    def fp8_linear_add() -> torch.Tensor:
        return ops.fp8_linear_add(x8, w8, one, scale, b, r)

    return {
        "product": product,
        "linear_add": linear_add,
        "product, add + layer norm": lambda: ops.add_layer_norm(product(), r, *norm),
        "linear_add, layer norm": lambda: ops.layer_norm(linear_add(), *norm),
        "fp8 product": fp8_product,
        "fp8_linear_add": fp8_linear_add,
        "fp8 product, add + layer norm": lambda: ops.fp8_add_layer_norm(fp8_product(), r, *norm, one),
        "fp8_linear_add, layer norm": lambda: ops.fp8_layer_norm(fp8_linear_add(), *norm, one),
    }, (x, w, b, r)


def added(measured: Row) -> list[Row]:
    """Products whose residual their norm adds, and products that add it; and what the norms take behind them."""
    rows: list[Row] = []
    shapes = [(m, k, 768) for m in (128, 512, 1024, 6144, 6304, 12288) for k in (768, 3072)]
    for m, k, n in (*shapes, (2048, 2048, 2048), (2048, 8192, 2048)):
        ways, given = ways_to_add(m, k, n)
        row: Row = {"op": "linear_add", "rows": m, "inputs": k, "outputs": n}
        row["floor_us"] = {
            "linear_add": floor_us(measured, 2 * (m * k + n * k + 2 * m * n), 2 * m * n * k, "bf16"),
            "fp8_linear_add": floor_us(measured, m * k + n * k + 4 * m * n, 2 * m * n * k, "fp8"),
        }
        with constant_weights():
            row["us"] = compared({name: graph_of([run]) for name, run in ways.items()})
        ref = calls.reference(GPU_OPS["linear_add"], given)[0]
        row["error"] = {"linear_add": error(poisoned(ways["linear_add"]), ref)}
        rows.append(row)
        print(row, flush=True)
    return rows


def last(results: Any) -> torch.Tensor:
    return results[-1] if isinstance(results, tuple) else results


def measured_rows(found: list[Row]) -> str:
    """The table of who multiplies: the fastest that computes the op, of the products that have a choice."""
    lines = ["\t".join(COLUMNS)]
    for row in found:
        if row["op"].endswith("gated_linear"):
            continue
        us = row["us"]
        theirs = us.get("cublaslt", "")
        provider = "cublaslt" if theirs and theirs < us["kpdeploy"] else "kpdeploy"
        cells = [torch.cuda.get_device_name(), *(row[name] for name in COLUMNS[1:7])]
        lines.append("\t".join(map(str, (*cells, provider, us["kpdeploy"], theirs or "-", us["separate"]))))
    return "\n".join(lines) + "\n"


def written(path: Path, report: Row) -> None:
    """JSON with one row a line."""
    parts = []
    for key, value in report.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f' "{key}": [\n{rows}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value)}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, metavar="TSV", help="write who was faster, for kpdeploy/ops")
    parser.add_argument(
        "--only", choices=("linears", "fp8", "fp8_gated", "norms", "fp8_norms", "added"), help="one part"
    )
    options = parser.parse_args()
    decision, path = register(), find(TORCH)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("NOT RUN: this needs a GPU of compute capability 9.0 (H100, H200), and a torch that sees it")
    if not isinstance(decision, Applied) or isinstance(path, Skipped):
        sys.exit(f"NOT RUN: {decision}")
    torch.manual_seed(0)
    report: Row = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "rates": rates(),
    }
    print(report, flush=True)
    if options.only in (None, "linears"):
        report["linears"] = linears(Library(path), report["rates"])
    if options.only in (None, "fp8"):
        report["fp8"] = fp8_linears(Library(path), report["rates"])
    if options.only in (None, "fp8_gated"):
        report["fp8_gated"] = fp8_gated(Library(path), report["rates"])
    if options.only in (None, "norms"):
        report["norms"] = norms(report["rates"])
    if options.only in (None, "fp8_norms"):
        report["fp8_norms"] = fp8_norms(report["rates"])
    if options.only in (None, "added"):
        report["added"] = added(report["rates"])
    if options.measure:
        options.measure.write_text(measured_rows(report["linears"] + report["fp8"]))
    if options.json:
        written(options.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
