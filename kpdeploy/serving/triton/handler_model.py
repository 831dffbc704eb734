"""The model.py of a handler: Triton's python backend doing for another model what its TorchServe handler did.

Copied into a version's folder, where it stands alone: NumPy, Triton's utilities, and beside it `handler.py` (a copy of
image_classifier.py or text_classifier.py) and `handler.json`. Each request holds files or texts as BYTES; what the
handler makes of them goes to the model in batches, inside the server.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only inside the server

Array = np.ndarray[Any, Any]


def load_beside(name: str) -> Any:
    """A module of this folder, whatever else goes by that name."""
    spec = importlib.util.spec_from_file_location(f"kpdeploy_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TritonPythonModel:
    """What the python backend loads, by this name."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = json.loads(Path(__file__).with_name("handler.json").read_text())
        self.handler = load_beside("handler").Handler(settings)
        self.name: str = settings["input"]
        self.model: str = settings["model"]
        self.model_input: str = settings["model_input"]
        self.model_output: str = settings["model_output"]
        self.rows: int = settings["rows"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; what is wrong with one fails that alone."""
        found: list[Any] = [None] * len(requests)
        prepared: list[tuple[int, Array]] = []
        for index, request in enumerate(requests):
            bodies = pb_utils.get_input_tensor_by_name(request, self.name).as_numpy().reshape(-1)
            try:
                prepared += [(index, self.handler.prepare(body)) for body in bodies]
            except Exception as error:
                prepared = [entry for entry in prepared if entry[0] != index]
                found[index] = failed(str(error))
        answers: dict[int, list[tuple[list[str], Array]]] = {}
        for start in range(0, len(prepared), self.rows):
            part = prepared[start : start + self.rows]
            try:
                scores = self.ask(np.concatenate([array for _, array in part]))
            except RuntimeError as error:
                for index, _ in part:
                    found[index] = failed(str(error))
                continue
            for (index, _), row in zip(part, scores, strict=True):
                answers.setdefault(index, []).append(self.handler.answer(row))
        for index, parts in answers.items():
            if found[index] is None:
                found[index] = self.response(parts)
        return found

    def ask(self, data: Array) -> Array:
        """The model's answer to a batch: [rows, classes]."""
        request = pb_utils.InferenceRequest(
            model_name=self.model,
            requested_output_names=[self.model_output],
            inputs=[pb_utils.Tensor(self.model_input, data)],
            # Wherever the model runs, its answer is wanted here.
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        scores: Array = pb_utils.get_output_tensor_by_name(response, self.model_output).as_numpy()
        return scores

    def response(self, parts: Sequence[tuple[list[str], Array]]) -> Any:
        labels = np.array([[name.encode() for name in names] for names, _ in parts], np.object_)
        probabilities = np.stack([chances for _, chances in parts]).astype(np.float32)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("labels", labels), pb_utils.Tensor("probabilities", probabilities)]
        )


def failed(why: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(why))
