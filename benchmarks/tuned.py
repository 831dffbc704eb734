"""Does the layout that `--tune` chooses serve more than the plain one, in the real tritonserver?

    kpdeploy export minilm --repo models/ --format onnx --name plain
    kpdeploy export minilm --repo models/ --format onnx --name tuned --tune throughput
    python benchmarks/tuned.py models/ plain tuned -o benchmarks/results/tuned.json

One server runs all models of REPO; those that are named are loaded in turns, round by round, by a closed loop of
clients with requests of one row. The load generator shares the machine.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click

from kpdeploy import __version__, bench, serve
from kpdeploy.bench.report import Row
from kpdeploy.cli import console
from kpdeploy.hardware import environment
from kpdeploy.serving.repository import read_repository


@click.command()
@click.argument("repo")
@click.argument("models", nargs=-1, required=True)
@click.option("--clients", multiple=True, type=int, default=(1, 8, 32), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=4.0, show_default=True)
@click.option("-o", "output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(
    repo: str, models: tuple[str, ...], clients: tuple[int, ...], rounds: int, seconds: float, output: Path
) -> None:
    """Load MODELS of REPO in turns; the first is the plain one."""
    manifests = {d.model: d.manifest for d in read_repository(repo)}
    taken: dict[tuple[str, float], list[Row]] = {}
    with serve(repo) as server:
        for number in range(rounds):
            for model in models if number % 2 == 0 else reversed(models):
                found = bench(server.grpc, model=model, repo=repo, clients=clients, seconds=seconds, warmup_seconds=1)
                for row in found.rows:
                    taken.setdefault((model, row.level), []).append(row)
    rows = []
    for (model, level), several in taken.items():
        rates = [row.throughput for row in several]
        p50 = [row.latencies.p50_ms for row in several]
        plain = statistics.median(row.throughput for row in taken[models[0], level])
        rows.append(
            {
                "model": model,
                "clients": level,
                "requests_per_second": statistics.median(rates),
                "rounds": rates,
                "p50_ms": statistics.median(p50),
                "ratio_to_plain": statistics.median(rates) / plain,
            }
        )
        console.out.print(
            f"{model} {level} clients: {rows[-1]['requests_per_second']:.1f}/s, {rows[-1]['p50_ms']:.1f} ms"
        )
    report = {
        "what": "served requests/s of layouts, closed loop, requests of one row, same server and rounds",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "models": {
            name: {"settings": dict(m.settings), "serving": dict(m.serving), "tuning": dict(m.tuning)}
            for name, m in manifests.items()
            if name in models
        },
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=1, default=list) + "\n")


if __name__ == "__main__":
    main()
