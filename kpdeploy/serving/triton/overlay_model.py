"""The model.py of an overlay: Triton's python backend running a native artifact in the runtime that proved it.

Copied into the overlay, where it stands alone: NumPy, Triton's utilities, and beside it `runtime.py` (a copy of one
of kpdeploy.runtimes) and `artifact.json` (`path`, `inputs`, `outputs`, `settings`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only inside the server

Arrays = Sequence[np.ndarray[Any, Any]]


class TritonPythonModel:
    """What the python backend loads, by this name."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(__file__).parent
        artifact = json.loads((folder / "artifact.json").read_text())
        spec = importlib.util.spec_from_file_location("kpdeploy_runtime", folder / "runtime.py")
        assert spec is not None
        assert spec.loader is not None
        runtime = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(runtime)
        self.inputs: list[str] = artifact["inputs"]
        self.outputs: list[str] = artifact["outputs"]
        self.batched = json.loads(args["model_config"])["max_batch_size"] > 0
        self.run = runtime.load(
            artifact["path"], inputs=self.inputs, outputs=self.outputs, settings=artifact["settings"]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order; requests of equal shapes run as one batch."""
        arrays = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
            for request in requests
        ]
        groups: dict[Any, list[int]] = {}
        for index, tensors in enumerate(arrays):
            key = tuple(tensor.shape[1:] for tensor in tensors) if self.batched else index
            groups.setdefault(key, []).append(index)
        responses: list[Any] = [None] * len(requests)
        for members in groups.values():
            for index, response in zip(members, self.answer([arrays[i] for i in members]), strict=True):
                responses[index] = response
        return responses

    def answer(self, members: list[Arrays]) -> list[Any]:
        """Responses to requests that fit one batch. Where the batch fails each runs alone: one bad input must not
        fail the others."""
        try:
            if len(members) == 1:
                return [self.response(self.run(members[0]))]
            sizes = [len(tensors[0]) for tensors in members]
            merged = [np.concatenate(parts) for parts in zip(*members, strict=True)]
            results = [np.split(result, np.cumsum(sizes)[:-1]) for result in self.run(merged)]
            return [self.response(parts) for parts in zip(*results, strict=True)]
        except Exception as error:
            if len(members) > 1:
                return [self.answer([tensors])[0] for tensors in members]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))]

    def response(self, arrays: Arrays) -> Any:
        # Triton copies from contiguous memory only; parts of a split along the first axis already are.
        tensors = zip(self.outputs, arrays, strict=True)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.ascontiguousarray(a)) for name, a in tensors])
