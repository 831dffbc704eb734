"""Is the memory that is planned from small batches what the largest one takes?

    python benchmarks/memory_plans.py models/ -o benchmarks/results/memory_plans.json

Each model of the repository is planned anew (kpdeploy.pipeline.memory). Then a fresh process, which has seen no smaller
request, answers one of the largest batch at the largest sizes of all other axes; its largest resident size is what
counts. Within 15 % is the goal.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from levels import artifact_of

from kpdeploy import __version__
from kpdeploy.artifact import Manifest
from kpdeploy.cli import console
from kpdeploy.hardware import environment
from kpdeploy.inputs import sample
from kpdeploy.memory import size
from kpdeploy.pipeline.memory import plan_memory
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.serving.repository import read_repository

GOAL = 0.15


def compared(manifest: Manifest, folder: Path) -> dict[str, Any]:
    artifact = artifact_of(manifest, folder)
    plan = plan_memory(artifact, manifest.signature, rows=max(1, manifest.max_batch_size))
    with RuntimeProcess(artifact) as process:
        process.run(list(sample(manifest.signature, plan.point, np.random.default_rng(1)).values()))
        fresh = process.peak_bytes
    return {
        "model": manifest.model,
        "format": manifest.format,
        "settings": dict(manifest.settings),
        "plan": plan.to_json(),
        "planned_bytes": plan.instance_bytes(),
        "measured_bytes": fresh,
        "ratio": plan.instance_bytes() / fresh,
    }


@click.command()
@click.argument("repo")
@click.option("--only", multiple=True, metavar="TEXT", help="Only models whose name holds TEXT.")
@click.option("-o", "output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(repo: str, only: tuple[str, ...], output: Path) -> None:
    """Plan and measure every model of REPO."""
    found = []
    for deployment in read_repository(repo):
        if only and not any(text in deployment.model for text in only):
            continue
        entry = compared(deployment.manifest, Path(deployment.folder))
        found.append(entry)
        planned, measured = size(entry["planned_bytes"]), size(entry["measured_bytes"])
        console.out.print(f"{entry['model']} {entry['settings']}: planned {planned}, {measured}, {entry['ratio']:.3f}")
    report = {
        "what": "planned against measured largest resident size of one instance, at the largest request",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "goal": GOAL,
        "within_goal": all(abs(entry["ratio"] - 1) <= GOAL for entry in found),
        "models": found,
    }
    output.write_text(json.dumps(report, indent=1, default=list) + "\n")


if __name__ == "__main__":
    main()
