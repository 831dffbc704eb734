"""Which detector: false positives and power of each, over simulated series and over real ones.

    python benchmarks/detectors.py -o benchmarks/results/detectors.json --series 500
    python benchmarks/detectors.py record models/ -o benchmarks/recorded_windows.json     # real series of this machine

A simulated series is 120 window medians: noise of 3 % that lasts over windows (AR(1), rho = .7), 1 % of windows that a
spike hits, and from window 60 on a shift (0: none). The recorded ones are window medians of two processes that ran the
same model in turns, by the clock and by processor time; a shift is multiplied onto the second half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from kpdeploy import __version__
from kpdeploy.hardware import environment
from kpdeploy.monitoring.regression import Criteria, first_alarm, judge, judge_pairs, mann_whitney

SHIFTS = (0.0, 0.05, 0.10, 0.20)
WINDOWS, HALF = 120, 60
NOISE, RHO, SPIKES = 0.03, 0.7, 0.01
CRITERIA = Criteria()
RECORDED = Path(__file__).with_name("recorded_windows.json")

Series = Sequence[float]


def simulated(rng: np.random.Generator, shift: float) -> list[float]:
    steps = rng.normal(0, NOISE * np.sqrt(1 - RHO**2), WINDOWS)
    noise = [rng.normal(0, NOISE)]
    for step in steps[1:]:
        noise.append(RHO * noise[-1] + step)
    values = 20 * np.exp(noise)
    values[rng.random(WINDOWS) < SPIKES] *= rng.uniform(1.5, 3)
    values[HALF:] *= 1 + shift
    return [float(value) for value in values]


def ratio(series: Series) -> float:
    return float(np.median(series[-20:]) / np.median(series[:HALF]))


def one_look(series: Series) -> bool:
    return judge(series[:HALF], series[-20:], CRITERIA).outcome == "regressed"


def watched(series: Series) -> bool:
    return first_alarm(series[:HALF], series[HALF:], CRITERIA) is not None


def watched_uncorrected(series: Series) -> bool:
    ends = range(HALF + 20, WINDOWS + 1, 5)
    return any(judge(series[:HALF], series[end - 20 : end], CRITERIA).outcome == "regressed" for end in ends)


def rank_test_alone(series: Series) -> bool:
    return mann_whitney(np.log(series[:HALF]), np.log(series[-20:])) < 0.001


DETECTORS: dict[str, Callable[[Series], bool]] = {
    "threshold 1.25": lambda series: ratio(series) > 1.25,
    "threshold 1.10": lambda series: ratio(series) > 1.10,
    "Mann-Whitney alone, p < .001": rank_test_alone,
    "Mann-Whitney and effect, every 5 windows, uncorrected": watched_uncorrected,
    "kpdeploy, one look": one_look,
    "kpdeploy, watched: every 5 windows, 3 in a row": watched,
}
OURS = tuple(name for name in DETECTORS if name.startswith("kpdeploy"))


def pairs_regressed(old: Series, new: Series, *, looks: int) -> bool:
    criteria = Criteria(looks=looks)
    ends = np.linspace(24, len(old), looks).astype(int) if looks > 1 else [len(old)]
    blocks = [index // 12 for index in range(len(old))]
    return any(judge_pairs(old[:e], new[:e], criteria, blocks=blocks[:e]).outcome == "regressed" for e in ends)


def on_simulated(count: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """The share of series in which each detector sees a regression, by shift."""
    found: dict[str, dict[str, float]] = {name: {} for name in DETECTORS}
    for shift in SHIFTS:
        rng = np.random.default_rng([seed, round(shift * 100)])
        drawn = [simulated(rng, shift) for _ in range(count)]
        for name, detector in DETECTORS.items():
            found[name][f"{shift:.0%}"] = round(float(np.mean([detector(series) for series in drawn])), 4)
    return found


def on_recorded(path: Path = RECORDED) -> dict[str, Any]:
    """The same over real series: pairs that were measured in turns, looked at once and eight times."""
    recorded = json.loads(path.read_text())["series"]
    found: dict[str, Any] = {"series": len(recorded)}
    for clock in ("clock", "processor"):
        for looks in (1, 8):
            found[f"pairs by {clock}, {looks} look{'s' * (looks > 1)}"] = {
                f"{shift:.0%}": round(
                    float(np.mean([
                        pairs_regressed(s[clock][0], np.multiply(s[clock][1], 1 + shift).tolist(), looks=looks)
                        for s in recorded
                    ])), 4,
                )
                for shift in SHIFTS
            }  # fmt: skip
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    rows = [f"{'detector':56} {'false positives':>16}   power at 5 / 10 / 20 %"]
    for name, shares in found.items():
        null, *power = shares.values()
        rows.append(f"{name:56} {null:>16.3f}   {' / '.join(f'{p:.2f}' for p in power)}")
    return "\n".join(rows)


@click.group(invoke_without_command=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--series", default=500, show_default=True)
@click.pass_context
def main(ctx: click.Context, output: Path | None, series: int) -> None:
    if ctx.invoked_subcommand is not None:
        return
    simulated_shares, real = on_simulated(series), on_recorded()
    print(table(simulated_shares))
    print(table({f"real: {name}": shares for name, shares in real.items() if name != "series"}))
    if output is not None:
        data = {
            "what": __doc__.strip().splitlines()[0] if __doc__ else "",
            "kpdeploy": __version__,
            "series_a_cell": series,
            "simulated": simulated_shares,
            "recorded": real,
        }
        output.write_text(json.dumps(data, indent=1) + "\n")


@main.command()
@click.argument("repo")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--count", default=24, show_default=True)
def record(repo: str, output: Path, count: int) -> None:
    """Record real series: two processes of one model in turns, 4 calls a window, 120 windows."""
    from kpdeploy.baseline import Baseline
    from kpdeploy.inputs import sample
    from kpdeploy.monitoring.check import Side
    from kpdeploy.serving.repository import find_deployment

    deployment = find_deployment(repo, None)
    folder = Path(deployment.folder)
    side = Side(name="", folder=folder, manifest=deployment.manifest, baseline=Baseline.read(folder))
    signature = deployment.manifest.signature
    point = {axis.name: min(axis.max, 1 if axis.name == "batch" else 16) for axis in signature.axes}
    request = list(sample(signature, point, np.random.default_rng(0)).values())
    found = []
    for _ in range(count):
        before = os.getloadavg()[0]
        with side.process(1) as first, side.process(1) as second:
            both: dict[str, list[list[float]]] = {"clock": [[], []], "processor": [[], []]}
            for window in range(WINDOWS):
                for index in (0, 1) if window % 2 else (1, 0):
                    times = (first, second)[index].time_both(request, seconds=0, at_least=4, warmup=0)
                    for name, values in zip(both, times, strict=True):
                        both[name][index].append(round(float(np.median(values)), 3))
        found.append({**both, "load_average": round(before, 2)})
        data = {"point": point, "model": deployment.model, "environment": environment(), "series": found}
        output.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        print(len(found), before, flush=True)


if __name__ == "__main__":
    main()
