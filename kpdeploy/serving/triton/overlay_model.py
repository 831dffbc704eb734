"""The model.py of an overlay: Triton's python backend running a native artifact in the runtime that proved it.

Copied into the overlay, where it stands alone: NumPy, Triton's utilities, and beside it `runtime.py` and `ragged.py`
(copies of kpdeploy.runtimes' files) and `artifact.json` (see kpdeploy.serving.triton.overlay.artifact).
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


def load_beside(name: str) -> Any:
    """A module of the overlay's own folder, whatever else goes by that name."""
    spec = importlib.util.spec_from_file_location(f"kpdeploy_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TritonPythonModel:
    """What the python backend loads, by this name."""

    def initialize(self, args: dict[str, str]) -> None:
        # Paths of an overlay are absolute, those of a repository's own model.py are names beside it.
        here = Path(__file__).parent
        artifact = json.loads((here / "artifact.json").read_text())
        settings = artifact["settings"]
        settings["op_libraries"] = [str(here / library) for library in settings.get("op_libraries", ())]
        if args.get("model_instance_kind") == "GPU":
            settings["device_index"] = int(args["model_instance_device_id"])
        self.ragged = load_beside("ragged")
        self.inputs: list[str] = artifact["inputs"]
        self.outputs: list[str] = artifact["outputs"]
        self.input_shapes = artifact["input_shapes"]
        self.output_shapes = artifact["output_shapes"]
        self.padded_axes: dict[str, int] = artifact["padded_axes"]
        self.batched = json.loads(args["model_config"])["max_batch_size"] > 0
        self.runtime = load_beside("runtime")
        self.run = self.runtime.load(
            str(here / artifact["path"]), inputs=self.inputs, outputs=self.outputs, settings=settings
        )

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """One response for each request. What runs together is answered as soon as it is done, the shortest first, so
        that its clients go on while the rest runs; what is alone is returned, which spares a message to the server."""
        arrays: list[Arrays] = [
            [self.array_of(pb_utils.get_input_tensor_by_name(request, name)) for name in self.inputs]
            for request in requests
        ]
        groups = self.batches(arrays)
        if len(groups) == 1:
            answers = dict(zip(groups[0], self.answer([arrays[i] for i in groups[0]]), strict=True))
            return [answers[index] for index in range(len(requests))]
        for members in reversed(groups):
            for index, response in zip(members, self.answer([arrays[i] for i in members]), strict=True):
                sender = requests[index].get_response_sender()
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def batches(self, arrays: list[Arrays]) -> list[list[int]]:
        """Which requests run together, by index: those whose sizes are equal, but for the axes that may be padded."""
        if len(arrays) == 1:
            return [[0]]
        on_gpu = any(not isinstance(array, np.ndarray) for request in arrays for array in request)
        if not self.batched or on_gpu:
            return [[index] for index in range(len(arrays))]
        found: list[list[int]] = self.ragged.batches(arrays, self.input_shapes, self.padded_axes)
        return found

    def answer(self, members: list[Arrays]) -> list[Any]:
        """Responses to requests that fit one batch. Where the batch fails each runs alone: one bad input must not
        fail the others."""
        try:
            shapes = (self.input_shapes, self.output_shapes, self.padded_axes)
            return [self.response(parts) for parts in self.ragged.together(self.run, members, *shapes)]
        except Exception as error:
            if len(members) > 1:
                return [self.answer([tensors])[0] for tensors in members]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))]

    def response(self, arrays: Arrays) -> Any:
        return pb_utils.InferenceResponse([self.tensor_of(n, a) for n, a in zip(self.outputs, arrays, strict=True)])

    def array_of(self, tensor: Any) -> Any:
        """A request's tensor where it is: NumPy's on the host, the runtime's own on the GPU. Neither is a copy."""
        return tensor.as_numpy() if tensor.is_cpu() else self.runtime.of_dlpack(tensor.to_dlpack())

    def tensor_of(self, name: str, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            # Triton copies from contiguous memory only; parts of a split along the first axis already are.
            return pb_utils.Tensor(name, np.ascontiguousarray(array))
        return pb_utils.Tensor.from_dlpack(name, self.runtime.to_dlpack(array))
