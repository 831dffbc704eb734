"""The main job: MiniLM with its real weights, in each format, served by a real Triton, equal to eager PyTorch."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kpdeploy
from kpdeploy.compare import relative_error
from kpdeploy.errors import ModelNotServed
from kpdeploy.export import FORMATS
from kpdeploy.load.examples import minilm_folder
from kpdeploy.load.huggingface import sentence_encoder
from kpdeploy.serving.client import connect, connect_torchserve
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.target import TARGETS

FUSED = [("onnx", "always"), ("torchscript", "always"), ("pt2", "always")]
PLAIN = [f for f in TARGETS["triton"].formats if f != "pt2" and not FORMATS[f].by_level]
FORMS = [*((format, "never") for format in PLAIN), *FUSED]
"""Each format, and those that can with fused ops."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A repository with MiniLM in every form, and the gRPC address of the Triton that serves it."""
    repo = tmp_path_factory.mktemp("models")
    for format, fuse in FORMS:
        report = kpdeploy.export("minilm", repo=repo, format=format, fuse=fuse, name=f"minilm_{format}_{fuse}")
        assert report.chosen.passed
        assert report.chosen.fused == (fuse == "always")
    with kpdeploy.serve(repo, http_port=0, grpc_port=0, metrics_port=0) as server:
        yield repo, f"localhost:{server.ports.grpc}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("format", "fuse"), FORMS)
def test_triton_gives_the_embeddings_of_eager_pytorch(format: str, fuse: str, served: tuple[Path, str]) -> None:
    repo, url = served
    manifest = next(d.manifest for d in read_repository(str(repo)) if d.model == f"minilm_{format}_{fuse}")
    encoder = sentence_encoder(minilm_folder())
    rng = np.random.default_rng()
    with connect(url) as client:
        for batch, seq in ((1, 1), (1, 77), (5, 31), (32, 16)):
            ids = rng.integers(0, 30522, (batch, seq))
            mask = (np.arange(seq) < rng.integers(1, seq + 1, (batch, 1))).astype(np.int64)
            answer = client.infer(manifest, {"input_ids": ids, "attention_mask": mask})["embedding"]
            with torch.inference_mode():
                expected = encoder(torch.from_numpy(ids), torch.from_numpy(mask))["embedding"].numpy()
            assert relative_error(answer, expected) <= 1e-5, (batch, seq)


@pytest.fixture(scope="module")
def torchserve(served: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A model store of the same artifacts, and the TorchServe that serves it."""
    folder = tmp_path_factory.mktemp("torchserve")
    deployments = {d.model: d for d in read_repository(str(served[0]))}
    for format, fuse in FUSED:
        deployment = deployments[f"minilm_{format}_{fuse}"]
        manifest = deployment.manifest
        files = folder / manifest.model
        shutil.copytree(deployment.folder, files, ignore=shutil.ignore_patterns("manifest.json", "launch.sh"))
        package = TARGETS["torchserve"].package
        inputs, outputs = package.served_names(format, manifest.signature)
        package.publish(
            str(folder / "store"),
            replace(
                manifest,
                target="torchserve",
                input_names=inputs,
                output_names=outputs,
                # Triton gives a .pt2 no batches; TorchServe gives it what its proof allows.
                max_batch_size=32,
                padded_axes=("seq",),
            ),
            files,
        )
    free = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "management_port": 0}
    with kpdeploy.serve(folder / "store", **free) as server:
        yield folder / "store", server


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("format", "fuse"), FUSED)
def test_torchserve_gives_the_embeddings_of_eager_pytorch_alone_and_batched(
    format: str, fuse: str, torchserve: tuple[Path, Any]
) -> None:
    store, server = torchserve
    manifest = next(d.manifest for d in read_repository(str(store)) if d.model == f"minilm_{format}_{fuse}")
    encoder = sentence_encoder(minilm_folder())
    rng = np.random.default_rng()

    def difference(batch: int, seq: int) -> float:
        ids = rng.integers(0, 30522, (batch, seq))
        mask = (np.arange(seq) < rng.integers(1, seq + 1, (batch, 1))).astype(np.int64)
        with connect_torchserve(server.http, token=server.token) as client:
            answer = client.infer(manifest, {"input_ids": ids, "attention_mask": mask})["embedding"]
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(ids), torch.from_numpy(mask))["embedding"].numpy()
        return relative_error(answer, expected)

    def one_of_many(number: int) -> float:
        """Every sixth request is wrong, and is refused alone."""
        if number % 6:
            return difference(1, 9 + number)
        wrong = {"input_ids": np.full((1, 9), 10**6), "attention_mask": np.ones((1, 9), np.int64)}
        with connect_torchserve(server.http, token=server.token) as client, pytest.raises(ModelNotServed) as caught:
            client.infer(manifest, wrong)
        assert "HTTP 400" in caught.value.why
        return 0.0

    for batch, seq in ((1, 1), (1, 77), (5, 31), (32, 16)):
        assert difference(batch, seq) <= 1e-5, (batch, seq)
    # A server tells of an answer after it has left.
    before = None
    while before != (before := batches(server, manifest.model)):
        time.sleep(1)
    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(one_of_many, range(48))) <= 1e-5
    end = time.monotonic() + 30
    while (found := batches(server, manifest.model))[1] < before[1] + 40 and time.monotonic() < end:
        time.sleep(0.2)
    calls, rows = found[0] - before[0], found[1] - before[1]
    assert rows == 40
    assert calls < rows


def batches(server: Any, model: str) -> tuple[float, float]:
    """How many batches a model had, and their rows."""
    request = urllib.request.Request(server.metrics, headers={"Authorization": f"Bearer {server.token}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        lines = [line for line in reply.read().decode().splitlines() if f'ModelName="{model}"' in line]
    calls, rows = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"kpdeploy_batch_rows_{kind}"))
        for kind in ("count", "sum")
    )
    return calls, rows


def test_the_manifest_names_source_weights_versions_and_every_candidate(served: tuple[Path, str]) -> None:
    repo, _ = served
    kept = json.loads((repo / "minilm_onnx_never" / "1" / "manifest.json").read_text())
    assert kept["source"]["example"] == "minilm"
    assert len(kept["source"]["weights"]["model.safetensors"]) == 64
    assert kept["environment"]["packages"]["torch"] == torch.__version__
    assert {c["settings"]["graph_level"] for c in kept["formats"]} == {"all", "basic"}
