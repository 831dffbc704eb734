"""What attention that gives 8-bit floats saves on an H100 against attention and a pass that quantizes its result.

    python benchmarks/attention_fp8.py --json attention_fp8_h100.json
    python benchmarks/attention_fp8.py --before OLD/libkpdeploy_torch.so

Times are medians of CUDA-graph replays in turns, as in hopper_attention.py, bfloat16 in: `attention` alone, `separate`
with fp8_quantize behind it, `together` in one kernel. Errors are ‖out - ref‖ / ‖ref‖ of the 8-bit results times their
scale against float64, on 64 query rows of every head. `--before` names a library without such ops: the plain attention
of both is timed in turns, each in a process of its own, so that it is seen whether it got slower. Exit code 1: together
is farther off than separate by more than attention's own rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cuda_kernels import Row, versions, written
from hopper_attention import Shape, error, graphs_ms, in_rows, inputs_of, offsets_of, ours, packed, prefill, reference

from kpdeploy.ops import register
from kpdeploy.ops.fp8_quantize import LARGEST
from kpdeploy.ops.libraries import TORCH, find

ROWS_CHECKED = 64
ROUNDS = 7
MOST = 4e-3
"""By how much attention in bfloat16 may be off itself."""
SHAPES = {
    "BERT-base 1×128": prefill(1, 12, 128, 64, goal=1.0),
    "BERT-base 8×128": prefill(8, 12, 128, 64, goal=1.0),
    "BERT-base 32×384": prefill(32, 12, 384, 64, goal=1.0),
    "BERT-base 32×384, half full": prefill(32, 12, 384, 64, goal=1.0, mean=192),
    "the same, packed": prefill(32, 12, 384, 64, goal=1.0, mean=192, packed=True),
    "ViT-B/16 ×32": prefill(32, 12, 197, 64, goal=1.0),
    "Llama 1B 1×2048": Shape(batch=1, queries=2048, keys=2048, heads=32, kv_heads=8, size=64, causal=True),
    "Llama 8B 1×2048": Shape(batch=1, queries=2048, keys=2048, heads=32, kv_heads=8, size=128, causal=True),
    "Llama 8B, one query, 8192 keys": Shape(batch=1, queries=1, keys=8192, heads=32, kv_heads=8, size=128),
}


def repeats_of(shape: Shape) -> int:
    return max(2, min(20, round(2e11 / shape.operations)))


def measured(name: str, shape: Shape) -> Row:
    given = inputs_of(shape, torch.bfloat16)
    ops, heads = torch.ops.kpdeploy, (shape.heads, shape.kv_heads, shape.size**-0.5, shape.causal)
    attend = ours(shape, given)
    scale = attend().float().abs().amax().reshape(1) / LARGEST
    if shape.packed:
        quantizing = (*packed(shape, given), offsets_of(shape), *heads, scale)
        together: Callable[[], torch.Tensor] = lambda: ops.packed_attention_fp8(*quantizing)  # noqa: E731
    else:
        lengths = torch.tensor(shape.lengths(), device="cuda") if shape.mean else None
        whole = (given.query, given.key, given.value, lengths, *heads, scale)
        together = lambda: ops.attention_fp8(*whole)  # noqa: E731
    separate: Callable[[], torch.Tensor] = lambda: ops.fp8_quantize(attend(), scale)  # noqa: E731
    rows = torch.randperm(shape.queries, device="cuda")[:ROWS_CHECKED]
    ref = reference(shape, given, rows)
    if shape.packed:
        ref *= (rows < torch.tensor(shape.lengths(), device="cuda")[:, None])[:, None, :, None]
    errors = {
        what: error(in_rows(shape, run().float() * scale)[:, :, rows], ref)
        for what, run in (("separate", separate), ("together", together))
    }
    calls: dict[str, list[Callable[[], Any]]] = {
        "attention": [attend], "separate": [separate], "together": [together]
    }  # fmt: skip
    times = graphs_ms(calls, repeats_of(shape))
    return {
        "work": name,
        "shape": shape.name,
        **{f"{what}_us": round(ms * 1e3, 2) for what, ms in times.items()},
        "saved_us": round((times["separate"] - times["together"]) * 1e3, 2),
        **{f"{what}_error": found for what, found in errors.items()},
    }


def answer_with_times(library: str) -> None:
    """For each line that comes in, one that tells the microseconds of attention by a library, by work."""
    torch.ops.load_library(library)
    given = {name: inputs_of(shape, torch.bfloat16) for name, shape in SHAPES.items()}
    for _ in sys.stdin:
        found = {
            name: graphs_ms({name: [ours(shape, given[name])]}, repeats_of(shape))[name] * 1e3
            for name, shape in SHAPES.items()
        }
        print(json.dumps(found), flush=True)


def times_of(libraries: dict[str, str]) -> dict[str, dict[str, float]]:
    """Medians by library and work, in turns."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--answer", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, library in libraries.items()
    }
    told: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for _ in range(ROUNDS):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            told[name].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return {
        name: {work: statistics.median(one[work] for one in rounds) for work in SHAPES} for name, rounds in told.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--before", help="a library whose plain attention is timed beside ours")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    parser.add_argument("--built-with", default="", help="with what the library was built, for the table")
    options = parser.parse_args()
    if options.answer:
        answer_with_times(options.answer)
        return 0
    register()
    report: Row = {**versions(options.built_with), "rows": [measured(*row) for row in SHAPES.items()]}
    if options.before:
        found = times_of({"before": options.before, "after": str(find(TORCH))})
        for row in report["rows"]:
            row |= {f"attention_{when}_us": round(times[row["work"]], 2) for when, times in found.items()}
    for row in report["rows"]:
        print(row, flush=True)
    if options.json:
        written(options.json, report)
    bad = [row["work"] for row in report["rows"] if row["together_error"] > row["separate_error"] + MOST]
    print("errors above their limit:", bad or "none")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
