"""The served model against calling a session in process: requests/s and p99 at several numbers of clients.

    kpdeploy export minilm --repo models/
    kpdeploy export minilm --repo models/ --format onnx --name minilm_onnx
    python benchmarks/served.py models/ --model minilm --ort-model minilm_onnx \\
        -o benchmarks/results/served_minilm_cpu.json

The peers answer the same tensors on the same machine, in interleaved rounds (the median of the rounds counts):

    served       kpdeploy serve and a closed loop over gRPC; the load generator shares the machine with the server
    ort          one ONNX Runtime session called by as many threads as there are clients, with the best of several
                 intra-op settings at that number of clients
    ort_default  the same with ONNX Runtime's own intra-op setting, where another one was the best
    artifact     the artifact that is served, in its own runtime in this process, one call at a time

Every request is of batch 1, as its client has it. `sentences` are real ones, tokenized, of the lengths that they have;
`one_length` has requests of 32 tokens throughout. Before anything is timed all peers must give the same answers.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import itertools
import json
import os
import re
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
import psutil

from kpdeploy import __version__
from kpdeploy.artifact import Manifest, located, sha256
from kpdeploy.bench.loops import closed
from kpdeploy.bench.report import Latencies
from kpdeploy.bench.wire import GrpcWire
from kpdeploy.cli import console
from kpdeploy.compare import relative_error
from kpdeploy.errors import InputMismatch
from kpdeploy.hardware import environment
from kpdeploy.inputs import Array, lead_axis, sample
from kpdeploy.load.examples import minilm_folder
from kpdeploy.runtimes import onnx
from kpdeploy.serving.client import connect
from kpdeploy.serving.repository import find_deployment
from kpdeploy.serving.triton.server import Server, serve

COUNT = 256
"""Requests of a workload: enough that the batches that form are new ones all the time."""
ONE_LENGTH = 32
WORKLOADS = ("sentences", "one_length")
SAME = 2e-5
"""Two artifacts that were each proven within 1e-5 of the unmodified model are this close to each other."""
TIMEOUT_SECONDS = 60.0
WARMUP_SECONDS = 0.5
CALIBRATION_SECONDS = 1.5

Tensors = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Window:
    """One measurement of one peer. `cpu_ms` is what one request cost in all processes: for `served` the generator, the
    server and what runs the model."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    cpu_ms: float


Measure = Callable[[Sequence[Tensors], int, float], Window]
"""measure(requests, clients, seconds)"""
Call = Callable[[Sequence[Array]], Sequence[Array]]
"""call(arrays in call order)"""


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants so far."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def served(server: Server, manifest: Manifest) -> Measure:
    names = dict(zip((spec.name for spec in manifest.signature.inputs), manifest.input_names, strict=True))

    async def run(requests: Sequence[Tensors], clients: int, seconds: float) -> Window:
        renamed = [{names[name]: array for name, array in tensors.items()} for tensors in requests]
        wire = GrpcWire(server.grpc, manifest.model, renamed, TIMEOUT_SECONDS)
        try:
            await closed(wire, clients, WARMUP_SECONDS)
            busy = cpu_seconds(server.process.pid)
            row = await closed(wire, clients, seconds)
            busy = cpu_seconds(server.process.pid) - busy + row.generator_cores * row.seconds
        finally:
            await wire.close()
        if row.failed:
            raise click.ClickException(f"{row.failed} requests failed: {next(iter(row.errors))}")
        return Window(
            requests_per_second=row.throughput,
            p50_ms=row.latencies.p50_ms,
            p99_ms=row.latencies.p99_ms,
            requests=row.succeeded,
            cpu_ms=busy / row.succeeded * 1e3,
        )

    return lambda requests, clients, seconds: asyncio.run(run(requests, clients, seconds))


def in_process(call: Call) -> Measure:
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
            cpu_ms=(time.process_time() - busy) / len(taken) * 1e3,
        )

    def measure(requests: Sequence[Tensors], clients: int, seconds: float) -> Window:
        window(requests, clients, WARMUP_SECONDS)
        return window(requests, clients, seconds)

    return measure


def one_at_a_time(call: Call) -> Call:
    """The runtimes promise one call at a time (OpenVINO's request is busy while it runs)."""
    turn = threading.Lock()

    def locked(arrays: Sequence[Array]) -> Sequence[Array]:
        with turn:
            return call(arrays)

    return locked


@dataclass(frozen=True, kw_only=True)
class OrtFile:
    """The ONNX file of the same model, and its tensors in the order of the served model's signature."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@functools.cache
def ort_call(file: OrtFile, threads: int) -> Call:
    return onnx.load(str(file.path), inputs=file.inputs, outputs=file.outputs, settings={"threads": threads})


def ort(file: OrtFile, threads: int) -> Measure:
    return in_process(ort_call(file, threads))


def best_ort_threads(file: OrtFile, requests: Sequence[Tensors], clients: int) -> dict[int, float]:
    """Requests/s by intra-op threads, the best first; 0 is ONNX Runtime's own choice."""
    found = {n: ort(file, n)(requests, clients, CALIBRATION_SECONDS).requests_per_second for n in intra_op_candidates()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def intra_op_candidates() -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return sorted({0, 1, 2, max(1, cores // 2), cores})


def artifact_call(manifest: Manifest, folder: Path) -> Call:
    runtime = importlib.import_module(f"kpdeploy.runtimes.{manifest.format}")
    call: Call = runtime.load(
        str(folder / manifest.filename),
        inputs=manifest.input_names,
        outputs=manifest.output_names,
        settings=located(manifest.settings, folder),
    )
    return one_at_a_time(call)


def requests_of(manifest: Manifest, workload: str, axis: str) -> list[Tensors]:
    """Requests of batch 1; axes other than `axis` are at their smallest."""
    return sentences(manifest, axis) if workload == "sentences" else one_length(manifest, axis)


def one_length(manifest: Manifest, axis: str) -> list[Tensors]:
    rng = np.random.default_rng(0)
    signature = manifest.signature
    point = {a.name: a.min for a in signature.axes} | {lead_axis(signature): 1}
    limits = signature.axis(axis)
    point[axis] = min(max(ONE_LENGTH, limits.min), limits.max)
    # The masks are full: the first row of a sample's is.
    return [sample(signature, point, rng) for _ in range(COUNT)]


def sentences(manifest: Manifest, axis: str) -> list[Tensors]:
    """Sentences of Python's language reference in a mixed order, in the word pieces of MiniLM's tokenizer."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    # Paragraphs of prose: code, grammar and lists are indented or marked.
    parts = itertools.chain.from_iterable(text.split("\n\n") for text in pydoc_data.topics.topics.values())
    prose = " ".join(" ".join(part.split()) for part in parts if part[:1].isalpha() and "\n   " not in part)
    found = [part for part in re.split(r"(?<=[.?!]) (?=[A-Z])", prose) if 2 < len(part.split()) < 60]
    chosen = np.random.default_rng(0).choice(found, COUNT, replace=False)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    longest = manifest.signature.axis(axis).max
    tokens = [tokenizer(str(part), truncation=True, max_length=longest, return_tensors="np") for part in chosen]
    specs = manifest.signature.inputs
    if missing := [spec.name for spec in specs if spec.name not in tokens[0]]:
        raise InputMismatch(
            f"the tokenizer makes no {missing[0]}, which {manifest.model} wants", next_step="use --workload one_length"
        )
    return [{spec.name: np.asarray(each[spec.name], dtype=spec.dtype) for spec in specs} for each in tokens]


def check_same(server: Server, manifest: Manifest, calls: Mapping[str, Call], requests: Sequence[Tensors]) -> float:
    """The largest difference between the server's answers and those of the calls in process; too large is an error."""
    worst = 0.0
    with connect(server.grpc) as client:
        for request in requests[:16]:
            answers = list(client.infer(manifest, request).values())
            for name, call in calls.items():
                for answer, other in zip(answers, call(list(request.values())), strict=True):
                    worst = max(worst, relative_error(np.asarray(other), answer))
                    if not worst <= SAME:
                        raise click.ClickException(f"{name} answers otherwise than the server, by {worst:.1e}")
    return worst


@contextmanager
def quiet() -> Iterator[dict[str, float]]:
    """The load of the machine before and after, in the file: a figure from a busy machine is none."""
    load = {"before": os.getloadavg()[0]}
    yield load
    load["after"] = os.getloadavg()[0]


def median(windows: Sequence[Window]) -> dict[str, Any]:
    names = ("requests_per_second", "p50_ms", "p99_ms", "cpu_ms")
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
    help="The ONNX file of the ort peer, in place of --ort-model.",
)
@click.option("--ort-model", help="The model of REPO whose ONNX file the ort peer runs.  [default: MODEL itself]")
@click.option("--axis", default="seq", show_default=True, help="The axis that the lengths are of.")
@click.option(
    "--workload", "workloads", multiple=True, type=click.Choice(WORKLOADS), default=WORKLOADS, show_default=True
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
    repo: Path, model: str, output: Path, onnx_path: Path | None, ort_model: str | None, axis: str,
    workloads: tuple[str, ...], levels: str, rounds: int, seconds: float,
) -> None:  # fmt: skip
    """Measure the served MODEL of REPO against sessions in process, and write the ratios."""
    deployment = find_deployment(str(repo), model)
    folder, manifest = Path(deployment.folder), deployment.manifest
    if axis not in {a.name for a in manifest.signature.axes}:
        raise InputMismatch(f"{model} has no axis {axis!r}", next_step="name its length with --axis")
    file = ort_file(str(repo), ort_model or model, onnx_path)
    results: dict[str, Any] = {}
    with (
        quiet() as load,
        serve(repo, http_port=0, grpc_port=0, metrics_port=0, progress=console.progress(json_output=False)) as server,
    ):
        own = artifact_call(manifest, folder)
        for workload in workloads:
            requests = requests_of(manifest, workload, axis)
            difference = check_same(server, manifest, {"ort": ort_call(file, 0), "artifact": own}, requests)
            entries = []
            for clients in (int(part) for part in levels.split(",")):
                tried = best_ort_threads(file, requests, clients)
                best = next(iter(tried))
                peers = {"served": served(server, manifest), "ort": ort(file, best), "artifact": in_process(own)}
                if best:
                    peers["ort_default"] = ort(file, 0)
                entry = compare(peers, requests, clients, rounds=rounds, seconds=seconds)
                entry["ort_intra_op_threads"] = {"used": best, "tried_requests_per_second": tried}
                entries.append(entry)
                show(workload, entry)
            lengths = [next(iter(request.values())).shape[-1] for request in requests]
            results[workload] = {"lengths": lengths, "largest_difference": difference, "levels": entries}
        runs_as = str(server.served[model])
    report = {
        "what": "served model against sessions in process, batch-1 requests, closed loop; ratios served/peer, medians",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "load_average": load,
        "model": {"name": model, "version": manifest.version, "format": manifest.format, "served_as": runs_as,
                  "padded_axes": manifest.padded_axes, "files": dict(manifest.files),
                  "settings": dict(manifest.settings)},
        "ort": {"file": file.path.name, "sha256": sha256(file.path)},
        "rounds": rounds,
        "seconds": seconds,
        "workloads": results,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2, default=list) + "\n")
    console.err.print(f"written: {output}")


def ort_file(repo: str, model: str, path: Path | None) -> OrtFile:
    deployment = find_deployment(repo, model)
    manifest = deployment.manifest
    if path is not None:
        names = [
            tuple(spec.name for spec in specs) for specs in (manifest.signature.inputs, manifest.signature.outputs)
        ]
        return OrtFile(path=path, inputs=names[0], outputs=names[1])
    if manifest.format != "onnx":
        raise click.UsageError(f"{model} is packaged as {manifest.format}: export it as ONNX too, and give --ort-model")
    path = Path(deployment.folder) / manifest.filename
    return OrtFile(path=path, inputs=manifest.input_names, outputs=manifest.output_names)


def show(workload: str, entry: Mapping[str, Any]) -> None:
    rows = []
    for name, found in entry["peers"].items():
        ratio = entry["ratios"].get(f"served_to_{name}")
        against = (f"{ratio['requests_per_second']:.2f}", f"{ratio['p99']:.2f}") if ratio else ("-", "-")
        figures = (f"{found[key]:.2f}" for key in ("requests_per_second", "p50_ms", "p99_ms", "cpu_ms"))
        rows.append((name, *figures, *against))
    columns = ("peer", "requests/s", "p50 ms", "p99 ms", "CPU ms/request", "served/peer req/s", "served/peer p99")
    console.table(columns, rows, title=f"{workload}, {entry['clients']} clients")


if __name__ == "__main__":
    main()
