"""The served model against calling a session in process: requests/s and p99 at several numbers of clients.

    python benchmarks/served.py models/ --model minilm -o benchmarks/results/served_minilm_cpu.json

Three peers answer the same tensors on the same machine, in interleaved rounds (the median of the rounds counts):

    served    kpdeploy serve and a closed loop over gRPC; the load generator shares the machine with the server
    ort       one ONNX Runtime session called by as many threads as there are clients, with the best of several
              intra-op settings at that number of clients
    artifact  the artifact that is served, in its own runtime in this process, one call at a time

Every request is of batch 1. `sentences` has the lengths of real prose; `one_length` is one usual length throughout.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from kpdeploy import __version__
from kpdeploy.artifact import Manifest, sha256
from kpdeploy.bench.loops import closed
from kpdeploy.bench.report import Latencies
from kpdeploy.bench.wire import GrpcWire
from kpdeploy.cli import console
from kpdeploy.errors import InputMismatch, RepositoryBroken
from kpdeploy.hardware import environment
from kpdeploy.inputs import Array, lead_axis, sample
from kpdeploy.runtimes import onnx
from kpdeploy.serving.triton.server import serve

# Word pieces of MiniLM's tokenizer in the sentences of Python's language reference (pydoc_data.topics, Python 3.11):
# 32 quantiles of 856 sentences, in mixed order.
SENTENCES = (
    20, 11, 37, 15, 25, 9, 18, 30, 13, 22, 45, 16, 10, 27, 19, 14, 35, 17, 23, 8, 28, 20, 13, 56, 15, 24, 11, 32, 17,
    26, 21, 39,
)  # fmt: skip
ONE_LENGTH = (32,) * 32
WORKLOADS = {"sentences": SENTENCES, "one_length": ONE_LENGTH}
TIMEOUT_SECONDS = 60.0
WARMUP_SECONDS = 0.5
CALIBRATION_SECONDS = 1.5

Tensors = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Window:
    """One measurement of one peer. `cores` is what this process used: the generator's, or the peer's own work."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    cores: float


Measure = Callable[[Sequence[Tensors], int, float], Window]
"""measure(requests, clients, seconds)"""


def served(url: str, manifest: Manifest) -> Measure:
    names = dict(zip((spec.name for spec in manifest.signature.inputs), manifest.input_names, strict=True))

    async def run(requests: Sequence[Tensors], clients: int, seconds: float) -> Window:
        renamed = [{names[name]: array for name, array in tensors.items()} for tensors in requests]
        wire = GrpcWire(url, manifest.model, renamed, TIMEOUT_SECONDS)
        try:
            await closed(wire, clients, WARMUP_SECONDS)
            row = await closed(wire, clients, seconds)
        finally:
            await wire.close()
        if row.failed:
            raise click.ClickException(f"{row.failed} requests failed: {next(iter(row.errors))}")
        return Window(
            requests_per_second=row.throughput,
            p50_ms=row.latencies.p50_ms,
            p99_ms=row.latencies.p99_ms,
            requests=row.succeeded,
            cores=row.generator_cores,
        )

    return lambda requests, clients, seconds: asyncio.run(run(requests, clients, seconds))


def in_process(call: Callable[[list[Array]], Any]) -> Measure:
    """`clients` threads that each call again when they have their answer."""

    def loop(arrays: Sequence[list[Array]], number: int, clients: int, end: float) -> list[float]:
        taken = []
        for index in itertools.count(number, clients):
            start = time.perf_counter()
            if start >= end:
                return taken
            call(arrays[index % len(arrays)])
            taken.append(time.perf_counter() - start)
        raise AssertionError("unreachable")

    def window(requests: Sequence[Tensors], clients: int, seconds: float) -> Window:
        arrays = [list(tensors.values()) for tensors in requests]
        start, busy = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(clients) as threads:
            jobs = [threads.submit(loop, arrays, number, clients, start + seconds) for number in range(clients)]
            taken = [seconds for job in jobs for seconds in job.result()]
        elapsed = time.perf_counter() - start
        latencies = Latencies.of(taken)
        return Window(
            requests_per_second=len(taken) / elapsed,
            p50_ms=latencies.p50_ms,
            p99_ms=latencies.p99_ms,
            requests=len(taken),
            cores=(time.process_time() - busy) / elapsed,
        )

    def measure(requests: Sequence[Tensors], clients: int, seconds: float) -> Window:
        window(requests, clients, WARMUP_SECONDS)
        return window(requests, clients, seconds)

    return measure


def one_at_a_time(call: Callable[[list[Array]], Any]) -> Callable[[list[Array]], Any]:
    """The runtimes promise one call at a time (OpenVINO's request is busy while it runs)."""
    turn = threading.Lock()

    def locked(arrays: list[Array]) -> Any:
        with turn:
            return call(arrays)

    return locked


@functools.cache
def ort(path: Path, threads: int) -> Measure:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs, outputs = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    return in_process(onnx.load(str(path), inputs=inputs, outputs=outputs, settings={"threads": threads}))


def best_ort_threads(path: Path, requests: Sequence[Tensors], clients: int) -> dict[int, float]:
    """Requests/s by intra-op threads, the best first; 0 is ONNX Runtime's own choice."""
    found = {n: ort(path, n)(requests, clients, CALIBRATION_SECONDS).requests_per_second for n in intra_op_candidates()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def intra_op_candidates() -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return sorted({0, 1, 2, max(1, cores // 2), cores})


def artifact(manifest: Manifest, folder: Path) -> Measure:
    runtime = importlib.import_module(f"kpdeploy.runtimes.{manifest.format}")
    call = runtime.load(
        str(folder / manifest.filename),
        inputs=manifest.input_names,
        outputs=manifest.output_names,
        settings=dict(manifest.settings),
    )
    return in_process(one_at_a_time(call))


def requests_of(manifest: Manifest, axis: str, lengths: Sequence[int]) -> list[Tensors]:
    """One valid request of batch 1 for each length of `axis`; other axes are at their smallest."""
    rng = np.random.default_rng(0)
    signature = manifest.signature
    point = {a.name: a.min for a in signature.axes} | {lead_axis(signature): 1}
    limits = signature.axis(axis)
    return [sample(signature, {**point, axis: min(max(n, limits.min), limits.max)}, rng) for n in lengths]


def version_folder(repo: Path, model: str) -> Path:
    """The newest version, which is the one that the repository's configuration publishes."""
    versions = [int(p.name) for p in (repo / model).glob("*") if p.name.isdigit()]
    if not versions:
        raise RepositoryBroken(f"{repo} holds no version of {model}", next_step="export it with `kpdeploy export`")
    return repo / model / str(max(versions))


@contextmanager
def quiet() -> Iterator[dict[str, float]]:
    """The load of the machine before and after, in the file: a figure from a busy machine is none."""
    load = {"before": os.getloadavg()[0]}
    yield load
    load["after"] = os.getloadavg()[0]


def median(windows: Sequence[Window]) -> dict[str, Any]:
    names = ("requests_per_second", "p50_ms", "p99_ms", "cores")
    return {
        **{name: statistics.median(getattr(w, name) for w in windows) for name in names},
        "slowest_round": min(w.requests_per_second for w in windows),
        "fastest_round": max(w.requests_per_second for w in windows),
        "rounds": [asdict(w) for w in windows],
    }


def compare(
    peers: Mapping[str, Measure], requests: Sequence[Tensors], clients: int, *, rounds: int, seconds: float
) -> dict[str, Any]:
    """All peers at one number of clients: each round measures each, starting with another one each time."""
    windows: dict[str, list[Window]] = {name: [] for name in peers}
    names = list(peers)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            windows[name].append(peers[name](requests, clients, seconds))
    found = {name: median(taken) for name, taken in windows.items()}
    ratios = {
        f"served_to_{name}": {
            "requests_per_second": found["served"]["requests_per_second"] / found[name]["requests_per_second"],
            "p99": found["served"]["p99_ms"] / found[name]["p99_ms"],
        }
        for name in names
        if name != "served"
    }
    return {"clients": clients, "ratios": ratios, "peers": found}


@click.command()
@click.argument("repo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", required=True)
@click.option("-o", "output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON to write.")
@click.option(
    "--onnx",
    "onnx_path",
    type=click.Path(exists=True, path_type=Path),
    help="The ONNX file of the ort peer. Default: the artifact, where it is ONNX.",
)
@click.option("--axis", default="seq", show_default=True, help="The axis that the lengths are of.")
@click.option(
    "--workload", "workloads", multiple=True, type=click.Choice([*WORKLOADS]), default=[*WORKLOADS], show_default=True
)
@click.option("--clients", "levels", default="1,8,32", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=4,
    show_default=True,
    help="Length of each window.",
)
def main(
    repo: Path, model: str, output: Path, onnx_path: Path | None, axis: str, workloads: tuple[str, ...], levels: str,
    rounds: int, seconds: float,
) -> None:  # fmt: skip
    """Measure the served MODEL of REPO against sessions in process, and write the ratios."""
    folder = version_folder(repo, model)
    manifest = Manifest.read(folder)
    if axis not in {a.name for a in manifest.signature.axes}:
        raise InputMismatch(f"{model} has no axis {axis!r}", next_step="name its length with --axis")
    peer = onnx_path or folder / manifest.filename
    if onnx_path is None and manifest.format != "onnx":
        raise click.UsageError(f"{model} is packaged as {manifest.format}: give its ONNX file with --onnx")
    results: dict[str, Any] = {}
    with (
        quiet() as load,
        serve(repo, http_port=0, grpc_port=0, metrics_port=0, progress=console.progress(json_output=False)) as server,
    ):
        own = artifact(manifest, folder)
        for workload in workloads:
            requests = requests_of(manifest, axis, WORKLOADS[workload])
            entries = []
            for clients in (int(part) for part in levels.split(",")):
                tried = best_ort_threads(peer, requests, clients)
                peers = {"served": served(server.grpc, manifest), "ort": ort(peer, next(iter(tried))), "artifact": own}
                entry = compare(peers, requests, clients, rounds=rounds, seconds=seconds)
                entry["ort_intra_op_threads"] = {"used": next(iter(tried)), "tried_requests_per_second": tried}
                entries.append(entry)
                show(workload, entry)
            results[workload] = {"lengths": list(WORKLOADS[workload]), "levels": entries}
        runs_as = str(server.served[model])
    report = {
        "what": "served model against sessions in process, batch-1 requests, closed loop; ratios served/peer, medians",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "load_average": load,
        "model": {"name": model, "version": manifest.version, "format": manifest.format, "served_as": runs_as,
                  "files": dict(manifest.files), "settings": dict(manifest.settings)},
        "ort": {"sha256": sha256(peer)},
        "rounds": rounds,
        "seconds": seconds,
        "workloads": results,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2, default=list) + "\n")
    console.err.print(f"written: {output}")


def show(workload: str, entry: Mapping[str, Any]) -> None:
    rows = []
    for name, found in entry["peers"].items():
        ratio = entry["ratios"].get(f"served_to_{name}")
        against = (f"{ratio['requests_per_second']:.2f}", f"{ratio['p99']:.2f}") if ratio else ("-", "-")
        figures = (f"{found[key]:.2f}" for key in ("requests_per_second", "p50_ms", "p99_ms", "cores"))
        rows.append((name, *figures, *against))
    columns = ("peer", "requests/s", "p50 ms", "p99 ms", "cores here", "served/peer req/s", "served/peer p99")
    console.table(columns, rows, title=f"{workload}, {entry['clients']} clients")


if __name__ == "__main__":
    main()
