"""attention on an H100 beside the best backend of torch's scaled_dot_product_attention: errors, times, floors.

    python benchmarks/hopper_attention.py --json hopper_attention_h100.json --sanitize

Times are medians of CUDA graph replays, ours and the peers' in turns; each replay has several calls, in decoding on
several sets of keys, so that they come from memory and not from the cache. Errors are ‖out - ref‖ / ‖ref‖ against
float64 on 64 query rows of every head, on fresh random inputs, into outputs that held NaN. The floor of a row is the
larger of its bytes over the measured rate of a copy and its operations over that of a large matrix product. "ours" is
what runs by the tables that the library carries; "own" are our kernels and "provider" is cuDNN as our op calls it, each
chosen by a row handed to the library; "general" is our kernel for every GPU, which a scale below 0 leads to. Packed
rows are packed_attention on sequences without padding; SDPA has the same ones padded, with a mask of keys, and torch's
own kernel for packed sequences (torch.nn.attention.varlen) is told beside it where torch has one. Exit code 1: an error
above its limit, or a finding of compute-sanitizer; a goal that is not reached is only told.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import random
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_kernels import TOOLS, Row, cuda, split, under, versions, written
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kpdeploy.decision import Applied
from kpdeploy.ops import OPS, libraries, measured_attention, register
from kpdeploy.ops.cases import to_dtype, tolerance

PEERS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MOST = 1e-2
"""Of an error; and it must not be above 1.5 times the best peer's."""
ROWS_CHECKED = 64
REPLAYS = 15
CACHE_BYTES = 50e6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A row of the table. `goal`: how many times the best peer's rate. `mean`: of random lengths; 0: all keys.

    `packed`: without the padding.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    causal: bool = False
    mean: int = 0
    goal: float = 1.0
    packed: bool = False

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        length = f"{self.keys}" if self.queries == self.keys else f"{self.queries}x{self.keys}"
        more = ", causal" * self.causal + f", lengths of {self.mean} on average" * (self.mean > 0)
        return f"{self.batch}x{heads}x{length}x{self.size}{more}" + ", packed" * self.packed

    def lengths(self) -> list[int]:
        """Of each row of the batch: from 2 to all keys, with the mean asked for."""
        if not self.mean:
            return [self.keys] * self.batch
        chosen = random.Random(0)
        found = [chosen.randint(2, self.keys) for _ in range(self.batch)]
        while missing := self.mean * self.batch - sum(found):
            i = chosen.randrange(self.batch)
            found[i] = min(self.keys, max(2, found[i] + int(math.copysign(1, missing))))
        return found

    @property
    def operations(self) -> float:
        """Two products; of a causal square the half."""
        share = 0.5 if self.causal and self.queries == self.keys else 1
        pairs = sum(n * (n if self.packed else self.queries) for n in self.lengths())
        return 4 * pairs * self.heads * self.size * share

    @property
    def bytes(self) -> float:
        """Each element once: queries, output, and the keys and values that count."""
        keys = sum(self.lengths())
        queries = keys if self.packed else self.batch * self.queries
        return 4 * self.size * (queries * self.heads + keys * self.kv_heads)


def prefill(
    batch: int,
    heads: int,
    length: int,
    size: int,
    goal: float,
    causal: bool = False,
    mean: int = 0,
    packed: bool = False,
) -> Shape:
    return Shape(
        batch=batch,
        queries=length,
        keys=length,
        heads=heads,
        kv_heads=heads,
        size=size,
        causal=causal,
        goal=goal,
        mean=mean,
        packed=packed,
    )


LONG = ((4, 32, 2048, 128), (1, 32, 8192, 128), (1, 32, 16384, 128))
SHAPES = (
    *(prefill(*shape, goal=1.1, causal=causal) for causal in (False, True) for shape in LONG),
    prefill(4, 16, 4096, 64, goal=1.0),
    prefill(4, 16, 4096, 64, goal=1.0, causal=True),
    prefill(32, 12, 128, 64, goal=1.4),
    prefill(8, 16, 512, 64, goal=1.4),
    prefill(32, 12, 512, 64, goal=2.5, mean=257),
    prefill(32, 12, 512, 64, goal=2.5, mean=257, packed=True),
    prefill(16, 32, 2048, 128, goal=1.0, causal=True, mean=700, packed=True),
    Shape(batch=1, queries=1, keys=8192, heads=32, kv_heads=8, size=128, goal=2.0),
    Shape(batch=1, queries=8, keys=8192, heads=32, kv_heads=8, size=128),
    Shape(batch=8, queries=1, keys=1024, heads=32, kv_heads=8, size=128),
    Shape(batch=32, queries=1, keys=2048, heads=32, kv_heads=8, size=128),
    Shape(batch=1, queries=1, keys=8192, heads=32, kv_heads=32, size=128),
    Shape(batch=1, queries=1, keys=8192, heads=16, kv_heads=16, size=64),
    prefill(8, 12, 128, 32, goal=1.0),
    prefill(8, 12, 512, 32, goal=1.0),
    prefill(8, 12, 512, 32, goal=1.0, mean=257),
    prefill(8, 12, 512, 32, goal=1.0, mean=257, packed=True),
    prefill(8, 16, 1024, 40, goal=1.0),
    prefill(8, 16, 1024, 80, goal=1.0),
    prefill(8, 16, 1024, 80, goal=1.0, causal=True),
    prefill(4, 16, 2048, 96, goal=1.0),
    prefill(4, 16, 2048, 96, goal=1.0, causal=True),
    prefill(4, 16, 2048, 112, goal=1.0),
    Shape(batch=8, queries=1, keys=4096, heads=32, kv_heads=8, size=96),
    prefill(4, 16, 2048, 256, goal=1.0),
    prefill(4, 16, 2048, 256, goal=1.0, causal=True),
    prefill(4, 16, 2048, 192, goal=1.0),
    prefill(8, 16, 1024, 256, goal=1.0, mean=500),
    prefill(8, 16, 1024, 256, goal=1.0, causal=True, mean=500),
    Shape(batch=4, queries=1024, keys=1024, heads=16, kv_heads=4, size=256, causal=True),
    Shape(batch=8, queries=1, keys=4096, heads=16, kv_heads=4, size=256),
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def inputs_of(shape: Shape, dtype: torch.dtype) -> Inputs:
    def new(length: int, heads: int) -> torch.Tensor:
        return torch.randn(shape.batch, length, heads * shape.size, device="cuda", dtype=dtype)

    return Inputs(
        query=new(shape.queries, shape.heads),
        key=new(shape.keys, shape.kv_heads),
        value=new(shape.keys, shape.kv_heads),
    )


def offsets_of(shape: Shape) -> torch.Tensor:
    return torch.tensor([0, *shape.lengths()], device="cuda").cumsum(0)


def real(shape: Shape) -> torch.Tensor:
    """Which rows are no padding, [batch, queries]."""
    lengths = torch.tensor(shape.lengths(), device="cuda")
    return torch.arange(shape.queries, device="cuda") < lengths[:, None]


def packed(shape: Shape, given: Inputs) -> list[torch.Tensor]:
    """[1, rows, width] of query, key and value, slices of one tensor as a projection makes them."""
    rows = real(shape)
    parts = [tensor[rows] for tensor in (given.query, given.key, given.value)]
    return list(torch.cat(parts, -1)[None].split([part.shape[-1] for part in parts], -1))


def ours(shape: Shape, given: Inputs, sign: int = 1) -> Callable[[], torch.Tensor]:
    scale = sign * shape.size**-0.5
    if shape.packed:
        tensors, offsets, call = packed(shape, given), offsets_of(shape), torch.ops.kpdeploy.packed_attention
        heads = (shape.heads, shape.kv_heads, scale, shape.causal)
        return lambda: call(*tensors, offsets, *heads)
    lengths = torch.tensor(shape.lengths(), device="cuda") if shape.mean else None
    op = torch.ops.kpdeploy.attention
    return lambda: op(
        given.query, given.key, given.value, lengths, shape.heads, shape.kv_heads, scale, shape.causal
    )  # fmt: skip


def row_of(shape: Shape, provider: str, figures: Row) -> list[str]:
    """The cells of a row of kpdeploy/ops/attention_measured.tsv."""
    sizes = (str(getattr(shape, name)) for name in TABLE_COLUMNS)
    us = [str(figures.get(name, "-")) for name in ("kpdeploy_us", "cudnn_us", "peer", "peer_us")]
    causal = "yes" if shape.causal else "no"
    return [torch.cuda.get_device_name(), "attention", "bfloat16", *sizes, causal, str(shape.mean), provider, *us]


def by(provider: str, shape: Shape, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The call, by this provider where it takes it: the library is handed a row for it, as an artifact's would be."""
    use = ctypes.CDLL(str(libraries.find(libraries.TORCH))).kpdeploy_use_gpu_providers
    use.argtypes = (ctypes.c_char_p,)
    table = f"device\n{chr(9).join(row_of(shape, provider, {}))}\n".encode()

    def chosen() -> torch.Tensor:
        if use(table) != 0:
            raise RuntimeError("the library does not take a row of measured providers")
        try:
            return run()
        finally:
            use(None)

    return chosen


def is_cudnns(run: Callable[[], torch.Tensor]) -> bool:
    """Whether a kernel of cuDNN's runs in the call, which was made before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return any("cudnn" in event.name for event in seen.events())


def in_rows(shape: Shape, out: torch.Tensor) -> torch.Tensor:
    """Our output as [batch, heads, queries, size]; zeros where there is padding."""
    if shape.packed:
        whole = out.new_zeros(shape.batch, shape.queries, out.shape[-1])
        whole[real(shape)] = out[0]
        out = whole
    return split(out, shape.heads)


def varlen(shape: Shape, given: Inputs) -> Callable[[], torch.Tensor] | None:
    """Torch's own kernel for packed sequences, if this torch has one that takes them."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    q, k, v = (tensor[0].unflatten(-1, (-1, shape.size)) for tensor in packed(shape, given))
    offsets, most, more = offsets_of(shape).int(), max(shape.lengths()), {"is_causal": True} if shape.causal else {}
    run = lambda: varlen_attn(q, k, v, offsets, offsets, most, most, **more)  # noqa: E731
    try:
        run()
    except (RuntimeError, TypeError):
        return None
    return run


def peers(shape: Shape, given: Inputs, backend: SDPBackend) -> Callable[[], torch.Tensor]:
    """[batch, heads, queries, size], as torch returns it. Lengths are a mask of keys."""
    q, k, v = (split(given.query, shape.heads), split(given.key, shape.kv_heads), split(given.value, shape.kv_heads))
    mask = None
    if shape.mean:
        lengths = torch.tensor(shape.lengths(), device="cuda")
        mask = (torch.arange(shape.keys, device="cuda") < lengths[:, None])[:, None, None]
        if shape.causal:
            mask = mask & torch.ones(shape.queries, shape.keys, device="cuda", dtype=torch.bool).tril()

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, mask, is_causal=shape.causal and mask is None, enable_gqa=shape.heads != shape.kv_heads
            )

    return run


def reference(shape: Shape, given: Inputs, rows: torch.Tensor) -> torch.Tensor:
    """In float64, a head at a time: [batch, heads, rows, size]."""
    q = split(given.query, shape.heads)[:, :, rows]
    k, v = split(given.key, shape.kv_heads), split(given.value, shape.kv_heads)
    out = torch.empty(q.shape, dtype=torch.float64, device="cuda")
    column = torch.arange(shape.keys, device="cuda")
    seen = column <= rows[:, None] + shape.keys - shape.queries if shape.causal else column >= 0
    for b, length in enumerate(shape.lengths()):
        for h in range(shape.heads):
            of = h // (shape.heads // shape.kv_heads)
            scores = q[b, h].double() @ k[b, of].double().T * shape.size**-0.5
            scores = scores.masked_fill(~(seen & (column < length)), -torch.inf)
            out[b, h] = scores.softmax(-1) @ v[b, of].double()
    return out


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float(f"{((out.double() - ref).norm() / ref.norm()).item():.3g}")


def graphs_ms(calls: dict[str, list[Callable[[], Any]]], repeats: int) -> dict[str, float]:
    """Medians of one call; `calls` are of one kind each, run after another, `repeats` times in a graph."""
    graphs = {}
    for name, runs in calls.items():
        for run in runs:
            run()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(repeats):
                for run in runs:
                    run()
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(REPLAYS + 1):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay:
                found[name].append(begin.elapsed_time(end) / repeats / len(calls[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def ceilings() -> Row:
    """What the device does at most: bytes read and written by a copy, operations of a large product."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    copies: dict[str, list[Callable[[], Any]]] = {
        "copy": [lambda: y.copy_(x)],
        "pass": [lambda: torch.mul(x, 2, out=y)],
    }
    copy = min(graphs_ms(copies, 3).values())
    product = graphs_ms({"product": [lambda: a @ b]}, 3)["product"]
    return {"copy_gb_per_s": round(2 * x.nbytes / copy / 1e6), "matmul_tflop_per_s": round(2 * 8192**3 / product / 1e9)}


def measured(shape: Shape, most: Row) -> Row:
    rows = torch.randperm(shape.queries, device="cuda")[:ROWS_CHECKED]
    decoding = shape.queries * 100 < shape.keys
    sets = max(1, min(8, math.ceil(4 * CACHE_BYTES / shape.bytes))) if decoding else 1
    given = [inputs_of(shape, torch.bfloat16) for _ in range(sets)]
    counts = real(shape)[:, None, rows, None] if shape.packed else 1
    ref = reference(shape, given[0], rows) * counts

    def error_of(out: torch.Tensor) -> float:
        return error(out[:, :, rows] * counts, ref)

    calls: dict[str, list[Callable[[], Any]]] = {"ours": [ours(shape, one) for one in given]}
    if not shape.packed:
        calls["own"] = [by("kpdeploy", shape, run) for run in calls["ours"]]
        calls["provider"] = [by("cudnn", shape, run) for run in calls["ours"]]
        calls["provider"][0]()
        if not is_cudnns(calls["provider"][0]):
            del calls["provider"]
    general = [ours(shape, one, -1) for one in given]
    calls["general"] = general if shape.packed else [by("kpdeploy", shape, run) for run in general]
    with cuda.outputs_poisoned():
        found = {name: error_of(in_rows(shape, runs[0]())) for name, runs in calls.items() if name != "general"}
    for name, backend in PEERS.items():
        try:
            found[name] = error_of(peers(shape, given[0], backend)())
        except RuntimeError:  # no kernel of this backend takes the call
            continue
        calls[name] = [peers(shape, one, backend) for one in given]
    if shape.packed and (run := varlen(shape, given[0])):
        calls["varlen"] = [run]
    times = graphs_ms(calls, max(1, min(20, round(2e12 / shape.operations / sets))))
    best = min((name for name in times if name in PEERS), key=lambda name: times[name])
    floor = max(shape.bytes / most["copy_gb_per_s"] / 1e6, shape.operations / most["matmul_tflop_per_s"] / 1e9)
    return {
        "shape": shape.name,
        "dtype": "bfloat16",
        "ours_us": round(times["ours"] * 1e3, 2),
        "peer": best,
        "peer_us": round(times[best] * 1e3, 2),
        "times_peer": round(times[best] / times["ours"], 3),
        "goal": shape.goal,
        "floor_us": round(floor * 1e3, 2),
        "tflop_per_s": round(shape.operations / times["ours"] / 1e9, 1),
        "gb_per_s": round(shape.bytes / times["ours"] / 1e6),
        "error": max(found[name] for name in ("ours", "own", "provider") if name in found),
        "peer_error": found[best],
        "all_us": {name: round(ms * 1e3, 2) for name, ms in times.items()},
        "sets": sets,
    }


TABLE_COLUMNS = ("batch", "queries", "keys", "heads", "kv_heads", "size")


def write_table(path: Path, shapes: list[Shape], report: Row) -> None:
    """What kpdeploy/ops/measured_attention.py reads."""
    lines = ["\t".join(measured_attention.COLUMNS)]
    for shape, row in zip(shapes, report["rows"], strict=True):
        if shape.packed:
            continue
        own, cudnn = row["all_us"]["own"], row["all_us"].get("provider")
        figures = {"kpdeploy_us": own, "peer": row["peer"], "peer_us": row["peer_us"]}
        figures |= {} if cudnn is None else {"cudnn_us": cudnn}
        faster = "cudnn" if cudnn is not None and measured_attention.is_gain(own, cudnn) else "kpdeploy"
        lines.append("\t".join(row_of(shape, faster, figures)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def small() -> int:
    """The cases that a sanitizer gets through, float16 and bfloat16, heads of 64 and 128 among them."""
    bad = 0
    for name, dtype in itertools.product(("attention", "packed_attention"), ("bfloat16", "float16")):
        op = OPS[name]
        # The large ones of a single query are those whose keys are shared among blocks.
        cases = [c for c in cuda.gpu_cases(name) if cuda.size_of(c[2]) < 200_000 or c[2][0].shape[:2] == (1, 1)]
        for _, what, plain in cases:
            call = to_dtype(plain, cuda.DTYPES[dtype])
            found = cuda.worst(cuda.through_torch(op, call), cuda.expected(op, call))
            if not found <= tolerance("kpdeploy", dtype, what):
                bad += 1
                print("FAILED", name, dtype, what, found)
        print(f"{len(cases)} cases of {name} in {dtype}, {bad} failed", flush=True)
    return 1 if bad else 0


def sanitized(tool: str) -> str:
    code, text = under(tool, "--small", script=__file__)
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text) + re.findall(r"\d+ cases of .*", text)
    return "; ".join([*found, f"exit code {code}"])


def passed(row: Row) -> bool:
    return bool(row["error"] <= min(MOST, 1.5 * row["peer_error"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--table", type=Path, help="what `kpdeploy ops explain` tells: kpdeploy/ops/attention_measured.tsv"
    )
    parser.add_argument("--small", action="store_true", help="only the errors of small cases")
    parser.add_argument("--sanitize", action="store_true", help="the small cases under compute-sanitizer, too")
    parser.add_argument("--built-with", default="", help="with what the library was built, for the table")
    parser.add_argument("--only", default="", help="a pattern of the names of the shapes that are measured")
    options = parser.parse_args()
    decision = register()
    if not isinstance(decision, Applied) or not torch.cuda.is_available():
        sys.exit(f"nothing to measure: {decision}; torch {torch.__version__} sees a GPU: {torch.cuda.is_available()}")
    if options.small:
        return small()
    most = ceilings()
    report: Row = {**versions(options.built_with), "cudnn": torch.backends.cudnn.version(), **most, "rows": []}
    shapes = [shape for shape in SHAPES if re.search(options.only, shape.name)]
    for shape in shapes:
        row = measured(shape, most)
        report["rows"].append(row)
        print({key: row[key] for key in row if key != "all_us"}, flush=True)
        torch.cuda.empty_cache()
        if options.json:
            written(options.json, report)
    if options.table:
        write_table(options.table, shapes, report)
    silent = True
    if options.sanitize:
        if not shutil.which("compute-sanitizer"):
            sys.exit("compute-sanitizer is not installed: NOT RUN")
        report["sanitizer"] = {tool: sanitized(tool) for tool in TOOLS}
        silent = all(summary.endswith("exit code 0") for summary in report["sanitizer"].values())
        if options.json:
            written(options.json, report)
    bad = [row["shape"] for row in report["rows"] if not passed(row)]
    print("errors above their limit:", bad or "none")
    return 1 if bad or not silent else 0


if __name__ == "__main__":
    raise SystemExit(main())
