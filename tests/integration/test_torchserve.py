"""`--target torchserve` with the real TorchServe: ready, batching, one 400, killed workers, versions, no Java left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from kpdeploy.artifact import Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.bench import bench
from kpdeploy.compare import TOLERANCES
from kpdeploy.errors import ModelLoadFailed, ModelNotServed
from kpdeploy.hardware import environment
from kpdeploy.progress import Progress
from kpdeploy.serving.client import connect_torchserve, verify
from kpdeploy.serving.torchserve.config import Addresses
from kpdeploy.serving.torchserve.environment import ensure_environment
from kpdeploy.serving.torchserve.repository import publish, rollback
from kpdeploy.serving.torchserve.server import Server, claim, serve
from kpdeploy.signature import Axis, Signature, TensorSpec

ANY = Addresses(inference=0, management=0, metrics=0, grpc_inference=0, grpc_management=0)
WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    axes=(Axis(name="batch", min=1, max=16),),
)


def tiny_onnx(scale: float) -> bytes:
    """y = x @ W * scale."""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["xW"]), helper.make_node("Mul", ["xW", "scale"], ["y"])]
    tensors = [numpy_helper.from_array(WEIGHT, "W"), numpy_helper.from_array(np.float32([scale]), "scale")]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", d]) for n, d in (("x", 4), ("y", 3))]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    content: bytes = model.SerializeToString()
    return content


def publish_tiny(repo: Path, files: Path, *, scale: float = 1.0, artifact: bytes = b"") -> Manifest:
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    (files / "model.onnx").write_bytes(artifact or tiny_onnx(scale))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    exchange = Exchange(inputs={"x": x}, outputs={"y": x @ WEIGHT * np.float32(scale)})
    Baseline(exchanges=(exchange,), latencies=(), environment={}).write(files)
    manifest = Manifest(
        model="tiny", version=0, target="torchserve", format="onnx", filename="model.onnx", signature=SIGNATURE,
        max_batch_size=16, input_names=("x",), output_names=("y",), settings={"threads": 1}, files={},
        tolerances=TOLERANCES, decisions=(), formats=(), source={}, environment=environment(),
        created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    return publish(str(repo), manifest, files).manifest


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchserve")
    publish_tiny(folder / "model_store", folder / "files")
    return folder / "model_store"


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def server(repo: Path, told: Told) -> Iterator[Server]:
    with serve(repo, addresses=ANY, poll=True, progress=told) as running:
        folder = running.log.parent
        assert processes_of(folder)
        yield running
    assert not processes_of(folder)
    assert not folder.exists()


def processes_of(folder: Path) -> list[str]:
    """Java and the workers of the server whose files are in `folder`: their command lines name it."""
    lines = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(folder) in line]


def post(server: Server, path: str, body: Any, *, token: str | None = None) -> tuple[int, Any]:
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {server.token if token is None else token}",
    }
    request = urllib.request.Request(f"http://{server.http}/{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def metric(server: Server, name: str) -> float:
    request = urllib.request.Request(server.metrics, headers={"Authorization": f"Bearer {server.token}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def test_the_notice_that_it_is_unmaintained_is_given_once(server: Server, told: Told) -> None:
    assert sum("no longer maintained" in line for line in told.lines) == 1
    assert not any("no token" in line for line in told.lines)


def test_the_golden_requests_pass_and_a_wrong_token_or_none_does_not(server: Server, repo: Path) -> None:
    assert verify(str(repo), url=server.http, token=server.token).passed
    for token in ("", "wrong"):
        with pytest.raises(ModelNotServed, match="does not serve") as caught:
            verify(str(repo), url=server.http, token=token)
        assert "--token-file" in caught.value.next_step
    assert server.key_file is not None
    assert server.key_file.stat().st_mode & 0o077 == 0
    assert server.token not in server.log.read_text()


def test_each_form_of_request_gets_the_same_answer(server: Server) -> None:
    x = [[1.0, 2, 3, 4]]
    wanted = (np.array(x, np.float32) @ WEIGHT).tolist()
    v2 = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": x[0]}]}
    for path, body, read in (
        ("predictions/tiny", {"x": x}, lambda said: said["y"]),
        ("predictions/tiny", x, lambda said: said["y"]),
        ("v1/models/tiny:predict", {"instances": x}, lambda said: said["predictions"]),
        ("v2/models/tiny/infer", v2, lambda said: [said["outputs"][0]["data"]]),
    ):
        status, said = post(server, path, body)
        assert status == 200, said
        np.testing.assert_allclose(read(said), wanted, rtol=1e-5, atol=1e-4)


def test_requests_at_once_share_batches_and_a_bad_one_gets_400_alone(server: Server) -> None:
    calls, rows = (f"kpdeploy_batch_rows_{kind}" for kind in ("count", "sum"))
    before = metric(server, calls), metric(server, rows)
    bodies = [{"x": [[float(i)] * 4]} if i % 8 else {"x": [[1.0]]} for i in range(1, 65)]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda body: post(server, "predictions/tiny", body), bodies))
    for body, (status, said) in zip(bodies, found, strict=True):
        if len(body["x"][0]) == 4:
            assert status == 200
            np.testing.assert_allclose(said["y"], np.array(body["x"], np.float32) @ WEIGHT, rtol=1e-5, atol=1e-4)
        else:
            assert status == 400
            assert "the model takes" in said["error"]
    wait_for(lambda: metric(server, rows) - before[1] == 56)
    assert metric(server, calls) - before[0] < 56
    assert metric(server, "kpdeploy_handler_seconds_count") >= 64


def test_bench_loads_it(server: Server, repo: Path) -> None:
    report = bench(
        server.http, model="tiny", repo=repo, clients=(2,), seconds=0.5, warmup_seconds=0, token=server.token
    )
    assert report.rows[0].succeeded
    assert not report.rows[0].failed


def test_a_killed_worker_comes_back_and_failures_are_listed(server: Server, repo: Path) -> None:
    (pid,) = server.management.worker_pids("tiny")
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    report = bench(server.http, model="tiny", repo=repo, clients=(4,), seconds=8, warmup_seconds=0, token=server.token)
    killer.join()
    row = report.rows[0]
    assert row.succeeded
    assert all("507" in reason or "no answer" in reason for reason in row.errors), row.errors
    wait_for(lambda: server.management.ready("tiny", 1))
    assert server.management.worker_pids("tiny") != [pid]
    assert verify(str(repo), url=server.http, token=server.token).passed


def test_new_versions_are_served_as_they_are_published_and_rolled_back(
    server: Server, repo: Path, told: Told, tmp_path: Path
) -> None:
    def served(version: int) -> Callable[[], bool]:
        return lambda: [entry["modelVersion"] for entry in server.management.versions("tiny")] == [str(version)]

    publish_tiny(repo, tmp_path / "files", scale=2.0)
    wait_for(lambda: served(2)() or any("v2 is not served" in line for line in told.lines), 150)
    assert served(2)(), told.lines
    assert verify(str(repo), url=server.http, token=server.token).passed
    publish_tiny(repo, tmp_path / "files", artifact=b"broken")
    wait_for(lambda: any("v3 is not served" in line for line in told.lines), 90)
    assert server.management.default_version("tiny") == "2"
    assert post(server, "predictions/tiny", [[1.0] * 4])[0] == 200
    rollback(str(repo), "tiny", 1)
    wait_for(served(1))
    assert verify(str(repo), url=server.http, token=server.token).passed
    with pytest.raises(ModelNotServed), connect_torchserve(server.http, token=server.token) as client:
        client.infer(replace(server.served["tiny"].deployment.manifest, version=2), {"x": np.ones((1, 4), np.float32)})


def test_a_model_that_cannot_load_is_told_fast_with_the_runtimes_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(tmp_path / "store", tmp_path / "files", artifact=b"broken")
    started, told = time.monotonic(), Told()
    # A short one: sockets of the server's workers are in it.
    place = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", place)
    options = {"addresses": ANY, "token": False, "progress": told}
    with pytest.raises(ModelLoadFailed, match="tiny") as caught, serve(tmp_path / "store", **options):
        raise AssertionError("it serves a broken file")
    assert any("no token is asked for" in line for line in told.lines)
    assert "protobuf" in caught.value.why.lower()
    assert time.monotonic() - started < 60
    assert not processes_of(Path(place))
    shutil.rmtree(place)


def test_stock_torchserve_serves_the_archive_with_nothing_of_kpdeploy(repo: Path, tmp_path: Path) -> None:
    """run.sh of the repository, as its reader would start it: the server's Python cannot import kpdeploy."""
    place = ensure_environment(Progress())
    there = subprocess.run([str(place.python), "-c", "import kpdeploy"], capture_output=True, cwd=tmp_path, check=False)
    assert there.returncode, "kpdeploy is installed for the server, and this test shows nothing"
    script = tmp_path / "bin" / "torchserve"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {place.python} -m ts.model_server "$@"\n')
    script.chmod(0o755)
    copy = tmp_path / "store"
    shutil.copytree(repo, copy)
    ports = claim(ANY)
    for name, port in {"8080": ports.inference, "8081": ports.management, "8082": ports.metrics,
                       "7070": ports.grpc_inference, "7071": ports.grpc_management}.items():  # fmt: skip
        text = (copy / "config.properties").read_text().replace(name, str(port))
        (copy / "config.properties").write_text(text)
    (tmp_path / "tmp").mkdir()
    variables = {**place.variables(tmp_path / "tmp"), "PATH": f"{script.parent}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", str(copy / "run.sh")], cwd=tmp_path, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: "State change WORKER_STARTED -> WORKER_MODEL_LOADED" in (tmp_path / "log").read_text())
        token = json.loads((tmp_path / "key_file.json").read_text())["inference"]["key"]
        assert verify(str(copy), url=f"127.0.0.1:{ports.inference}", token=token).passed
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
