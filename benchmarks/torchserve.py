"""MiniLM on TorchServe and on Triton: our archive, and what a user of the stock archiver makes of the same file.

    python benchmarks/torchserve.py STORE -o benchmarks/results/torchserve_minilm_cpu.json

STORE is a repository of `kpdeploy export minilm --target torchserve` with two models: `minilm`, which is served on both
servers, and `minilm_ts` (--format torchscript --fuse never), whose very file the stock archive holds. All servers run
during the whole run; in each round each peer has its window, starting with another one each time.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from kpdeploy import __version__
from kpdeploy.artifact import BASELINE, GOLDEN, Manifest
from kpdeploy.bench.loops import closed
from kpdeploy.bench.report import Row
from kpdeploy.bench.wire import GrpcWire, HttpWire
from kpdeploy.cli import console
from kpdeploy.deployment import Deployment
from kpdeploy.hardware import environment
from kpdeploy.inputs import Tensors, middle_point, sample
from kpdeploy.progress import Progress
from kpdeploy.serving import serve
from kpdeploy.serving.repository import find_deployment
from kpdeploy.serving.torchserve.archive import archive_name, unpack_artifact
from kpdeploy.serving.torchserve.environment import ensure_environment
from kpdeploy.serving.torchserve.server import running_archives
from kpdeploy.serving.triton.repository import publish

TIMEOUT_SECONDS = 60
WARMUP_SECONDS = 1
COUNT = 32

STOCK_HANDLER = """
import torch
from ts.torch_handler.base_handler import BaseHandler

class Stock(BaseHandler):
    def preprocess(self, data):
        rows = [row.get("body") or row.get("data") for row in data]
        names = ("input_ids", "attention_mask")
        return [torch.tensor([part for row in rows for part in row[name]]) for name in names]

    def inference(self, data):
        with torch.inference_mode():
            return self.model(*data)

    def postprocess(self, data):
        data = data[0] if isinstance(data, (tuple, list)) else data
        return [[row] for row in data.tolist()]
"""


class JsonWire(HttpWire):
    """The same requests as JSON, to /predictions."""

    def __init__(self, url: str, model: str, requests: list[Tensors], *, token: str) -> None:
        super().__init__(url, model, requests, TIMEOUT_SECONDS, token=token)
        self._address = f"http://{url}/predictions/{model}"
        kind = {"Content-Type": "application/json"}
        self._bodies = [(json.dumps({n: a.tolist() for n, a in r.items()}).encode(), kind) for r in requests]


def requests_of(manifest: Manifest, seq: int) -> list[Tensors]:
    import numpy as np

    rng = np.random.default_rng(0)
    point = {**middle_point(manifest.signature, batch=1), "seq": seq}
    return [sample(manifest.signature, point, rng) for _ in range(COUNT)]


def unpacked(deployment: Deployment, folder: Path) -> Path:
    """The artifact's files of a version, and its baseline."""
    place = Path(deployment.folder)
    unpack_artifact(place / archive_name(deployment.model), folder)
    for name in (GOLDEN, BASELINE):
        (folder / name).write_bytes((place / name).read_bytes())
    return folder


def stock_archive(deployment: Deployment, folder: Path) -> Path:
    """What the stock archiver makes of the same file, with the usual handler and the same batches."""
    files = unpacked(deployment, folder / "stock")
    (folder / "stock.py").write_text(STOCK_HANDLER)
    with zipfile.ZipFile(Path(deployment.folder) / archive_name(deployment.model)) as archive:
        (folder / "model-config.yaml").write_bytes(archive.read("model-config.yaml"))
    command = [*ensure_environment(Progress()).archiver, "--model-name", "stock", "--version", "1.0"]
    command += ["--serialized-file", str(files / deployment.manifest.filename), "--handler", "stock.py"]
    command += ["--config-file", "model-config.yaml"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "stock.mar"


def window(make: Any, clients: int, seconds: float) -> Row:
    async def run() -> Row:
        wire = make()
        try:
            await closed(wire, clients, WARMUP_SECONDS)
            return await closed(wire, clients, seconds)
        finally:
            await wire.close()

    row = asyncio.run(run())
    if row.failed:
        raise click.ClickException(f"{row.failed} requests failed: {next(iter(row.errors))}")
    return row


def summary(rows: list[Row]) -> dict[str, Any]:
    return {
        "requests_per_second": statistics.median(row.throughput for row in rows),
        "p50_ms": statistics.median(row.latencies.p50_ms for row in rows),
        "p99_ms": statistics.median(row.latencies.p99_ms for row in rows),
        "rounds": [{"requests_per_second": r.throughput, "p99_ms": r.latencies.p99_ms} for r in rows],
    }


@click.command()
@click.argument("store", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON to write.")
@click.option("--seq", default=32, show_default=True, help="The length of each request.")
@click.option("--clients", "levels", default="1,8", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=3.0, show_default=True)
def main(store: Path, output: Path, seq: int, levels: str, rounds: int, seconds: float) -> None:
    """Measure all peers in one run, and write the ratios."""
    ours, script = (find_deployment(str(store), name) for name in ("minilm", "minilm_ts"))
    requests = requests_of(ours.manifest, seq)
    load = {"before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as place, ExitStack() as held:
        folder = Path(place)
        publish(str(folder / "models"), replace(ours.manifest, target="triton"), unpacked(ours, folder / "files"))
        free: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        archives = [Path(d.folder) / archive_name(d.model) for d in (ours, script)]
        archives.append(stock_archive(script, folder))
        torchserve = held.enter_context(running_archives(archives, ready_timeout_s=300))
        triton = held.enter_context(serve(folder / "models", ready_timeout_s=300, **free))
        url, token = torchserve.http, torchserve.token
        peers: Mapping[str, Any] = {
            "torchserve": lambda: HttpWire(url, "minilm", requests, TIMEOUT_SECONDS, token=token),
            "torchserve_json": lambda: JsonWire(url, "minilm", requests, token=token),
            "same_file_json": lambda: JsonWire(url, "minilm_ts", requests, token=token),
            "stock_json": lambda: JsonWire(url, "stock", requests, token=token),
            "triton_http": lambda: HttpWire(triton.http, "minilm", requests, TIMEOUT_SECONDS),
            "triton_grpc": lambda: GrpcWire(triton.grpc, "minilm", requests, TIMEOUT_SECONDS),
        }
        found = [measured(peers, int(clients), rounds=rounds, seconds=seconds) for clients in levels.split(",")]
    report = {
        "what": "MiniLM, batch-1 requests, closed loop, medians of rounds; torchserve*: our archive; same_file_json: "
        "our handler on the TorchScript file of stock_json, which a BaseHandler serves; triton*: kpdeploy serve",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "load_average": {**load, "after": os.getloadavg()[0]},
        "seq": seq,
        "models": {
            d.model: {"format": d.manifest.format, "settings": dict(d.manifest.settings)} for d in (ours, script)
        },
        "rounds": rounds,
        "seconds": seconds,
        "levels": found,
    }
    output.write_text(json.dumps(report, indent=2, default=list) + "\n")
    console.err.print(f"written: {output}")


def measured(peers: Mapping[str, Any], clients: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    rows: dict[str, list[Row]] = {name: [] for name in peers}
    names = list(peers)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rows[name].append(window(peers[name], clients, seconds))
    found = {name: summary(taken) for name, taken in rows.items()}
    shown = [(n, *(f"{f[k]:.1f}" for k in ("requests_per_second", "p50_ms", "p99_ms"))) for n, f in found.items()]
    console.table(("peer", "requests/s", "p50 ms", "p99 ms"), shown, title=f"{clients} clients")
    pairs = (("same_file_json", "stock_json"), ("torchserve_json", "stock_json"), ("torchserve", "triton_http"))
    ratios = {
        f"{one}_to_{other}": {
            key: found[one][key] / found[other][key] for key in ("requests_per_second", "p50_ms", "p99_ms")
        }
        for one, other in pairs
    }
    return {"clients": clients, "ratios": ratios, "peers": found}


if __name__ == "__main__":
    main()
