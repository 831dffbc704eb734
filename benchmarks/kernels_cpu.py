"""The CPU kernels against what users have today: torch, oneDNN, ONNX Runtime, and the memory's own speed.

    python benchmarks/kernels_cpu.py --threads 2 --rounds 15 --json kernels_cpu.json

All candidates of one row take turns, round by round, so that a slow moment of the machine hits all alike; the figure
is the median of the rounds. `--clock cpu` counts this process's CPU time instead of the wall's, for a machine that is
shared: use it with --threads 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from kpdeploy.decision import Skipped
from kpdeploy.hardware import environment
from kpdeploy.ops import ONNX_DOMAIN, register
from kpdeploy.ops.libraries import ONNX, find

Run = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def session(nodes: list[Any], feeds: Mapping[str, Any], constants: Mapping[str, Any], threads: int) -> Run:
    """A run of a graph with output `y`; inputs and constants are torch tensors."""
    library = find(ONNX)
    assert not isinstance(library, Skipped), library.reason
    kinds = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "row",
        [helper.make_tensor_value_info(n, kinds[t.dtype], list(t.shape)) for n, t in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(t.numpy(), n) for n, t in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(ONNX_DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return lambda: made.run(["y"], arrays)[0]


def ours(name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(name, inputs, outputs, domain=ONNX_DOMAIN, **attributes)


def norms(rows: int, columns: int, threads: int) -> dict[str, Run]:
    """add_layer_norm moves four tensors: as two copies."""
    x, r = torch.randn(2, rows, columns)
    w, b = torch.randn(2, columns)
    a, c = torch.empty(2, rows, columns)
    skip = helper.make_node("SkipLayerNormalization", ["x", "r", "w", "b"], ["y", "", "", "s"], domain="com.microsoft")
    feeds, constants = {"x": x, "r": r}, {"w": w, "b": b}

    def copies() -> None:
        a.copy_(x)
        c.copy_(r)

    def separate() -> tuple[torch.Tensor, torch.Tensor]:
        total = x + r
        return functional.layer_norm(total, (columns,), w, b), total

    def clones() -> tuple[torch.Tensor, torch.Tensor]:
        return x.clone(), r.clone()

    node = ours("AddLayerNorm", ["x", "r", "w", "b"], ["y", "s"], eps=1e-5)
    return {
        "two copies, into memory in use": copies,
        "torch: two clones, into new memory": clones,
        "torch: kpdeploy::add_layer_norm": lambda: torch.ops.kpdeploy.add_layer_norm(x, r, w, b, 1e-5),
        "torch: add, layer_norm": separate,
        "ORT: com.kpdeploy:AddLayerNorm": session([node], feeds, constants, threads),
        "ORT: SkipLayerNormalization": session([skip], feeds, constants, threads),
    }


def linear(rows: int, k: int, n: int, threads: int, activation: str = "gelu") -> dict[str, Run]:
    """gelu, or none. oneDNN's packed weight is what AOTInductor freezes."""
    x, w, b = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
    fused = ours("LinearActivation", ["x", "w", "b"], ["y"], activation=activation)
    last = "s" if activation == "gelu" else "y"
    plain = [helper.make_node("MatMul", ["x", "t"], ["p"]), helper.make_node("Add", ["p", "b"], [last])]
    if activation == "gelu":
        plain.append(helper.make_node("Gelu", ["s"], ["y"]))

    def separate() -> torch.Tensor:
        product = functional.linear(x, w, b)
        return functional.gelu(product) if activation == "gelu" else product

    return {
        "torch: kpdeploy::linear_activation": lambda: torch.ops.kpdeploy.linear_activation(x, w, b, activation),
        "torch: linear, and its activation": separate,
        "torch: oneDNN, packed weight": lambda: torch.ops.mkldnn._linear_pointwise(
            x, packed, b, activation, [], "none"
        ),
        "ORT: com.kpdeploy:LinearActivation": session([fused], {"x": x}, {"w": w, "b": b}, threads),
        "ORT: MatMul, Add, and its activation": session(plain, {"x": x}, {"t": w.t().contiguous(), "b": b}, threads),
    }


def attention(batch: int, heads: int, length: int, size: int, threads: int) -> dict[str, Run]:
    """Padded: lengths from the whole down to an eighth of it, as in the models' benchmark."""
    q, k, v = torch.randn(3, batch, length, heads * size)
    lengths = torch.linspace(length, length / 8, batch).long()
    mask = (torch.arange(length) < lengths[:, None])[:, None, None]
    scale = size**-0.5

    def split(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(batch, length, heads, size).transpose(1, 2)

    def sdpa(attn_mask: torch.Tensor | None) -> torch.Tensor:
        out = functional.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=attn_mask)
        return out.transpose(1, 2).flatten(2)

    def kpdeploy(counted: torch.Tensor | None) -> Any:
        return torch.ops.kpdeploy.attention(q, k, v, counted, heads, heads, scale, False)

    feeds = {"q": q, "k": k, "v": v}
    fused = ours("Attention", ["q", "k", "v", "l"], ["y"], heads=heads, kv_heads=heads, scale=scale, causal=0)
    peer = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], num_heads=heads, domain="com.microsoft")
    return {
        "torch: kpdeploy::attention": lambda: kpdeploy(None),
        "torch: kpdeploy::attention, lengths": lambda: kpdeploy(lengths),
        "torch: SDPA with its transposes": lambda: sdpa(None),
        "torch: SDPA, key mask": lambda: sdpa(mask),
        "ORT: com.kpdeploy:Attention, lengths": session([fused], {**feeds, "l": lengths}, {}, threads),
        "ORT: MultiHeadAttention": session([peer], feeds, {}, threads),
    }


def rotation(rows: int, heads: int, size: int, threads: int) -> dict[str, Run]:
    """Queries and keys of one product, by the tables of their positions."""
    x, angles = torch.randn(1, rows, heads * size), torch.rand(1, rows, size // 2) * 6
    cos, sin = (table.repeat(1, 1, 2) for table in (angles.cos(), angles.sin()))
    places, tables = torch.zeros(1, dtype=torch.int64), {"c": angles.cos()[0], "s": angles.sin()[0]}

    def chain() -> torch.Tensor:
        q = x.unflatten(-1, (heads, size)).transpose(1, 2)
        across = torch.cat((-q[..., size // 2 :], q[..., : size // 2]), dim=-1)
        return (q * cos.unsqueeze(1) + across * sin.unsqueeze(1)).transpose(1, 2).flatten(2)

    node = ours("RotaryEmbedding", ["x", "c", "s"], ["y"], heads=heads)
    theirs = helper.make_node("RotaryEmbedding", ["x", "p", "c", "s"], ["y"], domain="com.microsoft", num_heads=heads)
    return {
        "a copy, into new memory": lambda: x.clone(),
        "torch: kpdeploy::rotary_embedding": lambda: torch.ops.kpdeploy.rotary_embedding(x, cos, sin, heads),
        "torch: its separate ops": chain,
        "ORT: com.kpdeploy:RotaryEmbedding": session([node], {"x": x, "c": cos, "s": sin}, {}, threads),
        "ORT: com.microsoft:RotaryEmbedding": session([theirs], {"x": x}, {"p": places, **tables}, threads),
    }


def measure(candidates: Mapping[str, Run], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            taken[name].append((clock() - start) * 1e3)
    return {name: round(statistics.median(times), 4) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    decision = register()
    assert not isinstance(decision, Skipped), decision.reason
    rows = {
        "add_layer_norm 1024x384": norms(1024, 384, chosen.threads),
        "add_layer_norm 16384x1024": norms(16384, 1024, chosen.threads),
        "linear_activation 1024x384x1536 gelu": linear(1024, 384, 1536, chosen.threads),
        "linear_activation 128x768x3072 gelu": linear(128, 768, 3072, chosen.threads),
        **{
            f"linear {rows}x{k}x{n}": linear(rows, k, n, chosen.threads, "none")
            for rows, k, n in ((1024, 384, 384), (1024, 1536, 384), (128, 768, 768), (128, 768, 2304), (128, 3072, 768))
        },
        "attention 8x12x128x32": attention(8, 12, 128, 32, chosen.threads),
        "attention 1x12x1024x64": attention(1, 12, 1024, 64, chosen.threads),
        "rotary_embedding 128 rows, 40 heads of 64": rotation(128, 40, 64, chosen.threads),
        "rotary_embedding 2048 rows, 40 heads of 64": rotation(2048, 40, 64, chosen.threads),
    }
    results = {}
    for row, candidates in rows.items():
        results[row] = measure(candidates, chosen.rounds, CLOCKS[chosen.clock])
        print(row)
        for name, milliseconds in results[row].items():
            print(f"  {name:40} {milliseconds:9.3f} ms")
    if chosen.json:
        settings = {"threads": chosen.threads, "rounds": chosen.rounds, "clock": chosen.clock}
        document = {"settings": settings, "median_ms": results, "environment": environment()}
        chosen.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
