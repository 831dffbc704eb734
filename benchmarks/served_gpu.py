"""What the real tritonserver adds to a model in CUDA graphs on an H100, and where the time goes; one client.

    kpdeploy export gpu_models:Bert --format cuda --level 2 --name bert --repo models/ \\
        --input 'input_ids:int64[batch=1..8,seq=1..128]{0..30521}' --input 'attention_mask:int64[batch,seq]{mask}'
    python benchmarks/served_gpu.py models/ bert -o benchmarks/results/served_gpu_h100.json

`kpdeploy serve` and the bare runtime (the artifact's own, in this process, NumPy to NumPy) answer the same requests
in turns; the medians of all calls count. Clients hold one connection: gRPC by tritonclient, HTTP by http.client with
binary tensors, and both by bare sockets (`bare_clients.py`), which shows what the libraries of a client in Python take.
`server_us` are the server's own counters over the calls of one client, microseconds a request: in the queue, taking
inputs, computing (the python backend's messages and the model), giving outputs.
"""

from __future__ import annotations

import http.client
import importlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bare_clients
import click
import numpy as np

from kpdeploy import __version__, serve
from kpdeploy.artifact import Manifest, located
from kpdeploy.bench.wire import http_body
from kpdeploy.compare import relative_error
from kpdeploy.hardware import environment
from kpdeploy.inputs import Array, sample
from kpdeploy.serving.repository import find_deployment

ROUNDS, CALLS = 7, 60
GOAL_MS = 0.4
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")

Call = Callable[[], Any]
Run = Callable[[list[Array]], list[Array]]


def bare(manifest: Manifest, folder: Path) -> Run:
    settings = located(manifest.settings, folder)
    runtime = importlib.import_module(f"kpdeploy.runtimes.{manifest.format}")
    names = {"inputs": manifest.input_names, "outputs": manifest.output_names}
    run: Run = runtime.load(str(folder / manifest.filename), **names, settings=settings)
    return run


def over_grpc(client: Any, manifest: Manifest, arrays: Mapping[str, Array]) -> Callable[[], list[Array]]:
    sent = grpc_inputs(arrays)

    def call() -> list[Array]:
        answer = client.infer(manifest.model, sent)
        return [answer.as_numpy(name) for name in manifest.output_names]

    return call


def grpc_inputs(arrays: Mapping[str, Array]) -> list[Any]:
    import tritonclient.grpc as wire
    from tritonclient.utils import np_to_triton_dtype

    sent = []
    for name, array in arrays.items():
        tensor = wire.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        sent.append(tensor)
    return sent


def over_sockets(server: Any, manifest: Manifest, arrays: Mapping[str, Array]) -> dict[str, Call]:
    """The same requests by clients that are nothing but a socket."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=manifest.model)
    for tensor in grpc_inputs(arrays):
        message.inputs.append(tensor._get_tensor())
        message.raw_input_contents.append(tensor._get_content())
    path, method = f"/v2/models/{manifest.model}/infer", "/inference.GRPCInferenceService/ModelInfer"
    return {
        "bare_grpc": bare_clients.over_grpc(server.grpc, method, message.SerializeToString()),
        "bare_http": bare_clients.over_http(server.http, path, *http_body(arrays)),
    }


def over_http(address: str, manifest: Manifest, arrays: Mapping[str, Array]) -> Call:
    connection = http.client.HTTPConnection(address)
    body, headers = http_body(arrays)

    def call() -> bytes:
        connection.request("POST", f"/v2/models/{manifest.model}/infer", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise click.ClickException(content[:300].decode(errors="replace"))
        return content

    return call


def counters(client: Any, model: str) -> dict[str, float]:
    """Microseconds so far in each part, and requests."""
    (found,) = client.get_inference_statistics(model).model_stats
    parts = {part: getattr(found.inference_stats, part).ns / 1e3 for part in PARTS}
    return {**parts, "requests": found.inference_stats.success.count}


def in_turns(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Milliseconds of each call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                if number:
                    taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


def point(client: Any, server: Any, manifest: Manifest, run: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    drawn = sample(manifest.signature, sizes, np.random.default_rng())
    names = zip(manifest.input_names, manifest.signature.inputs, strict=True)
    arrays = {name: drawn[spec.name] for name, spec in names}
    grpc_call = over_grpc(client, manifest, arrays)
    inputs = list(arrays.values())
    error = max(relative_error(a, b) for a, b in zip(grpc_call(), run(inputs), strict=True))
    http_call = over_http(server.http, manifest, arrays)
    served = {"grpc": grpc_call, "http": http_call, **over_sockets(server, manifest, arrays)}
    taken = in_turns({"bare": lambda: run(inputs), **served})
    p50 = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "sizes": dict(sizes),
        "difference": error,
        "p50_ms": p50,
        "p99_ms": {name: float(np.quantile(times, 0.99)) for name, times in taken.items()},
        "added_ms": {name: p50[name] - p50["bare"] for name in served},
        "goal_ms": GOAL_MS,
        "server_us": {name: counted(client, manifest.model, served[name]) for name in ("grpc", "http")},
    }


def counted(client: Any, model: str, call: Call) -> dict[str, float]:
    """Microseconds a request in each part of the server, and between server and client."""
    before, start = counters(client, model), time.perf_counter()
    for _ in range(CALLS):
        call()
    taken, after = (time.perf_counter() - start) * 1e6, counters(client, model)
    count = after["requests"] - before["requests"]
    found = {part: (after[part] - before[part]) / count for part in PARTS}
    return {**found, "between": taken / CALLS - sum(found.values())}


@click.command()
@click.argument("repo", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--at", multiple=True, default=("batch=1,seq=128", "batch=8,seq=128"), show_default=True)
@click.option("-o", "output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(repo: Path, models: tuple[str, ...], at: tuple[str, ...], output: Path) -> None:
    """Serve REPO and time MODELS."""
    import tritonclient.grpc as wire

    rows = []
    with (
        serve(repo, http_port=0, grpc_port=0, metrics_port=0) as server,
        wire.InferenceServerClient(server.grpc) as client,
    ):
        for model in models:
            deployment = find_deployment(repo, model)
            manifest, folder = deployment.manifest, Path(deployment.folder)
            run = bare(manifest, folder)
            for text in at:
                sizes = {axis: int(size) for axis, _, size in (part.partition("=") for part in text.split(","))}
                row = {
                    "model": model,
                    "settings": dict(manifest.settings),
                    **point(client, server, manifest, run, sizes),
                }
                rows.append(row)
                click.echo(json.dumps(row, default=list))
    report = {
        "what": "one client of a real tritonserver against the same artifact in process",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1, default=list) + "\n")


if __name__ == "__main__":
    main()
