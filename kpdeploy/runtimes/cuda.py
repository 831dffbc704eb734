"""An exported program on an NVIDIA GPU, in CUDA graphs: one a bucket of sizes, captured when the artifact is loaded.

A request runs in the smallest bucket that holds it, padded with zeros; its answer is cut to its own sizes. One that no
bucket holds runs without a graph, and `run.missed` counts it. `graphs.json` beside the program says, in JSON:

    device    "cuda"; "cpu" runs the same buckets without graphs, for tests
    inputs, outputs    the shape of each, with the names of its dynamic axes: ["batch", "seq"]
    dtypes, output_dtypes    of the inputs and the outputs
    padded    the axes that zeros may fill up: those of a bucket that are not among them must be equal
    mask      the index of the input that tells tokens from padding, of a program that drops padding; null: it does not.
              Such a program takes three inputs more: the places of the tokens in the batch, the same with one behind
              the batch where a bucket has more tokens, and where each row's tokens begin
    constant  whether all weights are tensors that the program holds, and nothing that it computes
    buckets   {"batch": 8, "seq": 128, "tokens": 512} each; `tokens` only where padding is dropped

Settings: `op_libraries` (paths), `device_index` (which GPU; 0). Arrays may be NumPy's, or tensors on the GPU: the
answers are of the same kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = Sequence[Any]
Sizes = Mapping[str, int]

ALIGNED = 256
"""Bytes: each input begins at a multiple, as the allocator's own memory does."""

SMALL = 1 << 16
"""Bytes: answers that a bucket has a place on the host for. Of larger ones a copy costs more than a new place."""


def _beside(name: str) -> Any:
    """A module of this file's own folder, whatever else goes by that name."""
    spec = importlib.util.spec_from_file_location(f"kpdeploy_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tools = _beside("buckets")
LOADED: weakref.WeakSet[Graphs] = weakref.WeakSet()


def load(path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]) -> Graphs:
    for library in settings.get("op_libraries", ()):
        torch.ops.load_library(library)
    described = json.loads(Path(path).with_name("graphs.json").read_text())
    if described["device"] == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"the artifact runs on an NVIDIA GPU, and torch {torch.__version__} sees none here")
        torch.cuda.set_device(settings.get("device_index", 0))
    before = torch.cuda.memory_allocated()
    try:
        program = torch.export.load(path).module(check_guards=False)
    except RuntimeError as error:
        if "kpdeploy" not in str(error):
            raise
        why = "the model calls fused ops, whose kernels are in libkpdeploy_torch.so"
        raise RuntimeError(f"{why}: load that first (op_libraries, torch.ops.load_library or LD_PRELOAD)") from None
    with _constant_weights(settings.get("op_libraries", ()) if described["constant"] else ()):
        return Graphs(program, described, weights=torch.cuda.memory_allocated() - before)


@contextlib.contextmanager
def _constant_weights(libraries: Sequence[str]) -> Iterator[None]:
    """Let the kernels that are captured read weights before the kernel ahead has ended: nobody writes them."""
    switches = [getattr(ctypes.CDLL(library), "kpdeploy_use_constant_weights", None) for library in libraries]
    before = [switch(1) if switch is not None else 0 for switch in switches]
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            if switch is not None:
                switch(value)


def of_dlpack(capsule: Any) -> torch.Tensor:
    """A tensor that somebody else holds on the GPU, and `to_dlpack` the way back: neither copies."""
    return torch.utils.dlpack.from_dlpack(capsule)


def to_dlpack(tensor: torch.Tensor) -> Any:
    return torch.utils.dlpack.to_dlpack(tensor.contiguous())  # type: ignore[attr-defined]


def memory() -> list[dict[str, Any]]:
    """What this process holds on the GPU now. The last part is what the GPU has given beside: to CUDA, to the kernels
    of libraries, and to other processes."""
    if not torch.cuda.is_initialized():
        return []
    torch.cuda.empty_cache()
    held, graphs = torch.cuda.memory_reserved(), sum(loaded.graph_bytes for loaded in LOADED)
    weights, inputs = sum(loaded.weights for loaded in LOADED), sum(loaded.memory.nbytes for loaded in LOADED)
    pools = sum(_held_by(loaded.pool) for loaded in LOADED)
    parts = {
        "weights": weights,
        "inputs": inputs,
        "workspaces": held - pools - weights - inputs,
        "activations and outputs": pools,
        "CUDA graphs": graphs,
        "CUDA and kernels": max(0, _outside() - graphs),
    }
    name = torch.cuda.get_device_name()
    return [{"what": what, "bytes": count, "device": name} for what, count in parts.items()]


def _held_by(pool: Any) -> int:
    """The bytes of a pool of graphs."""
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool))


def _outside() -> int:
    """What is taken of the GPU's memory beside what torch's allocator holds, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _places(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> tuple[list[int], int]:
    """Where each of some tensors begins in a memory that holds them all, and the bytes of all."""
    begins, end = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        begins.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
    return begins, end


def _views(memory: torch.Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """The tensors in that memory."""
    found = []
    for shape, dtype, begin in zip(shapes, dtypes, _places(shapes, dtypes)[0], strict=True):
        part = memory[begin : begin + math.prod(shape) * dtype.itemsize]
        found.append(part.view(dtype).view(tuple(shape)))
    return found


class Graphs:
    """The program and its graphs. Calls from several threads take turns.

    `weights` and `graph_bytes`: what was taken of the GPU's memory for the program, and for the graphs themselves.
    """

    def __init__(self, program: torch.nn.Module, described: Mapping[str, Any], *, weights: int = 0) -> None:
        self.program = program
        self.described = described
        self.device = torch.device(described["device"])
        self.on_gpu = self.device.type == "cuda"
        self.buckets: list[Sizes] = described["buckets"]
        self.ladder = tools.Ladder(described)
        self.mask: int | None = described["mask"]
        self.missed = 0
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self.weights = weights
        self.graph_bytes = 0
        self.dtypes = [getattr(torch, dtype) for dtype in described["dtypes"]]
        largest = max((_places(self.shapes(bucket), self.dtypes)[1] for bucket in self.buckets), default=0)
        self.host = torch.zeros(largest, dtype=torch.uint8, pin_memory=self.on_gpu)
        self.memory = torch.zeros(largest, dtype=torch.uint8, device=self.device) if self.on_gpu else self.host
        self.answers = torch.zeros(SMALL, dtype=torch.uint8, pin_memory=self.on_gpu)
        made = {index: _Bucket(self, self.buckets[index]) for index in tools.largest_first(self.buckets)}
        self.captured = [made[index] for index in range(len(self.buckets))]
        LOADED.add(self)

    def shapes(self, bucket: Sizes) -> list[list[int]]:
        """The shapes of all of the program's inputs in a bucket."""
        shapes: list[list[int]] = [tools.shape_in(bucket, shape) for shape in self.described["inputs"]]
        if self.mask is not None:
            shapes += [[bucket["tokens"]], [bucket["tokens"]], [shapes[self.mask][0] + 1]]
        return shapes

    def __call__(self, arrays: Arrays) -> Arrays:
        on_gpu = isinstance(arrays[0], torch.Tensor)
        mask = self._mask(arrays)
        with self.lock:
            index, cuts = self.ladder.find(arrays, 0 if mask is None else int(np.count_nonzero(mask)))
            if index is None:
                return self._without_graph(arrays, mask, on_gpu)
            if on_gpu:
                with torch.inference_mode():
                    results = self.captured[index].run_there(arrays, mask)
                    return [result[cut].clone() for result, cut in zip(results, cuts, strict=True)]
            found: Arrays = self.captured[index].run(arrays, cuts)
            return found

    def _mask(self, arrays: Arrays) -> np.ndarray[Any, Any] | None:
        """What tells a request's tokens from its padding, on the host; None where padding is not dropped."""
        if self.mask is None:
            return None
        mask = arrays[self.mask]
        found: np.ndarray[Any, Any] = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else mask
        return found

    def to_host(self, results: Sequence[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
        if not self.on_gpu:
            return [result.numpy().copy() for result in results]
        copies = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True).copy_(r, non_blocking=True) for r in results]
        torch.cuda.current_stream().synchronize()
        return [copy.numpy() for copy in copies]

    @torch.inference_mode()
    def _without_graph(self, arrays: Arrays, mask: np.ndarray[Any, Any] | None, on_gpu: bool) -> Arrays:
        self.missed += 1
        tensors = [a if on_gpu else torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in arrays]
        if mask is not None:
            count = max(1, int(np.count_nonzero(mask)))
            packed = [np.empty(size, np.int64) for size in (count, count, len(mask) + 1)]
            tools.pack(mask, *packed)
            tensors += [torch.from_numpy(a).to(self.device) for a in packed]
        results = self.program(*tensors)
        return list(results) if on_gpu else self.to_host(results)


class _Bucket:
    """The program at one set of sizes: its graph, its inputs in the shared memory, and its outputs."""

    def __init__(self, graphs: Graphs, sizes: Sizes) -> None:
        self.graphs = graphs
        shapes = graphs.shapes(sizes)
        self.staged = [view.numpy() for view in _views(graphs.host, shapes, graphs.dtypes)]
        self.inputs = _views(graphs.memory, shapes, graphs.dtypes)
        begins, end = _places(shapes, graphs.dtypes)
        # Sliced once: all inputs, and those alone that tell where tokens are.
        self.upload = graphs.memory[:end], graphs.host[:end]
        extra = [*begins, end][len(graphs.described["inputs"])]
        self.upload_packed = graphs.memory[extra:end], graphs.host[extra:end]
        self.graph: Any = None
        self.outputs: Sequence[torch.Tensor] = ()
        self.homes: list[torch.Tensor] = []
        if graphs.on_gpu:
            self._capture()
            self.homes = self.places_on_host()

    @torch.inference_mode()
    def _capture(self) -> None:
        stream = self.graphs.stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Once outside: libraries make their handles and workspaces at their first call.
            self.graphs.program(*self.inputs)
        stream.synchronize()
        before = _outside()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.graphs.pool, stream=stream):
            self.outputs = self.graphs.program(*self.inputs)
        # The first replay brings the graph to the GPU.
        self.graph.replay()
        torch.cuda.synchronize()
        self.graphs.graph_bytes += max(0, _outside() - before)

    def places_on_host(self) -> list[torch.Tensor]:
        """Where answers come to on the host, if they are small."""
        shapes, dtypes = [o.shape for o in self.outputs], [o.dtype for o in self.outputs]
        return _views(self.graphs.answers, shapes, dtypes) if _places(shapes, dtypes)[1] <= SMALL else []

    def run(self, arrays: Arrays, cuts: Sequence[tuple[slice, ...]]) -> list[np.ndarray[Any, Any]]:
        """The answers to a request on the host: `cuts` of the bucket's outputs."""
        for target, array in zip(self.staged, arrays, strict=False):
            tools.fill(target, array)
        if self.graphs.mask is not None:
            tools.pack(self.staged[self.graphs.mask], *self.staged[-3:])
        if self.graph is None:
            with torch.inference_mode():
                found = self.graphs.program(*self.inputs)
            return self.graphs.to_host([result[cut] for result, cut in zip(found, cuts, strict=True)])
        there, here = self.upload
        there.copy_(here, non_blocking=True)
        self.graph.replay()
        if not self.homes:
            return self.graphs.to_host([result[cut] for result, cut in zip(self.outputs, cuts, strict=True)])
        for home, output in zip(self.homes, self.outputs, strict=True):
            home.copy_(output, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return [home.numpy()[cut].copy() for home, cut in zip(self.homes, cuts, strict=True)]

    def run_there(self, arrays: Arrays, mask: np.ndarray[Any, Any] | None) -> Sequence[torch.Tensor]:
        """The whole outputs of the bucket, for a request that is on the GPU: they hold until the next call."""
        for target, array in zip(self.inputs, arrays, strict=False):
            tools.fill(target, array)
        if mask is not None:
            assert self.graphs.mask is not None
            tools.fill(self.staged[self.graphs.mask], mask)
            tools.pack(self.staged[self.graphs.mask], *self.staged[-3:])
        if self.graph is None:
            outputs: Sequence[torch.Tensor] = self.graphs.program(*self.inputs)
            return outputs
        if mask is not None:
            there, here = self.upload_packed
            there.copy_(here, non_blocking=True)
            # The next request may write there.
            torch.cuda.current_stream().synchronize()
        self.graph.replay()
        return self.outputs
