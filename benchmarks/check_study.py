"""How often `kpdeploy check` errs: a version against itself, and against itself with 10 % more work in every call (a
busy loop of a tenth of the processor time that it took), many times each. A study that was stopped goes on where it
was; a run that was cut off is made again.

    python benchmarks/check_study.py models/ -o benchmarks/results/check_study.json --runs 50 --seconds 20 --load 1

`--load` processes compute now and then meanwhile (random bursts, half of the time). What else ran on the machine shows
in the load average of each run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from kpdeploy import __version__
from kpdeploy.baseline import Baseline
from kpdeploy.cli.bench import parse_shape
from kpdeploy.hardware import environment
from kpdeploy.monitoring.check import Side, check_versions
from kpdeploy.monitoring.regression import Criteria
from kpdeploy.runtimes import source
from kpdeploy.serving.repository import find_deployment

SLOWER = """
import importlib.util
import time

spec = importlib.util.spec_from_file_location("original", {original!r})
original = importlib.util.module_from_spec(spec)
spec.loader.exec_module(original)


def load(path, *, inputs, outputs, settings):
    run = original.load(path, inputs=inputs, outputs=outputs, settings=settings)

    def slower(arrays):
        start = time.process_time()
        result = run(arrays)
        end = time.process_time() + {share} * (time.process_time() - start)
        while time.process_time() < end:
            pass
        return result

    return slower
"""
BURSTS = """
import random, time
while True:
    end = time.perf_counter() + random.expovariate(2)
    while time.perf_counter() < end:
        pass
    time.sleep(random.expovariate(2))
"""


@contextlib.contextmanager
def load(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BURSTS]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def one_run(side: Side, other: Side, *, seconds: float, points: list[dict[str, int]]) -> dict[str, Any]:
    before = os.getloadavg()[0]
    report = check_versions(other, side, criteria=Criteria(), seconds=seconds, points=points)
    return {
        "outcome": report.outcome,
        "seconds": round(report.seconds, 1),
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
        "findings": {
            f.what: {
                "outcome": f.judgement.outcome,
                "ratio": round(f.judgement.ratio, 4),
                "bounds": [round(f.judgement.low, 4), round(f.judgement.high, 4)],
                "p": f.judgement.p,
                "windows": f.judgement.windows,
                "old": round(f.old, 2),
                "reason": f.judgement.reason,
            }
            for f in report.findings
        },
    }


@click.command()
@click.argument("repo")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--model")
@click.option("--runs", default=50, show_default=True, help="Of each kind.")
@click.option("--seconds", default=30.0, show_default=True, help="Of each run.")
@click.option("--slowdown", default=0.10, show_default=True)
@click.option("--load", "loads", default=0, show_default=True)
@click.option("--shape", "points", multiple=True, help="Such as batch=1,seq=128.  [default: those of the command]")
@click.option("--minutes", type=float, default=float("inf"), help="Begin no run later than this.")
def main(
    repo: str, output: Path, model: str | None, runs: int, seconds: float, slowdown: float, loads: int,
    points: tuple[str, ...], minutes: float,
) -> None:  # fmt: skip
    end = time.monotonic() + minutes * 60
    deployment = find_deployment(repo, model)
    folder = Path(deployment.folder)
    same = Side(name="itself", folder=folder, manifest=deployment.manifest, baseline=Baseline.read(folder))
    study: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"itself": [], "slower": []}
    study |= {
        "what": f"kpdeploy check of {deployment.model} ({deployment.manifest.format}) against itself, and against "
        f"itself with {slowdown:.0%} more work in every call; the load average says what else ran",
        "kpdeploy": __version__,
        "environment": environment(),
        "budget_seconds": seconds,
        "points": list(points),
        "own_load_processes": loads,
    }
    chosen = [parse_shape(None, None, text) for text in points]
    with tempfile.TemporaryDirectory() as scratch, load(loads):
        runtime = Path(scratch) / "slower.py"
        runtime.write_text(SLOWER.format(original=str(source(deployment.manifest.format)), share=slowdown))
        slower = replace(same, name="slower", runtime_file=runtime)
        while min(len(study["itself"]), len(study["slower"])) < runs:
            kind = min(("itself", "slower"), key=lambda name: len(study[name]))
            if time.monotonic() > end:
                break
            found = one_run(same, slower if kind == "slower" else same, seconds=seconds, points=chosen)
            study[kind].append(found)
            study["outcomes"] = {
                name: dict(Counter(r["outcome"] for r in study[name])) for name in ("itself", "slower")
            }
            part = output.with_suffix(".part")
            part.write_text(json.dumps(study, indent=1) + "\n")
            part.replace(output)
            print(kind, len(study[kind]), found["outcome"], found["seconds"], study["outcomes"], flush=True)


if __name__ == "__main__":
    main()
