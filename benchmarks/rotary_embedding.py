"""Rotary embeddings of a Llama 1B's queries and keys on a GPU, beside torch's and a copy of as many bytes.

    python benchmarks/rotary_embedding.py --json benchmarks/results/rotary_embedding_h100.json

40 heads of 64 (32 of queries, 8 of keys) in rows of a joined product, bfloat16. Each candidate is a CUDA graph of 64
calls on eight sets of tensors in turn; replays take turns, and the median of 15 counts, in microseconds a call. torch's
chain is that of transformers, with bfloat16 tables, as it is and compiled. Errors are against float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kpdeploy.decision import Skipped
from kpdeploy.ops import OPS, register

SHAPES = ((1, 1), (32, 1), (1, 2048))
QUERIES, KEYS, SIZE, PRODUCT = 32 * 64, 8 * 64, 64, 3072
ROUNDS, CALLS, SETS = 15, 64, 8


def across(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., SIZE // 2 :], x[..., : SIZE // 2]), dim=-1)


def chain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    heads = [part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in x.split((QUERIES, KEYS), dim=-1)]
    return [(h * cos + across(h) * sin).transpose(1, 2).flatten(2) for h in heads]


def graph_of(call: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept: list[Any] = []  # memory is used again after a round of all sets
        for index in range(CALLS):
            kept = [*kept[1 - SETS :], call(index % SETS)]
    graph.replay()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / CALLS


def row(batch: int, rows: int, compiled: Callable[..., Any]) -> dict[str, Any]:
    products = [torch.randn(batch, rows, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(SETS)]
    xs = [product[:, :, : QUERIES + KEYS] for product in products]
    dense, outs = [x.clone() for x in xs], [torch.empty(x.shape, device="cuda", dtype=x.dtype) for x in xs]
    angles = (torch.rand(1, rows, SIZE // 2, device="cuda") * 6).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    narrow = (cos.bfloat16(), sin.bfloat16())
    heads = (QUERIES + KEYS) // SIZE
    calls: dict[str, Callable[[int], Any]] = {
        "kpdeploy::rotary_embedding": lambda i: torch.ops.kpdeploy.rotary_embedding(xs[i], cos, sin, heads),
        "torch's chain": lambda i: chain(xs[i], *narrow),
        "torch's chain, compiled": lambda i: compiled(xs[i], *narrow),
        "copy of as many bytes": lambda i: outs[i].copy_(dense[i]),
        "copy of the columns": lambda i: outs[i].copy_(xs[i]),
    }
    exact = OPS["rotary_embedding"].reference(xs[0].double(), cos, sin, heads)
    ours, theirs = calls["kpdeploy::rotary_embedding"](0), torch.cat(chain(xs[0], *narrow), dim=-1)
    graphs = {name: graph_of(call) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            taken[name].append(microseconds(graph))
    return {
        "x": [batch, rows, QUERIES + KEYS],
        "us": {name: round(statistics.median(times), 2) for name, times in taken.items()},
        "errors": {
            n: float(f"{(o - exact).norm() / exact.norm():.2e}") for n, o in (("ours", ours), ("torch", theirs))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    decision = register()
    assert not isinstance(decision, Skipped), decision.reason
    torch.manual_seed(0)
    compiled = torch.compile(chain, dynamic=False)
    rows = []
    for batch, length in SHAPES:
        rows.append(row(batch, length, compiled))
        print(json.dumps(rows[-1]), flush=True)
    if chosen.json:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        chosen.json.write_text(json.dumps({**device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
