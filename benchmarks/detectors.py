"""Which detector: false positives and power of each, over simulated series and over real ones.

    python benchmarks/detectors.py -o benchmarks/results/detectors.json --series 500
    python benchmarks/detectors.py record models/ -o benchmarks/recorded_windows.json     # real series of this machine

A simulated series is 120 window medians: noise of 3 % that lasts over windows (AR(1), rho = .7), 1 % of windows that a
spike hits, and from window 60 on a shift (0: none). The recorded ones are pairs as `kpdeploy check` takes them: one
model in two processes, call by call in turn, a fresh pair of processes for each block of windows; by the clock, and
without what the processes waited for a core. A shift is multiplied onto the second of each pair.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from kpdeploy import __version__
from kpdeploy.hardware import environment
from kpdeploy.monitoring.alerts import AUTOCORRELATION, SLOW_EFFECT, SLOW_HOLD_SECONDS, SLOW_WINDOWS, SLOW_Z
from kpdeploy.monitoring.check import BLOCK, LOOKS, processes_of
from kpdeploy.monitoring.regression import Criteria, first_alarm, judge, judge_pairs, mann_whitney
from kpdeploy.runtimes.process import RuntimeProcess

SHIFTS = (0.0, 0.05, 0.10, 0.20)
WINDOWS, HALF = 120, 60
NOISE, RHO, SPIKES = 0.03, 0.7, 0.01
CRITERIA = Criteria()
CALLS = 5
NAMES = {"clock": "the clock", "own": "own time"}
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
SLOW = "kpdeploy, the slow alert: an hour of windows, every minute"
OURS = (*(name for name in DETECTORS if name.startswith("kpdeploy")), SLOW)


def slow_alert(shift: float, count: int, seed: int = 0) -> float:
    """The share of series in which KpdeployLatencySlowlyRegressed fires: its rule (kpdeploy.monitoring.alerts), each
    minute for four hours after the shift, over one-minute windows that vary as those of `simulated`, against a baseline
    of 60 windows."""
    rng = np.random.default_rng([seed, round(shift * 100)])
    baseline = np.array([simulated(rng, 0)[:HALF] for _ in range(count)])
    middle = np.median(baseline, axis=1)
    spread = 1.4826 * np.median(abs(baseline - middle[:, None]), axis=1) / middle
    # Nobody knows the series beforehand: an hour without the shift, four with it.
    hours = [np.array([simulated(rng, 0) for _ in range(count)])[:, :HALF] * (1 + shift * (h > 0)) for h in range(5)]
    windows = np.hstack(hours) / middle[:, None]
    shrink = (1 - AUTOCORRELATION) / (1 + AUTOCORRELATION)
    held, fired = np.zeros(count), np.zeros(count, bool)
    for minute in range(SLOW_WINDOWS, windows.shape[1] + 1):
        hour = windows[:, max(0, minute - 60) : minute]
        low, median, high = np.quantile(hour, [0.25, 0.5, 0.75], axis=1)
        variance = 1.571 * ((high - low) / 1.349) ** 2
        error = variance / (shrink * hour.shape[1]) + 1.571 * spread**2 / (shrink * HALF) + 1e-6
        held = np.where(((median - 1) / np.sqrt(error) > SLOW_Z) & (median > SLOW_EFFECT), held + 1, 0)
        fired |= held * 60 > SLOW_HOLD_SECONDS
    return float(fired.mean())


def pairs_regressed(old: Series, new: Series, *, looks: int) -> bool:
    """At the last look alone, or as the gate: after the second block and each further one, until it is known."""
    criteria = Criteria(looks=looks)
    blocks = [index // BLOCK for index in range(len(old))]
    for end in range(2 * BLOCK, len(old) + 1, BLOCK) if looks > 1 else [len(old)]:
        outcome = judge_pairs(old[:end], new[:end], criteria, blocks=blocks[:end]).outcome
        if outcome != "unknown":
            return outcome == "regressed"
    return False


def on_simulated(count: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """The share of series in which each detector sees a regression, by shift."""
    found: dict[str, dict[str, float]] = {name: {} for name in DETECTORS}
    for shift in SHIFTS:
        rng = np.random.default_rng([seed, round(shift * 100)])
        drawn = [simulated(rng, shift) for _ in range(count)]
        for name, detector in DETECTORS.items():
            found[name][f"{shift:.0%}"] = round(float(np.mean([detector(series) for series in drawn])), 4)
        found.setdefault(SLOW, {})[f"{shift:.0%}"] = round(slow_alert(shift, count, seed), 4)
    return found


def on_recorded(path: Path = RECORDED) -> dict[str, Any]:
    """The same over real series: pairs that were measured in turns, looked at once, and as the gate does."""
    recorded = json.loads(path.read_text())["series"]
    found: dict[str, Any] = {"series": len(recorded)}
    for times in ("clock", "own"):
        for looks in (1, LOOKS):
            found[f"pairs by {NAMES[times]}, {'as the gate' if looks > 1 else 'one look'}"] = {
                f"{shift:.0%}": round(
                    float(np.mean([
                        pairs_regressed(s[times][0], np.multiply(s[times][1], 1 + shift).tolist(), looks=looks)
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


def record_block(pair: Sequence[RuntimeProcess], request: list[Any], both: dict[str, list[list[float]]]) -> None:
    for process in pair:
        process.time(request, seconds=0, at_least=1)
    for window in range(BLOCK):
        taken: dict[str, list[list[float]]] = {name: [[], []] for name in both}
        for _ in range(CALLS):
            for index in (0, 1) if window % 2 else (1, 0):
                times = pair[index].time_both(request, seconds=0, at_least=1, warmup=0)
                for name, values in zip(taken, times, strict=True):
                    taken[name][index] += values
        for name, sides in taken.items():
            for kept, values in zip(both[name], sides, strict=True):
                kept.append(round(float(np.median(values)), 3))


@main.command()
@click.argument("repo")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--count", default=24, show_default=True)
def record(repo: str, output: Path, count: int) -> None:
    """Record real series of one model at batch 1: LOOKS + 1 pairs of processes, BLOCK windows of CALLS calls each."""
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
        both: dict[str, list[list[float]]] = {"clock": [[], []], "own": [[], []]}
        for block in range(LOOKS + 1):
            with ExitStack() as held:
                record_block(processes_of(held, (side, side), 1, turned=block % 2 == 1), request, both)
        found.append({**both, "load_average": round(before, 2)})
        data = {"point": point, "model": deployment.model, "environment": environment(), "series": found}
        output.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        print(len(found), before, flush=True)


if __name__ == "__main__":
    main()
