"""A session of ONNX Runtime in CUDA graphs: one a bucket of sizes, captured when the artifact is loaded.

Each bucket of `graphs.json` (its contents: kpdeploy.runtimes.cuda) has its inputs and outputs at fixed addresses on the
GPU. A request runs in the smallest bucket that holds it, padded with zeros; its answer is cut to its own sizes. One
that no bucket holds runs without a graph, and `run.missed` counts it. onnx.py loads this file, which stands alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

Arrays = Sequence[np.ndarray[Any, Any]]

GRAPH = "gpu_graph_id"
"""A run's option: the number of the graph that it captures at first and replays from then on; -1: none."""


class Graphs:
    """A session and its graphs, one a bucket. Calls from several threads take turns.

    ONNX Runtime keeps graphs by thread: a thread that calls for the first time captures its own.
    """

    def __init__(
        self,
        session: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        described: Mapping[str, Any],
        device: tuple[str, int],
        tools: Any,
    ) -> None:
        self.session = session
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.described = described
        self.device = device
        self.tools = tools
        self.ladder = tools.Ladder(described)
        self.missed = 0
        self.lock = threading.Lock()
        self.uncaptured = ort.RunOptions()
        self.uncaptured.add_run_config_entry(GRAPH, "-1")
        buckets = self.described["buckets"]
        made = {index: _Bound(self, buckets[index], index + 1) for index in self.tools.largest_first(buckets)}
        self.bound = [made[index] for index in range(len(buckets))]

    def __call__(self, arrays: Arrays) -> Arrays:
        with self.lock:
            index, cuts = self.ladder.find(arrays)
            if index is None:
                self.missed += 1
                feeds = dict(zip(self.inputs, arrays, strict=True))
                found: Arrays = self.session.run(self.outputs, feeds, self.uncaptured)
                return found
            return [result[cut] for result, cut in zip(self.bound[index].run(arrays), cuts, strict=True)]


class _Bound:
    """One bucket: its inputs on the host and on the GPU, its outputs there, and the number of its graph."""

    def __init__(self, graphs: Graphs, bucket: Mapping[str, int], number: int) -> None:
        self.graphs = graphs
        self.options = ort.RunOptions()
        self.options.add_run_config_entry(GRAPH, str(number))
        tools, described = graphs.tools, graphs.described
        shapes = [tools.shape_in(bucket, shape) for shape in described["inputs"]]
        self.staged = [np.zeros(s, d) for s, d in zip(shapes, described["dtypes"], strict=True)]
        self.inputs = [ort.OrtValue.ortvalue_from_numpy(a, *graphs.device) for a in self.staged]
        shapes = [tools.shape_in(bucket, shape) for shape in described["outputs"]]
        self.outputs = [
            ort.OrtValue.ortvalue_from_shape_and_type(s, np.dtype(d), *graphs.device)
            for s, d in zip(shapes, described["output_dtypes"], strict=True)
        ]
        self.binding = graphs.session.io_binding()
        for name, value in zip(graphs.inputs, self.inputs, strict=True):
            self.binding.bind_ortvalue_input(name, value)
        for name, value in zip(graphs.outputs, self.outputs, strict=True):
            self.binding.bind_ortvalue_output(name, value)
        self.replay()

    def replay(self) -> None:
        """Run what is in the inputs; the first time, capture it."""
        self.graphs.session.run_with_iobinding(self.binding, self.options)

    def run(self, arrays: Arrays) -> list[np.ndarray[Any, Any]]:
        for staged, value, array in zip(self.staged, self.inputs, arrays, strict=True):
            self.graphs.tools.fill(staged, array)
            value.update_inplace(staged)
        self.replay()
        return [value.numpy() for value in self.outputs]
