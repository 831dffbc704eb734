"""`kpdeploy migrate`: archives of the stock torch-model-archiver, answered alike by TorchServe and by Triton."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http
from torch import nn

import kpdeploy
from kpdeploy.compare import relative_error
from kpdeploy.errors import FormatUnavailable, ModelUnsafe
from kpdeploy.progress import Progress
from kpdeploy.serving.client import connect
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.torchserve.environment import ensure_environment
from kpdeploy.serving.torchserve.server import Server as TorchServe

INPUT = ("data:float32[batch=1..8,12]",)
LABELS = {"0": "cat", "1": "dog", "2": "bird", "3": "fish"}
CONFIG = "batchSize: 8\nmaxBatchDelay: 3\nminWorkers: 1\nmaxWorkers: 1\nresponseTimeout: 60\nstartupTimeout: 120\n"

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 16), torch.nn.Linear(16, 4)

    def forward(self, data):
        return self.second(torch.tanh(self.first(data)))
"""

# What users of BaseHandler write: it cannot read a request by itself.
HANDLER = """
import torch
from ts.torch_handler.base_handler import BaseHandler

class Mine(BaseHandler):
    def preprocess(self, data):
        return torch.tensor([row.get("body") or row.get("data") for row in data], dtype=torch.float32)
"""
ONNX_HANDLER = """
import numpy as np
from ts.torch_handler.base_handler import BaseHandler

class Mine(BaseHandler):
    def preprocess(self, data):
        return np.array([row.get("body") or row.get("data") for row in data], np.float32)

    def inference(self, data):
        return self.model.run(None, {"data": data})[0]
"""


class Images(nn.Module):
    """Four classes of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.head(data.mean(dim=(2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.EmbeddingBag(50, 8), nn.Linear(8, 4)

    def forward(self, text: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(text, offsets))


@dataclass(frozen=True)
class Made:
    """The archives, the models that they were made of, and the repository that they were migrated to."""

    folder: Path
    net: nn.Module
    images: nn.Module
    words: nn.Module
    repo: Path

    def archive(self, name: str) -> Path:
        return self.folder / f"{name}.mar"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Six archives by the stock archiver, and a repository with all that can be migrated."""
    folder = tmp_path_factory.mktemp("archives")
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    net, images, words = scope["Net"]().eval(), Images().eval(), Words().eval()
    texts = {"model.py": MODEL, "mine.py": HANDLER, "mine_onnx.py": ONNX_HANDLER, "model-config.yaml": CONFIG}
    for name, text in {**texts, "index_to_name.json": json.dumps(LABELS)}.items():
        (folder / name).write_text(text)
    torch.save(net.state_dict(), folder / "net.pth")
    torch.jit.trace(net, torch.zeros(1, 12)).save(str(folder / "net.pt"))
    torch.jit.script(images).save(str(folder / "images.pt"))
    torch.jit.script(words).save(str(folder / "words.pt"))
    batch = {"data": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.onnx.export(net, (torch.zeros(2, 12),), folder / "net.onnx", dynamo=True, dynamic_shapes=batch, verbose=False,
                      input_names=["data"], output_names=["scores"], external_data=False)  # fmt: skip
    labels = ("--extra-files", "index_to_name.json")
    archived(folder, "script", "net.pt", "mine.py", *labels)
    archived(folder, "graph", "net.onnx", "mine_onnx.py")
    archived(folder, "eager", "net.pth", "mine.py", "--model-file", "model.py")
    archived(folder, "images", "images.pt", "image_classifier", *labels)
    archived(folder, "words", "words.pt", "text_classifier")
    archived(folder, "boxes", "images.pt", "object_detector")
    repo = folder / "models"
    options: dict[str, Any] = {"repo": repo, "format": "torchscript", "fuse": "never"}
    kpdeploy.migrate(folder / "script.mar", input=INPUT, **options)
    kpdeploy.migrate(folder / "graph.mar", **{**options, "format": "onnx"})
    kpdeploy.migrate(folder / "eager.mar", input=INPUT, trust=True, **{**options, "format": "onnx"})
    kpdeploy.migrate(folder / "images.mar", input=("data:float32[batch=1..8,3,24,24]",), **options)
    kpdeploy.migrate(folder / "words.mar", input=("data:int64[tokens=1..20]{0..49}",), **options)
    return Made(folder, net, images, words, repo)


def archived(folder: Path, name: str, serialized: str, handler: str, *more: str) -> None:
    command = [*ensure_environment(Progress()).archiver, "--model-name", name, "--version", "1.0"]
    command += ["--serialized-file", serialized, "--handler", handler, "--config-file", "model-config.yaml", *more]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def triton(made: Made) -> Iterator[Any]:
    with kpdeploy.serve(made.repo, http_port=0, grpc_port=0, metrics_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def torchserve(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """The real TorchServe with the archives as they are."""
    from kpdeploy.serving.torchserve.server import running_archives

    with running_archives([made.archive(name) for name in ("script", "graph", "eager")]) as server:
        yield server


def in_torchserve(server: TorchServe, model: str, row: Any) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.token}"}
    body = json.dumps(row.tolist()).encode()
    request = urllib.request.Request(f"http://{server.http}/predictions/{model}", body, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return np.array(json.loads(reply.read()), np.float32)


@pytest.mark.parametrize("model", ["script", "graph", "eager"])
def test_the_same_requests_get_the_same_answers_from_both_servers(
    model: str, made: Made, triton: Any, torchserve: TorchServe
) -> None:
    manifest = next(d.manifest for d in read_repository(str(made.repo)) if d.model == model)
    rng = np.random.default_rng()
    with connect(triton.grpc) as client:
        for _ in range(8):
            row = rng.standard_normal(12).astype(np.float32)
            (answer,) = client.infer(manifest, {manifest.signature.inputs[0].name: row[None]}).values()
            assert relative_error(np.asarray(answer[0]), in_torchserve(torchserve, model, row)) <= 1e-5


def test_labels_and_the_top_classes_of_image_classifier_come_from_triton_itself(made: Made, triton: Any) -> None:
    image = np.random.default_rng().standard_normal((1, 3, 24, 24)).astype(np.float32)
    manifest = next(d.manifest for d in read_repository(str(made.repo)) if d.model == "images")
    sent = tritonclient.http.InferInput(manifest.input_names[0], list(image.shape), "FP32")
    sent.set_data_from_numpy(image)
    wanted = tritonclient.http.InferRequestedOutput(manifest.output_names[0], class_count=3)
    client = tritonclient.http.InferenceServerClient(triton.http)
    rows = client.infer("images", [sent], outputs=[wanted]).as_numpy(manifest.output_names[0])[0]
    client.close()
    # What the stock handler computes: softmax, top k, labels.
    with torch.inference_mode():
        chances, classes = torch.topk(torch.softmax(made.images(torch.from_numpy(image)), dim=1), 3)
    found = [row.decode().split(":") for row in rows]
    assert [label for _, _, label in found] == [LABELS[str(int(c))] for c in classes[0]]
    np.testing.assert_allclose([float(chance) for chance, _, _ in found], chances[0], rtol=1e-4)


def test_text_classifier_is_its_softmax_of_token_ids(made: Made, triton: Any) -> None:
    tokens = np.random.default_rng().integers(0, 50, 7)
    manifest = next(d.manifest for d in read_repository(str(made.repo)) if d.model == "words")
    with connect(triton.grpc) as client:
        (answer,) = client.infer(manifest, {manifest.signature.inputs[0].name: tokens}).values()
    with torch.inference_mode():
        expected = torch.softmax(made.words(torch.from_numpy(tokens), torch.zeros(1, dtype=torch.int64)), dim=1)
    assert relative_error(np.asarray(answer), expected.numpy()) <= 1e-5


def test_batch_size_and_delay_are_those_of_the_archive(made: Made) -> None:
    config = (made.repo / "script" / "config.pbtxt").read_text()
    assert "max_batch_size: 8" in config
    assert "max_queue_delay_microseconds: 3000" in config
    assert (made.repo / "script" / "1" / "labels.txt").read_text() == "cat\ndog\nbird\nfish\n"


def test_what_cannot_be_migrated_says_why_and_publishes_nothing(made: Made, tmp_path: Path) -> None:
    with pytest.raises(FormatUnavailable) as caught:
        kpdeploy.migrate(made.archive("boxes"), repo=tmp_path / "models")
    assert "boxes" in caught.value.why
    with pytest.raises(ModelUnsafe, match=r"model\.py"):
        kpdeploy.migrate(made.archive("eager"), repo=tmp_path / "models", input=INPUT)
    assert not (tmp_path / "models").exists()
