"""`kpdeploy migrate`: archives of the stock torch-model-archiver, answered alike by TorchServe and by Triton."""

from __future__ import annotations

import itertools
import json
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from kpdeploy.errors import AnswersDiffer, FormatUnavailable, ModelNotServed, ModelUnsafe
from kpdeploy.inputs import of_bytes
from kpdeploy.pipeline.handlers import png
from kpdeploy.progress import Progress
from kpdeploy.serving.client import connect, connect_torchserve, verify
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.torchserve.environment import ServerEnvironment, ensure_environment
from kpdeploy.serving.torchserve.server import Server as TorchServe

STOCK = ("image_classifier", "text_classifier")
INPUT = ("data:float32[batch=1..8,12]",)
LABELS = {str(index): name for index, name in enumerate(("cat", "dog", "bird", "fish", "cow", "hen", "pig"))}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "is", "not", "i", "would", "it", "as", "dog", "bird", "fish"]
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


DOUBLING_HANDLER = f"""{HANDLER}
    def postprocess(self, data):
        return (2 * data).tolist()
"""


class Images(nn.Module):
    """Seven classes of an image, their chances far enough apart to have an order."""

    def __init__(self) -> None:
        super().__init__()
        self.edges, self.head = nn.Conv2d(3, 8, 7, stride=7), nn.Linear(8, 7)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return 40 * self.head(torch.relu(self.edges(data)).mean(dim=(2, 3)))


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
    """Archives by the stock archiver, and a repository with all that can be migrated."""
    folder = tmp_path_factory.mktemp("archives")
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    net, images, words = scope["Net"]().eval(), Images().eval(), Words().eval()
    texts = {"model.py": MODEL, "mine.py": HANDLER, "mine_onnx.py": ONNX_HANDLER, "model-config.yaml": CONFIG}
    texts |= {"index_to_name.json": json.dumps(LABELS), "doubling.py": DOUBLING_HANDLER}
    for name, text in texts.items():
        (folder / name).write_text(text)
    torch.save(net.state_dict(), folder / "net.pth")
    pairs = [f"{one} {other}" for one, other in itertools.pairwise(WORDS)]
    torch.save(Counter({token: index for index, token in enumerate(WORDS + pairs, 1)}), folder / "source_vocab.pt")
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
    archived(folder, "words", "words.pt", "text_classifier", "--extra-files", "source_vocab.pt")
    archived(folder, "doubling", "net.pt", "doubling.py")
    archived(folder, "boxes", "images.pt", "object_detector")
    repo = folder / "models"
    options: dict[str, Any] = {"repo": repo, "format": "torchscript", "fuse": "never"}
    kpdeploy.migrate(folder / "script.mar", input=INPUT, **options)
    kpdeploy.migrate(folder / "graph.mar", **{**options, "format": "onnx"})
    kpdeploy.migrate(folder / "eager.mar", input=INPUT, trust=True, **{**options, "format": "onnx"})
    kpdeploy.migrate(folder / "images.mar", **options)
    kpdeploy.migrate(folder / "words.mar", **options)
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

    loadable_torchvision(ensure_environment(Progress(), handlers=STOCK))
    archives = [made.archive(name) for name in ("script", "graph", "eager", "images", "words")]
    with running_archives(archives, handlers=STOCK, ready_timeout_s=300) as server:
        yield server


def loadable_torchvision(environment: ServerEnvironment) -> None:
    """PyPI's torchvision is built for CUDA. Beside a torch for the CPU its operators do not load, and what describes
    them fails; the stock handler uses none."""
    done = subprocess.run([environment.python, "-c", "import torchvision"], check=False, capture_output=True)
    if done.returncode:
        (described,) = environment.prefix.glob("lib/python3*/site-packages/torchvision/_meta_registrations.py")
        described.write_text("")


def in_torchserve(server: TorchServe, model: str, body: bytes, kind: str = "application/json") -> Any:
    with connect_torchserve(server.http, token=server.token) as client:
        status, content = client.predict(model, body, kind)
    assert status == 200, content
    return json.loads(content)


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
            theirs = np.array(in_torchserve(torchserve, model, json.dumps(row.tolist()).encode()), np.float32)
            assert relative_error(np.asarray(answer[0]), theirs) <= 1e-5


def from_handler(triton: Any, model: str, body: bytes) -> dict[str, float]:
    """The answer of a handler's model: probabilities by label."""
    manifest = triton.served[model].deployment.manifest
    with connect(f"grpc://{triton.grpc}") as client:
        answer = client.infer(manifest, {manifest.input_names[0]: of_bytes([body], (1,))})
    labels = [label.decode() for label in answer["labels"][0]]
    return dict(zip(labels, np.asarray(answer["probabilities"][0]).tolist(), strict=True))


def alike(ours: dict[str, float], theirs: dict[str, float]) -> None:
    # Their order is that of the chances, in both.
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_same_images_get_the_answers_of_the_stock_image_classifier(
    format: str, triton: Any, torchserve: TorchServe
) -> None:
    for size in ((320, 240), (225, 301), (256, 256), (120, 95), (640, 257)):
        body = png(*size, format=format)
        theirs = in_torchserve(torchserve, "images", body, "application/octet-stream")
        assert len(theirs) == 5
        alike(from_handler(triton, "images_image", body), theirs)


def test_images_at_once_are_batched_and_one_that_is_none_fails_alone(triton: Any) -> None:
    bodies = [png(230 + index, 260) if index % 5 else b"no image" for index in range(1, 25)]
    alone = [from_handler(triton, "images_image", body) if body != b"no image" else None for body in bodies]

    def ask(body: bytes) -> Any:
        try:
            return from_handler(triton, "images_image", body)
        except ModelNotServed as error:
            return error.why

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, bodies))
    for ours, expected in zip(found, alone, strict=True):
        if expected is None:
            assert "this is no image" in ours
        else:
            alike(ours, expected)


@pytest.mark.parametrize(
    "text", ["the cat", "The Cat SAT on <b>a</b> mat; isn't it?", "I'd say: naïve dogs &amp; birds!", "unheard-of"]
)
def test_the_same_texts_get_the_answers_of_the_stock_text_classifier(
    text: str, triton: Any, torchserve: TorchServe
) -> None:
    theirs = in_torchserve(torchserve, "words", text.encode(), "application/octet-stream")
    alike(from_handler(triton, "words_text", text.encode()), theirs)


def test_raw_bodies_are_taken_as_torchserve_took_them(triton: Any) -> None:
    """What `curl --data-binary @kitten.jpg` sends."""
    address = f"http://{triton.http}/v2/models/images_image/infer"
    request = urllib.request.Request(address, png(300, 250), {"Inference-Header-Content-Length": "0"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        length = int(reply.headers["Inference-Header-Content-Length"])
        said = json.loads(reply.read()[:length])
    assert [entry["name"] for entry in said["outputs"]] == ["labels", "probabilities"]


def test_golden_requests_of_handlers_are_verified_like_others(made: Made, triton: Any) -> None:
    report = verify(str(made.repo), url=triton.grpc)
    assert {model.model for model in report.models} >= {"images", "images_image", "words", "words_text"}
    assert report.passed


def test_labels_and_the_top_classes_of_image_classifier_come_from_triton_itself(made: Made, triton: Any) -> None:
    image = np.random.default_rng().standard_normal((1, 3, 224, 224)).astype(np.float32)
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
    tokens = np.random.default_rng().integers(0, len(WORDS), 7)
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
    assert (made.repo / "script" / "1" / "labels.txt").read_text() == "cat\ndog\nbird\nfish\ncow\nhen\npig\n"


def test_what_cannot_be_migrated_says_why_and_publishes_nothing(made: Made, tmp_path: Path) -> None:
    with pytest.raises(FormatUnavailable) as caught:
        kpdeploy.migrate(made.archive("boxes"), repo=tmp_path / "models")
    assert "boxes" in caught.value.why
    with pytest.raises(ModelUnsafe, match=r"model\.py"):
        kpdeploy.migrate(made.archive("eager"), repo=tmp_path / "models", input=INPUT)
    assert not (tmp_path / "models").exists()


def test_replay_publishes_what_both_servers_answer_alike(made: Made, torchserve: TorchServe, tmp_path: Path) -> None:
    image = tmp_path / "kitten.jpg"
    image.write_bytes(png(400, 300, format="JPEG"))
    options: dict[str, Any] = {"repo": tmp_path / "models", "format": "torchscript", "fuse": "never", "replay": True}
    with pytest.raises(ModelUnsafe, match="TorchServe, which runs all of its code"):
        kpdeploy.migrate(made.archive("images"), **options)
    assert not (tmp_path / "models").exists()
    report = kpdeploy.migrate(made.archive("images"), trust=True, requests=[image], **options)
    assert report.replayed is not None
    assert [exchanged.request for exchanged in report.replayed.exchanges] == ["kitten.jpg"]
    assert report.replayed.worst <= 1e-5
    assert {d.model for d in read_repository(str(tmp_path / "models"))} == {"images", "images_image"}


def test_replay_tells_the_difference_and_publishes_nothing(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"repo": tmp_path / "models", "format": "torchscript", "fuse": "never", "input": INPUT}
    with pytest.raises(AnswersDiffer, match=r"doubling\.mar") as caught:
        kpdeploy.migrate(made.archive("doubling"), replay=True, trust=True, **options)
    assert "TorchServe [" in caught.value.why
    assert "Triton [" in caught.value.why
    assert not (tmp_path / "models").exists()
