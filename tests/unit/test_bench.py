"""The load generator's parts, without a server."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tritonclient.grpc import service_pb2

from kpdeploy.artifact import MANIFEST, Manifest
from kpdeploy.bench import BenchReport, Latencies, Row, bench
from kpdeploy.bench.loops import arrivals, closed, opened
from kpdeploy.bench.requests import Recipe, from_repository, from_server
from kpdeploy.bench.wire import GrpcWire, HttpWire
from kpdeploy.cli.bench import command
from kpdeploy.errors import InputMismatch, InputsUnknown, RepositoryBroken, UnknownName, Unreachable
from kpdeploy.signature import Axis, Signature, TensorSpec, Values


class Instant:
    """A wire that answers at once, except where told otherwise."""

    def __init__(self, *, pause: float = 0.0, refuse: dict[int, str] | None = None) -> None:
        self.pause, self.refuse = pause, refuse or {}
        self.sent: list[int] = []
        self.in_flight = self.most_in_flight = 0

    async def send(self, index: int) -> str:
        self.sent.append(index)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.pause)
        self.in_flight -= 1
        return self.refuse.get(index, "")

    async def close(self) -> None: ...


class OneAtATime(Instant):
    """A server that takes requests in turn and stalls once."""

    def __init__(self, *, stall_at: int, stall: float) -> None:
        super().__init__()
        self.stall_at, self.stall = stall_at, stall
        self.turn = asyncio.Lock()

    async def send(self, index: int) -> str:
        async with self.turn:
            if index == self.stall_at:
                await asyncio.sleep(self.stall)
        return ""


def test_percentiles_of_a_known_series_are_right_to_three_digits() -> None:
    series = np.random.default_rng(1).permutation(np.arange(1, 100_001)) / 1e5  # 0.01 ms … 1 s, uniform
    found = Latencies.of(series.tolist())
    assert found.p50_ms == pytest.approx(500, rel=2e-3)
    assert found.p90_ms == pytest.approx(900, rel=2e-3)
    assert found.p99_ms == pytest.approx(990, rel=2e-3)
    assert found.p999_ms == pytest.approx(999, rel=2e-3)
    assert found.max_ms == pytest.approx(1000)
    assert dict(found.curve)[70] == pytest.approx(700, rel=2e-3)
    assert [ms for _, ms in found.curve] == sorted(ms for _, ms in found.curve)


def test_one_slow_request_of_a_thousand_is_in_p99_9_and_not_in_p99() -> None:
    found = Latencies.of([0.010] * 998 + [2.0] * 2)
    assert found.p99_ms == pytest.approx(10, rel=2e-3)
    assert found.p999_ms == pytest.approx(2000, rel=2e-3)


def test_no_request_has_no_latency() -> None:
    found = Latencies.of([])
    assert (found.p50_ms, found.p999_ms, found.max_ms) == (0, 0, 0)


def test_arrivals_are_a_poisson_process_at_the_asked_rate() -> None:
    moments = np.array(arrivals(200, 100))
    gaps = np.diff(moments)
    assert len(moments) == 20_000
    assert moments[0] >= 0
    assert moments[-1] <= 100
    # Exponential gaps: the standard deviation is the mean, and a share of e⁻¹ is longer than the mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert np.mean(gaps > gaps.mean()) == pytest.approx(np.exp(-1), abs=0.02)


def test_closed_loop_keeps_as_many_requests_in_flight_as_there_are_clients() -> None:
    wire = Instant(pause=0.005)
    row = asyncio.run(closed(wire, 7, 0.3))
    assert wire.most_in_flight == 7
    assert row.succeeded == len(wire.sent) > 7
    assert len(set(wire.sent)) == len(wire.sent), "each client walks through the pool on its own"
    assert row.latencies.p50_ms >= 5


def test_errors_are_counted_by_reason_and_are_not_latencies() -> None:
    wire = Instant(refuse={index: ("full" if index % 2 else "bad shape") for index in range(0, 30)})
    row = asyncio.run(opened(wire, 200, 0.5))
    assert row.errors == {"full": 15, "bad shape": 15}
    assert row.succeeded == 70
    assert row.failed == 30


def test_open_loop_sends_every_request_when_due_whether_or_not_the_server_answers() -> None:
    wire = Instant(pause=0.5)
    row = asyncio.run(opened(wire, 100, 0.5))
    assert len(wire.sent) == 50
    assert wire.most_in_flight > 25
    assert row.succeeded == 50


def test_open_loop_counts_the_wait_of_all_who_arrive_during_a_stall() -> None:
    async def run() -> Row:
        return await opened(OneAtATime(stall_at=20, stall=0.5), 100, 1.0)

    row = asyncio.run(run())
    # About fifty of a hundred requests arrive while the server stalls; without their waits p90 would be a few ms.
    assert row.latencies.p90_ms > 200
    assert row.latencies.p99_ms > 400


def test_closed_loop_hides_a_stall_which_is_why_there_is_an_open_one() -> None:
    async def run() -> Row:
        return await closed(OneAtATime(stall_at=20, stall=0.5), 1, 1.0)

    row = asyncio.run(run())
    assert row.latencies.max_ms >= 500
    assert row.latencies.p90_ms < 200


def test_a_generator_that_falls_behind_says_so() -> None:
    class Hog(Instant):
        async def send(self, index: int) -> str:
            time.sleep(0.03)  # holds the event loop
            return ""

    row = asyncio.run(opened(Hog(), 100, 0.5))
    assert row.late_p99_ms > 100
    assert any("fell behind" in warning for warning in row.warnings)
    assert any("100/s asked" in warning for warning in row.warnings)


def signature() -> Signature:
    return Signature(
        inputs=(
            TensorSpec(
                name="tokens", dtype="int64", shape=("batch", "seq"), values=Values(kind="range", low=5, high=9)
            ),
            TensorSpec(name="scale", dtype="float32", shape=("batch", 3)),
        ),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
        axes=(Axis(name="batch", min=1, max=16), Axis(name="seq", min=2, max=64)),
    )


def repository(folder: Path) -> Path:
    version = folder / "encoder" / "3"
    version.mkdir(parents=True)
    Manifest(
        model="encoder", version=3, target="triton", format="torchscript", filename="model.pt", signature=signature(),
        max_batch_size=16, input_names=("INPUT__0", "INPUT__1"), output_names=("y__0",), settings={}, files={},
        tolerances={}, decisions=(), formats=(), source={}, environment={}, created="2026-01-01T00:00:00Z",
    ).write(version)  # fmt: skip
    return folder


def test_requests_by_the_manifest_have_the_servers_names_and_valid_values(tmp_path: Path) -> None:
    recipe = from_repository(repository(tmp_path), "encoder", "3", {"seq": 7})
    requests = recipe.requests(32)
    assert recipe.described == ("INPUT__0:int64[1,7]", "INPUT__1:float32[1,3]")
    assert all(r["INPUT__0"].min() >= 5 and r["INPUT__0"].max() <= 9 for r in requests)
    assert len({r["INPUT__1"].tobytes() for r in requests}) == 32


def test_default_sizes_are_batch_1_and_half_of_the_range(tmp_path: Path) -> None:
    assert from_repository(repository(tmp_path), "encoder", "3", {}).point == {"batch": 1, "seq": 32}


@pytest.mark.parametrize(("shape", "told"), [({"sqe": 3}, "seq=2..64"), ({"seq": 65}, "from 2 to 64")])
def test_a_shape_that_the_model_does_not_have_is_refused(tmp_path: Path, shape: dict[str, int], told: str) -> None:
    with pytest.raises(InputMismatch) as error:
        from_repository(repository(tmp_path), "encoder", "3", shape)
    assert told in error.value.next_step


def test_a_repository_without_the_served_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RepositoryBroken):
        from_repository(repository(tmp_path), "encoder", "4", {})
    assert (tmp_path / "encoder" / "3" / MANIFEST).exists()


METADATA = {
    "inputs": [
        {"name": "input_ids", "datatype": "INT64", "shape": ["-1", "-1"]},
        {"name": "attention_mask", "datatype": "INT64", "shape": ["-1", "-1"]},
    ]
}


def test_requests_by_the_servers_metadata_are_valid_looking_and_say_what_was_guessed() -> None:
    recipe = from_server(METADATA, max_batch_size=8, shape={"batch": 2, "seq": 12})
    tensors = recipe.requests(1)[0]
    assert tensors["input_ids"].shape == (2, 12)
    assert set(np.unique(tensors["input_ids"])) <= {0, 1}
    assert (tensors["attention_mask"][:, 0] == 1).all()
    assert any("input_ids" in note and "--repo" in note for note in recipe.notes)


def test_free_dimensions_that_nobody_gave_are_chosen_and_told() -> None:
    recipe = from_server(METADATA, max_batch_size=8, shape={})
    assert recipe.point == {"batch": 1, "dim1": 128}
    assert any("dim1=128" in note for note in recipe.notes)


def test_a_batch_beyond_the_servers_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InputMismatch):
        from_server(METADATA, max_batch_size=8, shape={"batch": 9})


def test_a_model_of_strings_cannot_be_loaded_without_its_repository() -> None:
    with pytest.raises(InputsUnknown, match="BYTES"):
        from_server({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]}, max_batch_size=8, shape={})


def test_the_bytes_that_are_sent_hold_the_tensors(tmp_path: Path) -> None:
    recipe: Recipe = from_repository(repository(tmp_path), "encoder", "3", {})
    requests = recipe.requests(2)

    async def bodies() -> tuple[bytes, tuple[bytes, dict[str, str]]]:
        grpc, http = GrpcWire("localhost:1", "encoder", requests, 1), HttpWire("localhost:1", "encoder", requests, 1)
        await grpc.close()
        await http.close()
        return grpc._bodies[1], http._bodies[1]

    grpc_body, (http_body, headers) = asyncio.run(bodies())
    sent = service_pb2.ModelInferRequest.FromString(grpc_body)
    assert sent.model_name == "encoder"
    assert [(t.name, t.datatype, list(t.shape)) for t in sent.inputs] == [
        ("INPUT__0", "INT64", [1, 32]),
        ("INPUT__1", "FP32", [1, 3]),
    ]
    raw = b"".join(array.tobytes() for array in requests[1].values())
    assert b"".join(sent.raw_input_contents) == raw
    split = int(headers["Inference-Header-Content-Length"])
    assert [t["name"] for t in json.loads(http_body[:split])["inputs"]] == ["INPUT__0", "INPUT__1"]
    assert http_body[split:] == raw


@pytest.mark.parametrize(("option", "value", "near"), [("mode", "opne", "open"), ("protocol", "htpt", "http")])
def test_a_mode_or_protocol_that_does_not_exist_names_the_near_one(option: str, value: str, near: str) -> None:
    with pytest.raises(UnknownName) as error:
        bench("localhost:1", model="m", **{option: value})  # type: ignore[arg-type]
    assert repr(near) in error.value.next_step


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_address_where_nothing_answers_is_one_clear_error(protocol: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(Unreachable) as error:
        bench(f"127.0.0.1:{port}", model="m", protocol=protocol)
    assert "kpdeploy serve" in error.value.next_step


def row(mode: str, level: float, *, scale: float = 1.0) -> Row:
    series = (np.random.default_rng(2).gamma(2, 0.004 * scale, size=2000)).tolist()
    return Row(
        mode=mode, level=level, seconds=10, succeeded=2000, errors={"HTTP 500: full": 3},
        latencies=Latencies.of(series), late_p99_ms=0.1, generator_cores=0.2,
    )  # fmt: skip


def report(mode: str, *levels: float) -> BenchReport:
    return BenchReport(
        url="localhost:8001", protocol="grpc", server="triton 2.51.0", model="encoder", version="3", mode=mode,
        point={"batch": 1}, inputs=("x:float32[1,3]",), distinct_requests=32, warmup_seconds=2,
        rows=tuple(row(mode, level, scale=1 + level / 10) for level in levels), notes=("a note",),
    )  # fmt: skip


def test_a_report_is_json_with_all_that_the_table_shows() -> None:
    data = json.loads(json.dumps(report("open", 50, 100).to_json()))
    assert [r["level"] for r in data["rows"]] == [50, 100]
    first = data["rows"][0]
    assert first["throughput_per_second"] == 200
    assert first["failed"] == 3
    assert first["errors"] == {"HTTP 500: full": 3}
    assert 0 < first["latencies"]["p50_ms"] < first["latencies"]["p99_ms"] <= first["latencies"]["max_ms"]


@pytest.mark.parametrize(("mode", "levels"), [("closed", (1, 8, 32)), ("open", (50, 100)), ("closed", (8,))])
def test_a_report_can_be_drawn(tmp_path: Path, mode: str, levels: tuple[float, ...]) -> None:
    pytest.importorskip("matplotlib")
    from kpdeploy.bench.plot import draw

    draw(report(mode, *levels), tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_measurement(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["localhost:1", "--model", "m", "--plot", str(tmp_path / "load.gif")])
    assert isinstance(result.exception, UnknownName)


@pytest.mark.parametrize(
    "options", [["--clients", "0"], ["--clients", "1.5"], ["--rate", "nan"], ["--shape", "seq"], ["--seconds", "0"]]
)
def test_options_that_make_no_sense_are_a_usage_error(options: list[str]) -> None:
    assert CliRunner().invoke(command, ["localhost:1", "--model", "m", *options]).exit_code == 2


def test_one_number_a_row_travels_as_a_column_as_the_server_was_told(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    manifest = Manifest.read(folder / "encoder" / "3")
    flat = Signature(inputs=(TensorSpec(name="age", dtype="float32", shape=("batch",)),), axes=manifest.signature.axes)
    replace(manifest, signature=flat, input_names=("age",)).write(folder / "encoder" / "3")
    request = from_repository(folder, "encoder", "3", {"batch": 4}).requests(1)[0]
    assert request["age"].shape == (4, 1)


def test_an_address_with_tls_is_refused_and_not_spoken_to_in_the_clear() -> None:
    with pytest.raises(UnknownName, match="TLS"):
        bench("https://localhost:1", model="m")
