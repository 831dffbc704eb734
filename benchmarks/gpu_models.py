"""Whole models on an H100 in CUDA graphs, beside torch.compile's best in one: times, errors, floors.

    python benchmarks/gpu_models.py --json gpu_models_h100.json
    python benchmarks/gpu_models.py --only bert --levels float16

Each model is what `kpdeploy export --level N` packages (its exported program, loaded by kpdeploy.runtimes.cuda), with
random weights: times do not depend on them. The peer is torch.compile(mode="max-autotune") in bfloat16, captured in a
CUDA graph. Times are medians of graph replays, all in turns, inputs and outputs on the GPU; `whole` is a call from
NumPy arrays to NumPy arrays. Errors are ‖out - ref‖ / ‖ref‖ against the unmodified model in float32 on the GPU,
without TF32. The floor is the larger of a model's products at the measured rate of a large one and its weights over the
measured rate of a copy. Exit code 1: an error above --most; a goal that is not reached is only told.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda_kernels import versions
from torch.nn.attention import SDPBackend, sdpa_kernel

from kpdeploy.decision import Applied
from kpdeploy.errors import ExportFailed
from kpdeploy.export import cuda as graphs
from kpdeploy.export.capture import Capture, settle_axes
from kpdeploy.inputs import sample
from kpdeploy.load import Request
from kpdeploy.load.factory import from_module
from kpdeploy.load.flat import Flat
from kpdeploy.model import Model
from kpdeploy.ops import register
from kpdeploy.ops.libraries import TORCH, find
from kpdeploy.optimize import fuse
from kpdeploy.optimize.lowered import lowered
from kpdeploy.runtimes import cuda

ROUNDS = 7
REPLAYS = 20
PEER = "torch.compile"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row: a model at one size. `tokens`: of random lengths, as a share of all places; 1: all. `goals`: of the
    peer's time over ours, by precision."""

    model: str
    sizes: Mapping[str, int]
    tokens: float = 1.0
    goals: Mapping[str, float]

    @property
    def name(self) -> str:
        share = f", {self.tokens:.0%} tokens" if self.tokens < 1 else ""
        return f"{self.model} {'x'.join(map(str, self.sizes.values()))}{share}"


def goals(half: float, eight: float) -> dict[str, float]:
    return {"float16": half, "bfloat16": half, "fp8": eight}


WORKS = (
    Work(model="bert", sizes={"batch": 1, "seq": 128}, goals=goals(2.0, 2.5)),
    Work(model="bert", sizes={"batch": 8, "seq": 128}, goals=goals(2.0, 2.5)),
    Work(model="bert", sizes={"batch": 32, "seq": 384}, goals=goals(1.8, 2.6)),
    Work(model="bert", sizes={"batch": 32, "seq": 384}, tokens=0.5, goals=goals(3.0, 2.6)),
    Work(model="vit", sizes={"batch": 32}, goals=goals(1.5, 1.5)),
    Work(model="llama", sizes={"batch": 1, "seq": 2048}, goals=goals(1.5, 1.5)),
    Work(model="llama-step-1", sizes={}, goals=goals(1.5, 1.5)),
    Work(model="llama-step-32", sizes={}, goals=goals(1.5, 1.5)),
)


class Bert(torch.nn.Module):
    """BERT-base with the pooled output alone: padded places are not shown."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.model = BertModel(BertConfig())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return pooled


class Vit(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        self.model = ViTForImageClassification(ViTConfig(num_labels=1000))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


LLAMA = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
"""The sizes of Llama 3.2 1B."""


class Llama(torch.nn.Module):
    """Logits of the last token, as a prefill needs them."""

    def __init__(self, sizes: Mapping[str, int] = LLAMA) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=8192)
        self.model = LlamaForCausalLM(config)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits
        return logits


class LlamaStep(Llama):
    """Logits of one token more for each row, behind `cached` ones, whose keys and values are held as weights
    are. The graph reads them all and writes them with one more, as a cache in a list does; so does the peer."""

    def __init__(self, batch: int, cached: int = 2047, sizes: Mapping[str, int] = LLAMA) -> None:
        super().__init__(sizes)
        from transformers.cache_utils import DynamicCache

        self.cache_type = DynamicCache  # torch.compile does not trace the lazy import of it
        shape = (sizes["num_hidden_layers"], batch, sizes["num_key_value_heads"], cached, sizes["head_dim"])
        self.register_buffer("keys", torch.randn(shape))
        self.register_buffer("values", torch.randn(shape))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        cache = self.cache_type(list(zip(self.keys, self.values, strict=True)))
        logits: torch.Tensor = self.model(input_ids=input_ids, past_key_values=cache).logits
        return logits


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[str, ...]]] = {
    "bert": (Bert, ("input_ids:int64[batch=1..32,seq=1..384]{0..30521}", "attention_mask:int64[batch,seq]{mask}")),
    "vit": (Vit, ("pixel_values:float32[batch=1..32,3,224,224]",)),
    "llama": (Llama, ("input_ids:int64[batch=1..2,seq=1..2048]{0..128255}",)),
    "llama-step-1": (partial(LlamaStep, 1), ("input_ids:int64[1,1]{0..128255}",)),
    "llama-step-32": (partial(LlamaStep, 32), ("input_ids:int64[32,1]{0..128255}",)),
}


ATTENTION = {"bert": (12, 768), "vit": (12, 768), "llama": (16, 2048)}
"""Layers, and the width of all heads."""


def inputs_of(work: Work, signature: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Fresh inputs; the mask's lengths are random with the mean asked for, or all whole."""
    arrays = sample(signature, work.sizes, rng)
    for spec in signature.inputs:
        if spec.values is not None and spec.values.kind == "prefix_mask":
            rows, width = arrays[spec.name].shape
            lengths = np.full(rows, width)
            if work.tokens < 1:
                lengths = rng.integers(1, width, size=rows, endpoint=True)
                lengths = np.clip(np.round(lengths * work.tokens * width / lengths.mean()), 1, width)
            arrays[spec.name] = (np.arange(width) < lengths[:, None]).astype(spec.dtype)
    return arrays


def timed(replays: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median microseconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in replays}
    for replay in replays.values():
        replay()
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            replay()
            begin.record()
            for _ in range(REPLAYS):
                replay()
            end.record()
            end.synchronize()
            taken[name].append(begin.elapsed_time(end) * 1e3 / REPLAYS)
    return {name: statistics.median(times) for name, times in taken.items()}


def profiled(replay: Callable[[], Any]) -> list[tuple[float, int, str]]:
    """Microseconds, calls and name of each kernel in one replay, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        replay()
        torch.cuda.synchronize()
    events = [(event.self_device_time_total, event.count, event.key[:90]) for event in seen.key_averages()]
    return sorted(events, reverse=True)[:16]


FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@dataclass
class Compiled:
    """torch.compile's best of a module in bfloat16, in a CUDA graph for each size."""

    module: torch.nn.Module
    made: dict[tuple[int, ...], tuple[Any, list[torch.Tensor], torch.Tensor]]

    def at(self, arrays: Mapping[str, Any]) -> tuple[Callable[[], Any], torch.Tensor]:
        """Its replay on these inputs, and the tensor that holds the answer after one."""
        tensors = [torch.from_numpy(a).cuda() for a in arrays.values()]
        tensors = [t.bfloat16() if t.is_floating_point() else t for t in tensors]
        sizes = tuple(tensors[0].shape)
        if sizes not in self.made:
            self.made[sizes] = self._captured(tensors)
        graph, inputs, out = self.made[sizes]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        return graph.replay, out

    def _captured(self, tensors: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        """With fused attention where torch has it: for some sizes it takes products in float32 by itself."""
        try:
            with sdpa_kernel(FUSED):
                return self._captured_so(tensors)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"   without fused attention: {error}"[:200], flush=True)
            return self._captured_so(tensors)

    def _captured_so(self, tensors: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        torch._dynamo.reset()
        best = torch.compile(self.module, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                best(*tensors)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
            out = best(*tensors)
        return graph, tensors, out


def ceilings() -> dict[str, float]:
    """TFLOP/s of a product of 8192³ in bfloat16, and GB/s of a copy of 1 GiB."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    us = timed({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {"bf16_tflops": 2 * 8192**3 / us["product"] / 1e6, "copy_gbs": 2 * source.nbytes / us["copy"] / 1e3}


def floor_us(module: torch.nn.Module, work: Work, top: Mapping[str, float]) -> float:
    """Operations of the products and attention at the rate of a large product, or the bytes of weights and cached keys
    and values at a copy's."""
    linears = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    held = 2 * (sum(m.weight.numel() for m in linears) + sum(b.numel() for b in module.buffers() if b.dim() == 5))
    if isinstance(module, LlamaStep):
        return held / top["copy_gbs"] / 1e3
    tokens = math.prod(work.sizes.values()) if "seq" in work.sizes else work.sizes["batch"] * 197
    length, layers, width = work.sizes.get("seq", 197), *ATTENTION[work.model]
    # Of random lengths l the mean of l squared is 4/3 of the square of the mean.
    seen = length * work.tokens * (4 / 3 if work.tokens < 1 else 1) * (1 / 2 if work.model == "llama" else 1)
    products = 2 * sum(m.weight.numel() for m in linears if m.out_features < 100_000) * tokens * work.tokens
    operations = products + 4 * layers * width * tokens * work.tokens * seen
    return max(operations / top["bf16_tflops"] / 1e6, held / top["copy_gbs"] / 1e3)


def model_of(name: str, module: torch.nn.Module) -> Model:
    """One of MODELS, with the axes that its row states."""
    request = Request(inputs=MODELS[name][1], example=None, task=None, name=name, max_batch=32)
    return settle_axes(from_module(module, None, request, name=name, source={}), stated=True)


def fused_of(model: Model, folder: Path) -> Capture:
    fused = fuse(model)
    print("  ", "; ".join(d.what for d in fused.decisions if isinstance(d, Applied)), flush=True)
    again = replace(model, kind="module", module=Flat(fused.module, None), program=None, decisions=())
    return Capture(settle_axes(again, stated=True), folder)


def programs(capture: Capture, precision: str, works: Sequence[Work], samples: Sequence[Any]) -> dict[bool, Any]:
    """The program in one precision, with padding and without where a row asks for it, loaded with the buckets of the
    rows' sizes and no others."""
    loaded = {}
    axes = tuple(a.name for a in capture.signature.axes)
    library = str(find(TORCH))
    for dropped in sorted({work.tokens < 1 for work in works}):
        inner = capture.folder / f"{precision}-{dropped}"
        inner.mkdir()
        form = graphs.Form(precision=precision, dropped=dropped, padded=axes)
        began = time.perf_counter()
        made = lowered(
            capture.program, bits=precision, dropped=dropped, device="cuda", samples=samples, budget=1.0, whole=True
        )
        graphs.export(capture, inner, form, module=Flat(made.module, None), constant=made.constant)
        print("  ", precision, [d.what for d in made.decisions], f"{time.perf_counter() - began:.0f} s", flush=True)
        described = json.loads((inner / graphs.GRAPHS).read_text())
        asked = [work.sizes for work in works if (work.tokens < 1) == dropped]
        described["buckets"] = [b for b in described["buckets"] if {a: b[a] for a in axes} in asked]
        (inner / graphs.GRAPHS).write_text(json.dumps(described))
        settings = {"op_libraries": [library]}
        loaded[dropped] = cuda.load(str(inner / graphs.FILENAME), inputs=(), outputs=(), settings=settings)
    return loaded


def in_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    """A copy as `from_pretrained(dtype=bfloat16)` makes it: frequencies of rotary embeddings stay in float32."""
    made = copy.deepcopy(module).bfloat16()
    for part, plain in zip(made.modules(), module.modules(), strict=True):
        if "inv_freq" in part._buffers:
            part._buffers["inv_freq"] = plain._buffers["inv_freq"]
    return made


def error_of(answer: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(answer, np.float64) - expected) / np.linalg.norm(expected))


def whole_us(graph: Any, arrays: Mapping[str, Any]) -> float:
    """Of a call from NumPy to NumPy."""
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        graph(list(arrays.values()))
        taken.append((time.perf_counter() - start) * 1e6)
    return statistics.median(taken)


def replay_of(graph: Any, arrays: Mapping[str, Any]) -> Callable[[], Any]:
    """The replay of the graph in which a request runs: the request itself ran just before."""
    mask = graph.described["mask"]
    asked = list(arrays.values())
    index, _ = graph.ladder.find(asked, 0 if mask is None else int(asked[mask].sum()))
    assert index is not None
    replay: Callable[[], Any] = graph.captured[index].graph.replay
    return replay


def row_of(
    work: Work, arrays: Mapping[str, Any], module: torch.nn.Module, run: Mapping[str, Any], peer: Compiled | None
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """A row without its times, and what is to be timed."""
    with torch.no_grad():
        expected = module(*(torch.from_numpy(a).cuda() for a in arrays.values())).double().cpu().numpy()
    replays: dict[str, Callable[[], Any]] = {}
    row: dict[str, Any] = {"work": work.name, "error": {}, "whole_us": {}, "goal": {}}
    for precision, loaded in run.items():
        graph = loaded[work.tokens < 1]
        row["error"][precision] = error_of(graph(list(arrays.values()))[0], expected)
        row["whole_us"][precision] = whole_us(graph, arrays)
        row["goal"][precision] = work.goals.get(precision)
        replays[precision] = replay_of(graph, arrays)
    if peer is not None:
        replay, out = peer.at(arrays)
        replay()
        row["error"][PEER] = error_of(out.double().cpu(), expected)
        replays[PEER] = replay
    return row, replays


def measured(name: str, options: argparse.Namespace, top: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    works = [work for work in WORKS if work.model == name]
    torch.manual_seed(0)
    module = MODELS[name][0]().eval()
    model = model_of(name, module)
    rng = np.random.default_rng()
    few = {a.name: min(a.max, 4 if a.name == "batch" else 128) for a in model.signature.axes}
    samples = [sample(model.signature, few, rng) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        capture = fused_of(model, Path(folder))
        run = {}
        for precision in options.levels:
            try:
                run[precision] = programs(capture, precision, works, samples)
            except ExportFailed as error:
                print(f"   {precision}: {error}", flush=True)
        module = module.cuda()
        peer = None if options.no_peer else Compiled(in_bfloat16(module), {})
        for work in works:
            arrays = inputs_of(work, model.signature, rng)
            row, replays = row_of(work, arrays, module, run, peer)
            row["floor_us"] = floor_us(module, work, top)
            row["us"] = timed(replays)
            row["ratio"] = {p: row["us"][PEER] / row["us"][p] for p in run} if peer else {}
            print(" ", json.dumps(row), flush=True)
            for precision, replay in replays.items() if options.profile else ():
                found = [f"    {us:9.1f} {n:4d} {name}" for us, n, name in profiled(replay)]
                print(f"   {work.name} {precision}", *found, sep="\n", flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--levels", nargs="*", default=("bfloat16", "fp8"))
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--profile", action="store_true", help="print the longest kernels of each row")
    parser.add_argument("--built-with", default="", help="the compilers that made the library, for the JSON")
    parser.add_argument("--most", type=float, default=5e-2)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(register())
    top = ceilings()
    print(top, flush=True)
    rows = []
    for name in options.only:
        for row in measured(name, options, top):
            rows.append(row)
            if options.json:
                found = {"versions": versions(options.built_with), "ceilings": top, "rows": rows}
                options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(error > options.most for row in rows for p, error in row["error"].items() if p != "fp8"))


if __name__ == "__main__":
    main()
