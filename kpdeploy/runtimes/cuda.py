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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = Sequence[Any]
Sizes = Mapping[str, int]

ALIGNED = 256
"""Bytes: each input begins at a multiple, as the allocator's own memory does."""


def _beside(name: str) -> Any:
    """A module of this file's own folder, whatever else goes by that name."""
    spec = importlib.util.spec_from_file_location(f"kpdeploy_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tools = _beside("buckets")


def load(path: str, *, inputs: Sequence[str], outputs: Sequence[str], settings: dict[str, Any]) -> Graphs:
    for library in settings.get("op_libraries", ()):
        torch.ops.load_library(library)
    described = json.loads(Path(path).with_name("graphs.json").read_text())
    if described["device"] == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"the artifact runs on an NVIDIA GPU, and torch {torch.__version__} sees none here")
        torch.cuda.set_device(settings.get("device_index", 0))
    try:
        program = torch.export.load(path).module(check_guards=False)
    except RuntimeError as error:
        if "kpdeploy" not in str(error):
            raise
        why = "the model calls fused ops, whose kernels are in libkpdeploy_torch.so"
        raise RuntimeError(f"{why}: load that first (op_libraries, torch.ops.load_library or LD_PRELOAD)") from None
    with _constant_weights(settings.get("op_libraries", ()) if described["constant"] else ()):
        return Graphs(program, described)


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
    """What this process holds on the GPU now: weights, inputs and CUDA graphs."""
    if not torch.cuda.is_initialized():
        return []
    free, total = torch.cuda.mem_get_info()
    held, name = torch.cuda.memory_reserved(), torch.cuda.get_device_name()
    parts = {"weights and activations": torch.cuda.memory_allocated(), "room of CUDA graphs": held}
    parts["room of CUDA graphs"] -= parts["weights and activations"]
    parts["CUDA, libraries and graphs"] = max(0, total - free - held)
    return [{"what": what, "bytes": count, "device": name} for what, count in parts.items()]


class Graphs:
    """The program and its graphs. Calls from several threads take turns."""

    def __init__(self, program: torch.nn.Module, described: Mapping[str, Any]) -> None:
        self.program = program
        self.described = described
        self.device = torch.device(described["device"])
        self.on_gpu = self.device.type == "cuda"
        self.padded: list[str] = described["padded"]
        self.buckets: list[Sizes] = described["buckets"]
        self.missed = 0
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self.dtypes = [getattr(torch, dtype) for dtype in described["dtypes"]]
        largest = max((self.layout(bucket)[1] for bucket in self.buckets), default=0)
        self.host = torch.zeros(largest, dtype=torch.uint8, pin_memory=self.on_gpu)
        self.memory = torch.zeros(largest, dtype=torch.uint8, device=self.device) if self.on_gpu else self.host
        with torch.inference_mode():
            made = {index: _Bucket(self, self.buckets[index]) for index in tools.largest_first(self.buckets)}
        self.captured = [made[index] for index in range(len(self.buckets))]

    def _shapes(self, bucket: Sizes) -> list[list[int]]:
        """The shapes of all of the program's inputs in a bucket."""
        shapes: list[list[int]] = [tools.shape_in(bucket, shape) for shape in self.described["inputs"]]
        if self.described["mask"] is not None:
            rows = shapes[self.described["mask"]][0]
            shapes += [[bucket["tokens"]], [bucket["tokens"]], [rows + 1]]
        return shapes

    def layout(self, bucket: Sizes) -> tuple[list[int], int]:
        """Where each input begins in the memory that all buckets share, and the bytes of all."""
        begins, end = [], 0
        for shape, dtype in zip(self._shapes(bucket), self.dtypes, strict=True):
            begins.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        return begins, end

    def views(self, memory: torch.Tensor, bucket: Sizes) -> list[torch.Tensor]:
        """The inputs of a bucket in the shared memory, of the GPU or of the host."""
        found = []
        for shape, dtype, begin in zip(self._shapes(bucket), self.dtypes, self.layout(bucket)[0], strict=True):
            part = memory[begin : begin + math.prod(shape) * dtype.itemsize]
            found.append(part.view(dtype).view(shape))
        return found

    def __call__(self, arrays: Arrays) -> Arrays:
        with self.lock, torch.inference_mode():
            on_gpu = isinstance(arrays[0], torch.Tensor)
            sizes = tools.sizes_of(arrays, self.described["inputs"])
            tokens = self._tokens(arrays)
            wanted = sizes if tokens is None else {**sizes, "tokens": len(tokens)}
            index = tools.smallest(self.buckets, wanted, self.padded)
            if index is None:
                return self._without_graph(arrays, tokens, on_gpu)
            results = self.captured[index].run(arrays, tokens)
            cut = [tools.cut(r, shape, sizes) for r, shape in zip(results, self.described["outputs"], strict=True)]
            return [part.clone() for part in cut] if on_gpu else self._to_host(cut)

    def _tokens(self, arrays: Arrays) -> np.ndarray[Any, Any] | None:
        """The places of a request's tokens: row and column of each."""
        if self.described["mask"] is None:
            return None
        mask = arrays[self.described["mask"]]
        return np.argwhere(mask.cpu().numpy() if isinstance(mask, torch.Tensor) else mask)

    def _to_host(self, results: Sequence[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
        if not self.on_gpu:
            return [result.numpy().copy() for result in results]
        copies = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True).copy_(r, non_blocking=True) for r in results]
        torch.cuda.current_stream().synchronize()
        return [copy.numpy() for copy in copies]

    def _without_graph(self, arrays: Arrays, tokens: np.ndarray[Any, Any] | None, on_gpu: bool) -> Arrays:
        self.missed += 1
        tensors = [a if on_gpu else torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in arrays]
        if tokens is not None:
            extra = tools.packing(tokens, tensors[self.described["mask"]].shape, len(tokens))
            tensors += [torch.from_numpy(a).to(self.device) for a in extra]
        results = self.program(*tensors)
        return list(results) if on_gpu else self._to_host(results)


class _Bucket:
    """The program at one set of sizes: its graph, its inputs in the shared memory, and its outputs."""

    def __init__(self, graphs: Graphs, sizes: Sizes) -> None:
        self.graphs = graphs
        self.sizes = sizes
        self.staged = [view.numpy() for view in graphs.views(graphs.host, sizes)]
        self.inputs = graphs.views(graphs.memory, sizes)
        self.begins, self.end = graphs.layout(sizes)
        self.graph: Any = None
        self.outputs: Sequence[torch.Tensor] = ()
        if graphs.on_gpu:
            self._capture()

    def _capture(self) -> None:
        stream = self.graphs.stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Once outside: libraries make their handles and workspaces at their first call.
            self.graphs.program(*self.inputs)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.graphs.pool, stream=stream):
            self.outputs = self.graphs.program(*self.inputs)

    def run(self, arrays: Arrays, tokens: np.ndarray[Any, Any] | None) -> Sequence[torch.Tensor]:
        self._fill(arrays, tokens)
        if self.graph is None:
            outputs: Sequence[torch.Tensor] = self.graphs.program(*self.inputs)
            return outputs
        self.graph.replay()
        return self.outputs

    def _fill(self, arrays: Arrays, tokens: np.ndarray[Any, Any] | None) -> None:
        """The request into the bucket's inputs, zeros behind it."""
        if tokens is not None:
            mask = self.staged[self.graphs.described["mask"]]
            packed = tools.packing(tokens, mask.shape, self.sizes["tokens"])
            for place, array in zip(self.staged[-3:], packed, strict=True):
                place[...] = array
        on_gpu = isinstance(arrays[0], torch.Tensor)
        targets: Sequence[Any] = self.inputs if on_gpu else self.staged
        for target, array in zip(targets, arrays, strict=False):
            tools.fill(target, array)
        # What came on the GPU is in its place.
        staged = self.begins[len(arrays) :] if on_gpu else self.begins
        if self.graphs.on_gpu and staged:
            used = slice(staged[0], self.end)
            self.graphs.memory[used].copy_(self.graphs.host[used], non_blocking=True)
