"""Small whole versions for tests of the repository, and publishing them in a loop as a program that can be killed.

python tiny_version.py REPO FOLDER MODEL…     publishes each MODEL in turn, again and again, a line for each
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from kpdeploy.artifact import Latency, Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.serving.triton import config, repository
from kpdeploy.signature import Axis, Signature, TensorSpec

MODEL_PY = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        pass

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x, scale = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("x", "scale"))
        assert scale.ndim == 1, scale.shape
        y, total = x * scale[:, None], (x.sum(axis=1) * scale).astype(np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("y__0", y), pb_utils.Tensor("total__1", total)])
"""

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", "width")),
        TensorSpec(name="scale", dtype="float32", shape=("batch",)),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=("batch", "width")),
        TensorSpec(name="total", dtype="float32", shape=("batch",)),
    ),
    axes=(Axis(name="batch", min=1, max=10), Axis(name="width", min=1, max=9)),
)


def serve_with_python_backend() -> None:
    """Let versions of the format "python" be published: the bundled server has no other backend."""
    config.LOADERS["python"] = config.Loader(backend="python")


def manifest(model: str = "tiny", *, format: str = "onnx", filename: str = "model.onnx", **changes: object) -> Manifest:
    values: dict[str, object] = {
        "model": model,
        "version": 0,
        "target": "triton",
        "format": format,
        "filename": filename,
        "signature": SIGNATURE,
        "max_batch_size": 8,
        "input_names": ("x", "scale"),
        "output_names": ("y__0", "total__1"),
        "settings": {},
        "files": {},
        "tolerances": {"float32": 1e-5},
        "decisions": (),
        "formats": (),
        "source": {},
        "environment": {},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def exchange(batch: int, width: int, seed: int = 0) -> Exchange:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, width)).astype(np.float32)
    scale = rng.standard_normal(batch).astype(np.float32)
    return Exchange(inputs={"x": x, "scale": scale}, outputs={"y": x * scale[:, None], "total": x.sum(axis=1) * scale})


def baseline() -> Baseline:
    """Two golden requests; the second is a larger batch than the manifest's server takes."""
    return Baseline(
        exchanges=(exchange(1, 3), exchange(10, 5, seed=1)),
        latencies=(Latency(point={"batch": 1, "width": 3}, p50_ms=4.0, p99_ms=5.0, calls=9),),
        environment={},
    )


def write_files(folder: Path, *, filename: str = "model.onnx", weights: bytes = b"weights" * 5000) -> Path:
    """The files of one version, as the export leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / filename).write_bytes(MODEL_PY.encode() if filename.endswith(".py") else weights)
    (folder / "weights.bin").write_bytes(weights)
    baseline().write(folder)
    return folder


def publish_forever(repo: str, folder: str, models: Sequence[str], published: Event) -> None:
    """Publish each model in turn, again and again, and say so once the first is done."""
    serve_with_python_backend()
    files = write_files(Path(folder), filename="model.py")
    for model in itertools.cycle(models):
        repository.publish(repo, manifest(model, format="python", filename="model.py"), files)
        published.set()
