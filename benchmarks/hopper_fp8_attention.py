"""Attention in 8 bits on an H100 beside the best 16-bit backend of torch's SDPA: errors, times, floors.

    python benchmarks/hopper_fp8_attention.py --json hopper_fp8_attention_h100.json

`kernel` is fp8_attention alone, its 8-bit operands given; `whole` begins with 16-bit queries, keys and values, with
fp8_attention_operands. Errors are ‖out - ref‖ / ‖ref‖ against float64 on 64 query rows of every head, of the 16-bit
inputs, beside those of a plain cast: each tensor by one scale, exact scores, weights rounded too. Inputs are N(0, 1);
with outliers, one in a thousand has N(0, 100) added (as in the paper of FlashAttention-3). Times are as in
hopper_attention.py, floors the larger of the operations over the rate of a large product of 8-bit floats, and of an
exponential for each score over 16 a cycle and multiprocessor. Exit code 1: an error above 2 times the plain cast's; a
goal that is not reached is only told.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cuda_kernels import Row, cuda, versions, written
from hopper_attention import LONG, PEERS, Inputs, Shape, error, graphs_ms, in_rows, peers, prefill, reference, split

from kpdeploy.ops import register
from kpdeploy.ops.fp8_quantize import LARGEST

E4M3 = torch.float8_e4m3fn
ROWS_CHECKED = 64
MOST = 2.0
"""Times a plain cast's error."""
CLOCK_MHZ = 1800
"""That a profile of the kernel on an H100 showed."""
SHAPES = (
    *(prefill(*shape, goal=1.6, causal=causal) for shape in LONG for causal in (False, True)),
    prefill(4, 16, 4096, 64, goal=1.6),
)


def inputs_of(shape: Shape, outliers: bool) -> Inputs:
    def new(length: int, heads: int) -> torch.Tensor:
        x = torch.randn(shape.batch, length, heads * shape.size, device="cuda")
        if outliers:
            x += 10 * torch.randn_like(x) * (torch.rand_like(x) < 1e-3)
        return x.bfloat16()

    return Inputs(
        query=new(shape.queries, shape.heads),
        key=new(shape.keys, shape.kv_heads),
        value=new(shape.keys, shape.kv_heads),
    )


def operands(shape: Shape, given: Inputs) -> tuple[torch.Tensor, ...]:
    made: tuple[torch.Tensor, ...] = torch.ops.kpdeploy.fp8_attention_operands(
        given.query, given.key, given.value, None, shape.heads, shape.kv_heads
    )
    return made


def attend(shape: Shape, made: tuple[torch.Tensor, ...]) -> torch.Tensor:
    out: torch.Tensor = torch.ops.kpdeploy.fp8_attention(*made, None, None, shape.size**-0.5, shape.causal)
    return out


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """x as a plain cast leaves it, in float64."""
    scale = x.float().abs().amax() / LARGEST
    return (x.float() / scale).to(E4M3).double() * scale.double()


def plain_cast(shape: Shape, given: Inputs, rows: torch.Tensor) -> torch.Tensor:
    """[batch, heads, rows, size]."""
    q = split(in_8_bits(given.query), shape.heads)[:, :, rows]
    k, v = (split(in_8_bits(x), shape.kv_heads) for x in (given.key, given.value))
    out = torch.empty_like(q)
    seen = torch.arange(shape.keys, device=q.device) <= rows[:, None] + shape.keys - shape.queries
    for b in range(shape.batch):
        for h in range(shape.heads):
            of = h // (shape.heads // shape.kv_heads)
            scores = q[b, h] @ k[b, of].T * shape.size**-0.5
            if shape.causal:
                scores = scores.masked_fill(~seen, -torch.inf)
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            rounded = (weights * LARGEST).float().to(E4M3).double() / LARGEST
            out[b, h] = rounded @ v[b, of] / weights.sum(-1, keepdim=True)
    return out


def errors(shape: Shape, outliers: bool) -> tuple[float, float]:
    """Ours, and a plain cast's."""
    rows = torch.randperm(shape.queries, device="cuda")[:ROWS_CHECKED]
    given = inputs_of(shape, outliers)
    ref = reference(shape, given, rows)
    with cuda.outputs_poisoned():
        out = in_rows(shape, attend(shape, operands(shape, given)))[:, :, rows]
    return error(out, ref), error(plain_cast(shape, given, rows), ref)


def rates() -> dict[str, float]:
    """Operations of a large product of 8-bit floats, and exponentials."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(E4M3) for _ in range(2))
    one = torch.ones((), device="cuda")
    run = lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
    product = graphs_ms({"product": [run]}, 3)["product"]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "fp8_tflop_per_s": round(2 * 8192**3 / product / 1e9),
        "exponentials_per_us": 16 * processors * CLOCK_MHZ,
    }


def measured(shape: Shape, most: dict[str, float]) -> Row:
    found = {"normal": errors(shape, False), "outliers": errors(shape, True)}
    torch.cuda.empty_cache()
    given = inputs_of(shape, False)
    made = operands(shape, given)
    calls: dict[str, list[Callable[[], Any]]] = {
        "kernel": [lambda: attend(shape, made)],
        "operands": [lambda: operands(shape, given)],
        "whole": [lambda: attend(shape, operands(shape, given))],
    }
    for name, backend in PEERS.items():
        run = peers(shape, given, backend)
        try:
            run()
        except RuntimeError:  # no kernel of this backend takes the call
            continue
        calls[name] = [run]
    times = graphs_ms(calls, max(1, min(20, round(2e12 / shape.operations))))
    best = min((name for name in times if name in PEERS), key=lambda name: times[name])
    exponentials = shape.operations / 4 / shape.size / most["exponentials_per_us"]
    return {
        "shape": shape.name,
        **{f"{name}_us": round(times[name] * 1e3, 1) for name in ("kernel", "operands", "whole")},
        "peer": best,
        "peer_us": round(times[best] * 1e3, 1),
        "kernel_times_peer": round(times[best] / times["kernel"], 3),
        "whole_times_peer": round(times[best] / times["whole"], 3),
        "goal": shape.goal,
        "kernel_tflop_per_s": round(shape.operations / times["kernel"] / 1e9),
        "products_floor_us": round(shape.operations / most["fp8_tflop_per_s"] / 1e6, 1),
        "exponentials_floor_us": round(exponentials, 1),
        **{f"{what}_error": ours for what, (ours, _) in found.items()},
        **{f"{what}_plain": plain for what, (_, plain) in found.items()},
    }


def passed(row: Row) -> bool:
    return all(row[f"{what}_error"] <= MOST * row[f"{what}_plain"] for what in ("normal", "outliers"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--built-with", default="", help="with what the library was built, for the table")
    options = parser.parse_args()
    register()
    most = rates()
    report: Row = {**versions(options.built_with), "cudnn": torch.backends.cudnn.version(), **most, "rows": []}
    for shape in SHAPES:
        report["rows"].append(measured(shape, most))
        print(report["rows"][-1], flush=True)
        torch.cuda.empty_cache()
        if options.json:
            written(options.json, report)
    bad = [row["shape"] for row in report["rows"] if not passed(row)]
    print("errors above their limit:", bad or "none")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
