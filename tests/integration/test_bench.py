"""`kpdeploy bench` against a real tritonserver with small models that behave, stall, refuse and never answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from kpdeploy.bench import bench
from kpdeploy.errors import InputMismatch, LoadFailed, ModelNotServed
from kpdeploy.progress import Progress
from kpdeploy.serving.triton import control
from kpdeploy.serving.triton.environment import ensure_environment
from kpdeploy.serving.triton.overlay import link_backends
from kpdeploy.serving.triton.ports import Ports, claim
from kpdeploy.serving.triton.process import TritonProcess
from kpdeploy.serving.triton.scratch import scratch

STALL_SECONDS = 0.5
STALL_AT = 60

MODEL = """
import json, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        texts = json.loads(args["model_config"])["parameters"]
        self.parameters = {name: float(text["string_value"]) for name, text in texts.items()}
        self.weight = np.eye(8, dtype=np.float32)
        self.seen = 0

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        self.seen += 1
        if self.seen == self.parameters.get("stall_at", 0):
            time.sleep(self.parameters["stall_seconds"])
        time.sleep(self.parameters.get("sleep_seconds", 0))
        if self.parameters.get("refuse_every", 0) and self.seen % self.parameters["refuse_every"] == 0:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("refused on purpose"))
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.repeat(x, 8, axis=1)[:, :8] @ self.weight)])
"""

MODELS: dict[str, dict[str, float]] = {
    "steady": {},
    "stalls": {"stall_at": STALL_AT, "stall_seconds": STALL_SECONDS},
    "stalls_closed": {"stall_at": STALL_AT, "stall_seconds": STALL_SECONDS},
    "refuses_some": {"refuse_every": 3},
    "refuses_all": {"refuse_every": 1},
    "never_in_time": {"sleep_seconds": 0.6},
}


@dataclass(frozen=True, kw_only=True)
class Addresses:
    grpc: str
    http: str


@pytest.fixture(scope="module")
def server() -> Iterator[Addresses]:
    with scratch() as space:
        environment = ensure_environment(Progress())
        for name, parameters in MODELS.items():
            write_model(space.folder / "repository" / name, name, parameters)
        link_backends(space.folder / "backends", environment.python_backend, backends_dir=None)
        ports = claim(Ports(http=0, grpc=0, metrics=0))
        process = TritonProcess(environment, ports, space)
        try:
            addresses = Addresses(grpc=f"127.0.0.1:{ports.grpc}", http=f"127.0.0.1:{ports.http}")
            await_ready(process, addresses.http)
            yield addresses
        finally:
            process.stop()


def write_model(folder: Path, name: str, parameters: dict[str, float]) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(MODEL)
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=16)
    config.input.add(name="x", data_type=model_config_pb2.TYPE_FP32, dims=[-1])
    config.output.add(name="y", data_type=model_config_pb2.TYPE_FP32, dims=[8])
    for key, value in parameters.items():
        config.parameters[key].string_value = str(value)
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))


def await_ready(process: TritonProcess, http: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.exit_status() is None, process.log_tail()
        ready = {m["name"] for m in control.index(http) or [] if m.get("state") == "READY"}
        if ready == set(MODELS):
            return
        time.sleep(0.2)
    pytest.fail(f"not ready in time: {process.log_tail()}")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_closed_loop_measures_each_number_of_clients(server: Addresses, protocol: str) -> None:
    report = bench(
        getattr(server, protocol),
        model="steady",
        clients=(1, 4),
        seconds=1,
        warmup_seconds=0.2,
        protocol=protocol,
        shape={"batch": 2, "width": 8},
    )
    assert [row.level for row in report.rows] == [1, 4]
    assert report.inputs == ("x:float32[2,8]",)
    assert report.server.startswith("triton ")
    for row in report.rows:
        assert row.failed == 0
        assert row.succeeded > 10
        assert 0 < row.latencies.p50_ms <= row.latencies.p99_ms <= row.latencies.max_ms * 1.002
        # Little's law: requests in flight = throughput × mean latency, which the median must be near or below.
        assert row.throughput * row.latencies.p50_ms / 1e3 < row.level * 1.1
        assert row.generator_cores > 0


def test_open_loop_reaches_the_asked_rate(server: Addresses) -> None:
    row = bench(server.grpc, model="steady", mode="open", rates=(50,), seconds=2, warmup_seconds=0.2).rows[0]
    assert row.succeeded == 100
    assert 35 < row.throughput < 55


def test_a_stall_of_the_server_shows_in_the_open_loops_p99_and_hides_in_the_closed_loops(server: Addresses) -> None:
    opened = bench(server.grpc, model="stalls", mode="open", rates=(100,), seconds=2, warmup_seconds=0).rows[0]
    closed = bench(server.grpc, model="stalls_closed", clients=(1,), seconds=2, warmup_seconds=0).rows[0]
    assert closed.latencies.max_ms >= STALL_SECONDS * 1e3
    assert opened.latencies.max_ms >= STALL_SECONDS * 1e3 * 0.8
    # A quarter of the requests are due during the stall; each waits for the rest of it.
    assert opened.latencies.p99_ms > STALL_SECONDS * 1e3 * 0.8
    assert opened.latencies.p90_ms > STALL_SECONDS * 1e3 * 0.3
    assert closed.latencies.p90_ms < STALL_SECONDS * 1e3 * 0.3


@pytest.mark.parametrize(
    ("protocol", "reason"), [("grpc", "INTERNAL: refused on purpose"), ("http", "HTTP 500: refused on purpose")]
)
def test_errors_are_counted_by_the_servers_reason(server: Addresses, protocol: str, reason: str) -> None:
    url = getattr(server, protocol)
    row = bench(
        url, model="refuses_some", mode="open", rates=(60,), seconds=1, warmup_seconds=0, protocol=protocol
    ).rows[0]
    assert set(row.errors) == {reason}
    assert row.errors[reason] == pytest.approx(20, abs=1)
    assert row.succeeded + row.failed == 60


def test_a_model_that_refuses_everything_is_an_error_with_its_reason(server: Addresses) -> None:
    with pytest.raises(LoadFailed) as error:
        bench(server.grpc, model="refuses_all", clients=(1,), seconds=1)
    assert "refused on purpose" in error.value.why


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_request_without_an_answer_in_time_is_an_error(server: Addresses, protocol: str) -> None:
    with pytest.raises(LoadFailed) as error:
        bench(getattr(server, protocol), model="never_in_time", seconds=1, protocol=protocol, timeout_seconds=0.2)
    assert error.value.why == "no answer in 0.2 s"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_unknown_model_is_told_with_the_near_miss_and_the_servers_models(server: Addresses, protocol: str) -> None:
    with pytest.raises(ModelNotServed) as error:
        bench(getattr(server, protocol), model="staedy", protocol=protocol)
    assert "'steady'" in error.value.next_step
    assert all(name in error.value.why for name in MODELS)


def test_a_batch_beyond_the_models_is_refused_before_any_load(server: Addresses) -> None:
    with pytest.raises(InputMismatch, match="batch=17"):
        bench(server.grpc, model="steady", shape={"batch": 17})


def test_the_command_prints_json_and_draws(server: Addresses, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.png"
    done = kpdeploy(
        "bench", server.grpc, "--model", "steady", "--clients", "1,2", "--seconds", "0.5", "--warmup-seconds", "0.1",
        "--shape", "width=8", "--plot", str(picture), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["level"] for row in json.loads(done.stdout)["rows"]] == [1, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_ends_with_its_table_and_the_next_command(server: Addresses) -> None:
    done = kpdeploy(
        "bench", server.grpc, "--model", "refuses_some", "--clients", "1", "--seconds", "0.5", "--warmup-seconds", "0"
    )
    assert done.returncode == 0, done.stderr
    assert "p99.9 ms" in done.stdout
    assert "× INTERNAL: refused on purpose" in done.stdout
    assert "--mode open --rate" in done.stderr.splitlines()[-1]


def kpdeploy(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kpdeploy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
