"""The client without a server: addresses, protocols, and how golden requests are replayed and judged."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace

import grpc
import numpy as np
import pytest
from tiny_version import baseline, exchange, manifest

from kpdeploy.artifact import Comparison
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import AnswersDiffer, UnknownName, Unreachable
from kpdeploy.inputs import Array, Tensors
from kpdeploy.serving.client import ModelReport, VerifyReport, connect, replay

DEPLOYMENT = Deployment(repository="models", manifest=manifest(version=3))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def http_port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def grpc_port() -> Iterator[int]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait()


def test_the_protocol_is_what_the_port_speaks(http_port: int, grpc_port: int) -> None:
    for port, protocol in ((http_port, "http"), (grpc_port, "grpc")):
        with connect(f"127.0.0.1:{port}", timeout_s=5) as client:
            assert (client.protocol, client.address) == (protocol, f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        ("http://host", "auto", ("http", "host:8000")),
        ("https://host:443", "auto", ("http", "host:443")),
        ("grpc://host", "auto", ("grpc", "host:8001")),
        ("host:9", "http", ("http", "host:9")),
        ("host", "grpc", ("grpc", "host:8001")),
        ("grpc://[::1]:9", "auto", ("grpc", "[::1]:9")),
    ],
)
def test_a_scheme_or_an_option_says_the_protocol(url: str, protocol: str, expected: tuple[str, str]) -> None:
    with connect(url, protocol=protocol) as client:
        assert (client.protocol, client.address) == expected


@pytest.mark.parametrize("scheme", ["", "http://", "grpc://"])
def test_a_port_without_a_server_is_unreachable(free_port: int, scheme: str) -> None:
    with pytest.raises(Unreachable, match=str(free_port)), connect(f"{scheme}127.0.0.1:{free_port}") as client:
        client.live()


@pytest.mark.parametrize(("scheme", "port"), [("http://", "grpc_port"), ("grpc://", "http_port")])
def test_a_server_of_the_other_protocol_is_unreachable(scheme: str, port: str, request: pytest.FixtureRequest) -> None:
    url = f"{scheme}127.0.0.1:{request.getfixturevalue(port)}"
    with pytest.raises(Unreachable), connect(url, timeout_s=3) as client:
        client.live()


def test_a_wrong_address_is_told_at_once() -> None:
    with pytest.raises(UnknownName, match="ftp"):
        connect("ftp://host")
    with pytest.raises(UnknownName, match="http3"):
        connect("host:1", protocol="http3")
    with pytest.raises(Unreachable, match="not an address"):
        connect("host:port")


class Model:
    """The tiny model itself in the client's place: right, or off by a factor for the rows of large requests."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.batches: list[int] = []

    def infer(self, manifest: object, inputs: Tensors) -> dict[str, Array]:
        x, scale = inputs["x"], inputs["scale"]
        self.batches.append(len(x))
        factor = np.float32(self.factor if len(x) > 1 else 1.0)
        return {"y": x * scale[:, None] * factor, "total": x.sum(axis=1) * scale}  # type: ignore[operator]


def test_replay_sends_every_golden_request_in_batches_that_the_server_takes() -> None:
    model = Model()
    found = replay(model, DEPLOYMENT, baseline())  # type: ignore[arg-type]
    assert model.batches == [1, 8, 2]
    assert [(c.output, c.passed, c.tolerance) for c in found] == [("y", True, 1e-5), ("total", True, 1e-5)]
    whole = Model()
    alone = replace(DEPLOYMENT, manifest=manifest(max_batch_size=0))
    replay(whole, alone, baseline())  # type: ignore[arg-type]
    assert whole.batches == [1, 10]


def test_replay_tells_the_worst_of_each_output() -> None:
    found = replay(Model(1.001), DEPLOYMENT, baseline())  # type: ignore[arg-type]
    errors = {c.output: c.error for c in found}
    assert errors["y"] == pytest.approx(1e-3, rel=1e-2)
    assert errors["total"] <= 1e-5


def test_an_answer_that_is_not_a_number_is_the_worst() -> None:
    golden = Baseline(exchanges=(exchange(2, 3), exchange(1, 3)), latencies=(), environment={})
    found = replay(Model(float("nan")), DEPLOYMENT, golden)  # type: ignore[arg-type]
    assert not next(c for c in found if c.output == "y").passed


def test_a_difference_names_the_output_its_error_and_its_tolerance() -> None:
    def report(error: float) -> VerifyReport:
        comparisons = (Comparison(output="y", error=error, tolerance=1e-5),)
        entry = ModelReport(model="tiny", version=3, requests=2, comparisons=comparisons)
        return VerifyReport(address="host:8001", protocol="grpc", models=(entry,))

    assert report(1e-6).passed
    assert report(1e-6).difference() is None
    difference = report(0.25).difference()
    assert isinstance(difference, AnswersDiffer)
    for part in ("tiny version 3", "host:8001", "output y", "0.25", "1e-05"):
        assert part in str(difference)
    assert report(0.25).to_json()["models"][0]["outputs"][0]["passed"] is False
