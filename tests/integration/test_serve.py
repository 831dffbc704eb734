"""`kpdeploy serve` with the real tritonserver: ready, batching, surviving bad requests and killed processes, gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from kpdeploy.artifact import Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import TOLERANCES
from kpdeploy.errors import DigestMismatch, ModelLoadFailed, ModelNotServed, NotReady, PortInUse
from kpdeploy.hardware import environment
from kpdeploy.progress import Progress
from kpdeploy.serving.client import connect, verify
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.triton import server as server_module
from kpdeploy.serving.triton.repository import publish
from kpdeploy.serving.triton.server import Server, serve
from kpdeploy.signature import Axis, Signature, TensorSpec

WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", "rows", 4)),
        TensorSpec(name="pick", dtype="int64", shape=("batch",)),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=("batch", "rows", 3)),
        TensorSpec(name="row", dtype="float32", shape=("batch", 4)),
    ),
    axes=(Axis(name="batch", min=1, max=16), Axis(name="rows", min=1, max=64)),
)


def reference(x: Any, pick: Any) -> dict[str, Any]:
    return {"y": x @ WEIGHT + 1, "row": TABLE[pick]}


TABLE = np.arange(20, dtype=np.float32).reshape(5, 4)


def tiny_onnx() -> Any:
    """y = x @ W + 1 and row = table[pick], which fails where pick is 5 or more."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["xW"]),
        helper.make_node("Add", ["xW", "one"], ["y"]),
        helper.make_node("Gather", ["table", "pick"], ["row"]),
    ]
    constants = {"W": WEIGHT, "one": np.float32(1).reshape(1), "table": TABLE}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", 4]),
            helper.make_tensor_value_info("pick", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "rows", 3]),
            helper.make_tensor_value_info("row", TensorProto.FLOAT, ["batch", 4]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def inputs(batch: int, rows: int, *, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, rows, 4)).astype(np.float32),
        "pick": rng.integers(0, 5, size=batch),
    }


def publish_tiny(
    repo: Path, files: Path, *, name: str = "tiny", artifact: bytes | None = None, wrong: float = 0
) -> None:
    """Publish the tiny model; `artifact` replaces its file, `wrong` is added to its golden answers."""
    files.mkdir(parents=True)
    (files / "model.onnx").write_bytes(tiny_onnx().SerializeToString() if artifact is None else artifact)
    requests = [inputs(1, 2), inputs(3, 5, seed=1)]
    exchanges = tuple(
        Exchange(inputs=r, outputs={n: a + np.float32(wrong) for n, a in reference(**r).items()}) for r in requests
    )
    Baseline(exchanges=exchanges, latencies=(), environment={}).write(files)
    manifest = Manifest(
        model="tiny",
        version=0,
        target="triton",
        format="onnx",
        filename="model.onnx",
        signature=SIGNATURE,
        max_batch_size=16,
        input_names=("x", "pick"),
        output_names=("y", "row"),
        settings={"threads": 1},
        files={},
        tolerances=TOLERANCES,
        decisions=(),
        formats=(),
        source={},
        environment=environment(),
        created="2026-01-01T00:00:00Z",
    )
    publish(str(repo), manifest, files)


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    publish_tiny(folder / "models", folder / "files")
    return folder / "models"


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def server(repo: Path, told: Told) -> Iterator[Server]:
    with serve(repo, **ANY_PORTS, progress=told, poll=True) as running:
        yield running


def ask(server: Server, repo: Path, request: dict[str, Any]) -> dict[str, Any]:
    with connect(server.grpc) as client:
        return dict(client.infer(read_repository(str(repo))[0].manifest, request))


def metric(server: Server, name: str) -> float:
    text = urllib.request.urlopen(server.metrics, timeout=10).read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.M))


def settled(server: Server, name: str) -> float:
    """The metric once it holds still: the server counts a request after its answer has left."""
    last = -1.0
    while (value := metric(server, name)) != last:
        last = value
        time.sleep(0.5)
    return value


def wait_for(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def test_a_ready_server_gives_the_golden_answers_over_both_protocols(server: Server, repo: Path) -> None:
    for url in (server.grpc, server.http):
        report = verify(str(repo), url=url)
        assert report.passed
        assert {c.output for c in report.models[0].comparisons} == {"y", "row"}


def test_what_runs_the_model_is_told(server: Server) -> None:
    assert re.fullmatch(
        r"tiny v\d+: model.onnx run by onnxruntime \S+ inside Triton's python backend; "
        r"NVIDIA's container runs the same file with its onnxruntime backend",
        str(server.served["tiny"]),
    )


def test_concurrent_requests_are_merged_and_answered_as_if_alone(server: Server, repo: Path) -> None:
    # Two shapes, so that the batches of one shape must not mix with the other's.
    requests = [inputs(1 + i % 2, 2 + 3 * (i % 2), seed=i) for i in range(8)]
    alone = [ask(server, repo, request) for request in requests]
    count, executions = settled(server, "nv_inference_count"), settled(server, "nv_inference_exec_count")

    def burst() -> list[dict[str, Any]]:
        start = threading.Barrier(len(requests))

        def one(request: dict[str, Any]) -> list[dict[str, Any]]:
            with connect(server.grpc) as client:
                manifest = read_repository(str(repo))[0].manifest
                start.wait()
                return [dict(client.infer(manifest, request)) for _ in range(20)]

        with ThreadPoolExecutor(len(requests)) as pool:
            return [answers for found in pool.map(one, requests) for answers in found]

    answers = burst()
    for index, answer in enumerate(answers):
        for name, wanted in alone[index // 20].items():
            np.testing.assert_array_equal(answer[name], wanted)
    rows = sum(len(request["pick"]) for request in requests) * 20
    wait_for(lambda: metric(server, "nv_inference_count") - count == rows)
    assert metric(server, "nv_inference_exec_count") - executions < len(requests) * 20


def test_a_bad_request_gets_an_error_while_the_others_of_its_batch_succeed(server: Server, repo: Path) -> None:
    good = [inputs(1, 2, seed=i) for i in range(7)]
    bad = {**inputs(1, 2), "pick": np.array([99])}
    for _ in range(5):
        start = threading.Barrier(8)

        def one(request: dict[str, Any], start: threading.Barrier = start) -> dict[str, Any] | ModelNotServed:
            with connect(server.grpc) as client:
                manifest = read_repository(str(repo))[0].manifest
                start.wait()
                try:
                    return dict(client.infer(manifest, request))
                except ModelNotServed as error:
                    return error

        with ThreadPoolExecutor(8) as pool:
            *answers, refused = pool.map(one, [*good, bad])
        assert isinstance(refused, ModelNotServed)
        assert "indices element out of data bounds" in refused.why
        for request, answer in zip(good, answers, strict=True):
            assert isinstance(answer, dict), answer
            np.testing.assert_allclose(answer["y"], reference(**request)["y"], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": np.zeros((1, 2, 7), np.float32)}, "shape"),
        ({"x": np.zeros((1, 2, 4), np.float64)}, "data-type"),
        ({"x": np.zeros((17, 2, 4), np.float32), "pick": np.zeros(17, np.int64)}, "batch"),
    ],
)
def test_a_request_of_a_wrong_shape_dtype_or_batch_is_refused(
    server: Server, repo: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelNotServed) as error:
        ask(server, repo, {**inputs(1, 2), **change})
    assert reason in error.value.why
    assert ask(server, repo, inputs(1, 2)).keys() == {"y", "row"}


def test_a_killed_stub_is_noticed_told_and_served_again(server: Server, repo: Path, told: Told) -> None:
    (stub,) = server.process.stubs()
    os.kill(stub, signal.SIGKILL)
    wait_for(lambda: any("serves again" in line for line in told.lines))
    assert "tiny: the process that runs it died; loading it again" in told.lines
    assert stub not in server.process.stubs()
    assert verify(str(repo), url=server.grpc).passed


def test_of_two_processes_one_killed_both_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "RETIRE_AFTER_S", 0.5)
    publish_tiny(tmp_path / "models", tmp_path / "files")
    config = tmp_path / "models/tiny/config.pbtxt"
    config.write_text(config.read_text().replace("count: 1\n  kind: KIND_CPU", "count: 2\n  kind: KIND_CPU"))
    with serve(tmp_path / "models", **ANY_PORTS) as server:
        before = set(server.process.stubs())
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len(server.process.stubs()) == 2 and not before & server.process.stubs().keys())
        assert verify(str(tmp_path / "models"), url=server.grpc).passed


def test_a_new_version_is_served_when_it_is_published(server: Server, repo: Path, told: Told, tmp_path: Path) -> None:
    publish_tiny(repo, tmp_path / "files")
    wait_for(lambda: any(line.startswith("new: tiny v2") for line in told.lines))
    assert verify(str(repo), url=server.grpc).models[0].version == 2


def test_a_new_version_that_cannot_be_served_leaves_the_one_before_it(
    server: Server, repo: Path, told: Told, tmp_path: Path
) -> None:
    before = read_repository(str(repo))[0].manifest
    publish_tiny(repo, tmp_path / "files", artifact=b"no model")
    wait_for(lambda: any("is not served" in line for line in told.lines))
    with connect(server.grpc) as client:
        request = inputs(2, 3)
        np.testing.assert_allclose(client.infer(before, request)["y"], reference(**request)["y"], rtol=1e-5)


def test_a_taken_port_is_named_with_its_owner_and_a_free_one(repo: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse) as error, serve(repo, http_port=0, grpc_port=port, metrics_port=0):
            pass
    assert f"port {port} (grpc)" in error.value.what
    assert f"process {os.getpid()}" in error.value.why
    suggested = int(re.findall(r"--grpc-port (\d+)", error.value.next_step)[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", suggested))


def test_an_artifact_that_is_not_the_proven_one_is_not_served(tmp_path: Path) -> None:
    publish_tiny(tmp_path / "models", tmp_path / "files")
    file = tmp_path / "models/tiny/1/model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(DigestMismatch, match=r"model\.onnx"), serve(tmp_path / "models", **ANY_PORTS):
        pass


def test_a_model_that_the_runtime_refuses_is_told_in_its_words_and_leaves_only_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(tmp_path / "models", tmp_path / "files", artifact=b"no model")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ModelLoadFailed, match="could not load tiny") as error, serve(tmp_path / "models", **ANY_PORTS):
        pass
    assert "INVALID_PROTOBUF" in error.value.why
    assert "At:" not in error.value.why
    (log,) = tmp_path.glob("kpdeploy-serve-*")
    assert "failed to load 'tiny'" in log.read_text()
    assert_no_trace(log.with_suffix(""))


def test_a_model_that_answers_wrong_is_not_ready(tmp_path: Path) -> None:
    publish_tiny(tmp_path / "models", tmp_path / "files", wrong=0.5)
    with pytest.raises(NotReady, match="tiny is loaded") as error, serve(tmp_path / "models", **ANY_PORTS):
        pass
    assert "y is off by" in error.value.why
    log = Path(error.value.next_step.rpartition(" ")[2])
    assert "successfully loaded 'tiny'" in log.read_text()
    log.unlink()


def test_a_repository_in_an_object_store_is_fetched_and_served(tmp_path: Path) -> None:
    publish_tiny("memory://models", tmp_path / "files")
    with serve("memory://models", **ANY_PORTS) as server:
        assert verify("memory://models", url=server.grpc).passed


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_asked_to_end_nothing_is_left(repo: Path, number: signal.Signals, status: int) -> None:
    process, ready = start_command(repo)
    family = processes_of(ready["pid"])
    assert len(family) >= 2, "the server and a stub"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert not any(psutil.pid_exists(pid) for pid in family)
    assert_no_trace(Path(ready["log"]).parent)


def test_a_killed_kpdeploy_takes_the_server_with_it_and_the_next_one_sweeps(repo: Path) -> None:
    process, ready = start_command(repo)
    family = processes_of(ready["pid"])
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in family))
    process, _ = start_command(repo)
    assert not Path(ready["log"]).exists()
    process.terminate()
    process.communicate(timeout=30)
    assert_no_trace(Path(ready["log"]).parent)


def test_a_server_that_dies_is_an_error_with_its_log(repo: Path) -> None:
    process, ready = start_command(repo)
    os.kill(ready["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=30)
    error = json.loads(out)["error"]
    assert (process.returncode, error["kind"]) == (54, "ServerDied")
    log = Path(error["next"].rpartition(" ")[2])
    assert "successfully loaded 'tiny'" in log.read_text()
    log.unlink()
    assert_no_trace(Path(ready["log"]).parent)


@pytest.fixture(scope="module", autouse=True)
def whole_repo(repo: Path) -> None:
    """A repository that no other test changes, for the servers that run as a command."""
    shutil.copytree(repo, repo.parent / "unchanged")


def start_command(repo: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`kpdeploy serve` as a user runs it, and what it printed when it was ready."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kpdeploy", "serve", str(repo.parent / "unchanged"), *ports, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        line = process.stdout.readline()
        assert line, f"it ended: {text}"
        text += line
    return process, json.loads(text)


def processes_of(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def assert_no_trace(folder: Path) -> None:
    """Neither the folder of a server nor its shared memory is left."""
    assert not folder.exists()
    assert not [segment for segment in os.listdir("/dev/shm") if segment.startswith(folder.name)]
