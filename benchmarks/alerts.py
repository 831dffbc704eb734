"""Do the alerts come, how soon, do they resolve, and is there quiet when all is well? On real programs: tritonserver,
Prometheus, Alertmanager, a webhook.

    kpdeploy export minilm --repo models/
    python benchmarks/alerts.py inject models/ -o benchmarks/results/alerts.json
    python benchmarks/alerts.py quiet models/ --minutes 30 -o benchmarks/results/alerts_quiet.json

`inject` does one harm after the other to the model that is served, at the default intervals, and takes the seconds from
the harm to the webhook's "firing", and from its end to "resolved":

    latency         the model sleeps half as long again as it worked (+50 %)
    wrong_answers   the artifact is loaded with one weight changed
    killed_stub     the process that runs the model is killed (nobody loads it again for half a minute)
    wrong_version   the repository publishes the next version; the server keeps the last
    stopped_server  the server is stopped (SIGSTOP: it answers nothing), then goes on

`quiet` lets load of changing rate (none to a good part of what the machine can take) run beside the probe, and counts
the alerts: each is a false one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from kpdeploy.baseline import Baseline
from kpdeploy.bench.loops import opened
from kpdeploy.bench.wire import GrpcWire
from kpdeploy.cli import console
from kpdeploy.hardware import environment
from kpdeploy.monitoring.alerts import Intervals, Slo
from kpdeploy.monitoring.stack import receiver
from kpdeploy.pipeline import Watching, watch
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.triton import control

SLO = Slo(quantile=0.99, seconds=1.0, availability=0.99)
PATIENCE_SECONDS = 180.0
DELAY = '''

_load, _switch = load, __import__("pathlib").Path({switch!r})


def load(*arguments, **options):
    """The runtime's own, which sleeps a share of the time that it worked while the switch is there."""
    import time

    run = _load(*arguments, **options)

    def slower(arrays):
        start = time.perf_counter()
        out = run(arrays)
        if _switch.exists():
            time.sleep(float(_switch.read_text()) * (time.perf_counter() - start))
        return out

    return slower
'''


@dataclass
class Received:
    """What the webhook got: (time.monotonic, status, name), in order."""

    alerts: list[tuple[float, str, str]] = field(default_factory=list)

    def add(self, alert: dict[str, Any]) -> None:
        self.alerts.append((time.monotonic(), alert["status"], alert["labels"]["alertname"]))

    def await_(self, status: str, name: str, since: float) -> float | None:
        """Seconds from `since` to the first such alert; None after PATIENCE_SECONDS."""
        while time.monotonic() < since + PATIENCE_SECONDS:
            for moment, was, alert in list(self.alerts):
                if moment > since and (was, alert) == (status, name):
                    return round(moment - since, 1)
            time.sleep(0.2)
        return None


@dataclass
class Harm:
    """The served model, and what can be done to it."""

    repo: Path
    running: Watching
    model: str
    switch: Path

    @property
    def overlay(self) -> Path:
        (folder,) = (self.running.server.log.parent / "repository" / self.model).glob("[0-9]*")
        return folder

    def load(self) -> None:
        # Triton loads a model again only if one of its files was touched.
        os.utime(self.overlay / "model.py")
        control.load(self.running.server.http, self.model, timeout_s=60)

    @contextmanager
    def latency(self) -> Iterator[None]:
        self.switch.write_text("0.5")
        yield
        self.switch.unlink()

    @contextmanager
    def wrong_answers(self) -> Iterator[None]:
        """The same artifact with one weight changed, loaded in place of the proven one."""
        described = self.overlay / "artifact.json"
        right = described.read_text()
        artifact = json.loads(right)
        folder = self.repo.parent / "flipped"
        shutil.copytree(Path(artifact["path"]).parent, folder, dirs_exist_ok=True)
        weights = max((p for p in folder.iterdir() if p.suffix not in (".so", ".npz")), key=lambda p: p.stat().st_size)
        flip_one_weight(weights)
        artifact["path"] = str(folder / Path(artifact["path"]).name)
        described.write_text(json.dumps(artifact))
        self.load()
        yield
        described.write_text(right)
        self.load()

    @contextmanager
    def killed_stub(self) -> Iterator[None]:
        for pid in self.running.server.process.stubs():
            os.kill(pid, signal.SIGKILL)
        yield
        self.load()

    @contextmanager
    def wrong_version(self) -> Iterator[None]:
        """The repository commits to a version that the server does not load."""
        model = self.repo / self.model
        config = (model / "config.pbtxt").read_text()
        (version,) = (d.version for d in read_repository(str(self.repo)) if d.model == self.model)
        shutil.copytree(model / str(version), model / str(version + 1))
        manifest = json.loads((model / str(version + 1) / "manifest.json").read_text())
        (model / str(version + 1) / "manifest.json").write_text(json.dumps({**manifest, "version": version + 1}))
        (model / "config.pbtxt").write_text(config.replace(f"versions: {version}", f"versions: {version + 1}"))
        yield
        (model / "config.pbtxt").write_text(config)
        shutil.rmtree(model / str(version + 1))

    @contextmanager
    def stopped_server(self) -> Iterator[None]:
        family = [psutil.Process(self.running.server.process.pid)]
        family += family[0].children(recursive=True)
        for process in family:
            process.suspend()
        yield
        for process in reversed(family):
            process.resume()


def flip_one_weight(path: Path) -> None:
    """The largest sane float32 late in a file, changes its sign: before come embeddings,
    of which a golden request looks up a few."""
    data = bytearray(path.read_bytes())
    place = len(data) * 9 // 10 // 4 * 4
    part = np.frombuffer(data, np.float32, count=min(65536, (len(data) - place) // 4), offset=place).copy()
    sane = np.where(np.isfinite(part) & (np.abs(part) < 10), np.abs(part), 0)
    where = int(np.argmax(sane))
    part[where] = -part[where]
    data[place : place + part.nbytes] = part.tobytes()
    path.write_bytes(data)


HARMS: dict[str, tuple[str, Callable[[Harm], Any], float]] = {
    "latency": ("KpdeployLatencyRegressed", Harm.latency, 90),
    "wrong_answers": ("KpdeployWrongAnswers", Harm.wrong_answers, 45),
    "killed_stub": ("KpdeployStubDead", Harm.killed_stub, 45),
    "wrong_version": ("KpdeployWrongArtifact", Harm.wrong_version, 45),
    "stopped_server": ("KpdeployServerDown", Harm.stopped_server, 45),
}


@contextmanager
def running(repo: Path, received: Received, rate: float, scrape: int, intervals: Intervals | None) -> Iterator[Harm]:
    """A copy of the repository, served and watched, with its switch for latency."""
    with tempfile.TemporaryDirectory(prefix="kpdeploy-alerts-") as folder:
        copy = Path(folder) / "models"
        shutil.copytree(repo, copy)
        switch = Path(folder) / "slower"
        with (
            receiver(received.add) as webhook,
            watch(
                str(copy), slo=SLO, webhook=webhook, rate=rate, scrape_seconds=scrape, intervals=intervals,
                window_seconds=max(1.0, 15 / rate), revive=False, progress=console.progress(json_output=False),
            ) as watching,
        ):  # fmt: skip
            (model,) = watching.server.served
            harm = Harm(repo=copy, running=watching, model=model, switch=switch)
            with (harm.overlay / "runtime.py").open("a") as runtime:
                runtime.write(DELAY.format(switch=str(switch)))
            harm.load()
            yield harm


@click.group()
def main() -> None:
    """Alerts end to end."""
    # Whoever ends this ends the servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


@main.command()
@click.argument("repo", type=click.Path(exists=True, path_type=Path))
@click.option("--rate", default=1.0)
@click.option("--scrape-seconds", default=5)
@click.option("--settle-seconds", default=75.0, help="Quiet before each harm.")
@click.option("--only", multiple=True, type=click.Choice([*HARMS]))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def inject(
    repo: Path, rate: float, scrape_seconds: int, settle_seconds: float, only: tuple[str, ...], output: Path
) -> None:
    """Seconds from each harm to its alert, and from its end to the alert's."""
    received, rows = Received(), []
    with running(repo, received, rate, scrape_seconds, None) as harm:
        for name in only or HARMS:
            alert, do, limit = HARMS[name]
            time.sleep(settle_seconds)
            start = time.monotonic()
            with do(harm):
                start = start if name != "wrong_answers" else time.monotonic()
                fired = received.await_("firing", alert, start)
            end = time.monotonic()
            resolved = received.await_("resolved", alert, end) if fired is not None else None
            others = sorted(
                {n for moment, status, n in received.alerts if moment > start and status == "firing"} - {alert}
            )
            row = {
                "harm": name,
                "alert": alert,
                "limit_s": limit,
                "fired_s": fired,
                "resolved_s": resolved,
                "also": others,
            }
            rows.append(row)
            console.err.print(json.dumps(row))
    _write(output, {"rate": rate, "scrape_seconds": scrape_seconds, "rows": rows})
    if any(row["fired_s"] is None or row["fired_s"] > row["limit_s"] or row["resolved_s"] is None for row in rows):
        raise SystemExit("an alert came late, or not, or did not resolve")


@main.command()
@click.argument("repo", type=click.Path(exists=True, path_type=Path))
@click.option("--minutes", default=30.0)
@click.option("--rate", default=1.0)
@click.option("--most", default=20.0, help="The highest rate of the load, in requests/s.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def quiet(repo: Path, minutes: float, rate: float, most: float, output: Path) -> None:
    """How many alerts come while nothing is wrong."""
    received, machine = Received(), []
    with running(repo, received, rate, 5, None) as harm:
        start = time.monotonic()
        done = threading.Event()

        def look() -> None:
            while not done.wait(15):
                at = {"s": round(time.monotonic() - start), "busy": psutil.cpu_percent() / 100}
                for name in ("latency_ratio:long", "own_latency_ratio:short", "own_latency_ratio:long"):
                    found = harm.running.stack.query(f"kpdeploy:{name}")
                    at[name] = round(float(found[0]["value"][1]), 3) if found else None
                pending = harm.running.stack.query("ALERTS")
                at["alerts"] = [f"{a['metric']['alertname']} {a['metric']['alertstate']}" for a in pending]
                machine.append(at)
                _write(output, {"minutes": minutes, "fired": received.alerts, "machine": machine})

        threading.Thread(target=look, daemon=True).start()
        levels = asyncio.run(load(harm, minutes * 60, most))
        done.set()
    fired = [name for _, status, name in received.alerts if status == "firing"]
    _write(output, {"minutes": minutes, "rate": rate, "levels": levels, "fired": fired, "machine": machine})
    if fired:
        raise SystemExit(f"false alerts: {', '.join(fired)}")


async def load(harm: Harm, seconds: float, most: float) -> list[dict[str, float]]:
    """Open loops of half a minute to two, each at another rate, some of none."""
    (deployment,) = read_repository(str(harm.repo))
    rng = np.random.default_rng(5)
    golden = Baseline.read(Path(deployment.folder)).exchanges
    requests = [dict(e.inputs) for e in golden]
    names = dict(
        zip((s.name for s in deployment.manifest.signature.inputs), deployment.manifest.input_names, strict=True)
    )
    wire = GrpcWire(harm.running.server.grpc, harm.model, [{names[n]: a for n, a in r.items()} for r in requests], 30)
    levels: list[dict[str, float]] = []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1:
        length, rate = min(left, float(rng.uniform(30, 120))), float(rng.choice([0, 0.1, 0.25, 0.5, 1.0])) * most
        if rate:
            row = await opened(wire, rate, length)
            levels.append({"rate": rate, "seconds": length, "p50_ms": row.latencies.p50_ms, "failed": row.failed})
        else:
            await asyncio.sleep(length)
            levels.append({"rate": 0, "seconds": length})
    await wire.close()
    return levels


def _write(output: Path, found: dict[str, Any]) -> None:
    output.write_text(json.dumps({**found, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
