"""How fast what passed is, and the windows of the baseline."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from kpdeploy.artifact import Latency
from kpdeploy.baseline import WINDOWS, Windows
from kpdeploy.inputs import Array, Tensors, lead_axis, measured_points, sample
from kpdeploy.pipeline.candidates import Candidate
from kpdeploy.progress import Progress
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.signature import Point, Signature

ROUNDS = 3


ROUND_SECONDS = 0.5


SLOWER = 1.2
"""A candidate that takes this times as long as the fastest in the first round is timed no more."""


WINDOW_MS = 60
"""The length of a window of the baseline, where two calls take no longer; a call slower than SLOW_MS is a window."""


SLOW_MS = 150


def time_here(answer: Callable[[Tensors], dict[str, Array]], signature: Signature, point: Point) -> Latency:
    inputs = sample(signature, point, np.random.default_rng(0))
    answer(inputs)
    taken: list[float] = []
    end = time.perf_counter() + ROUND_SECONDS
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        answer(inputs)
        taken.append((time.perf_counter() - start) * 1e3)
    return _latency(point, taken)


def _latency(point: Point, taken_ms: Sequence[float]) -> Latency:
    p50, p99 = np.percentile(taken_ms, [50, 99])
    return Latency(point=dict(point), p50_ms=round(float(p50), 4), p99_ms=round(float(p99), 4), calls=len(taken_ms))


def measure(
    candidates: Sequence[Candidate], signature: Signature, progress: Progress
) -> tuple[list[Candidate], tuple[Windows, ...]]:
    """Time all candidates that passed, round by round, so that a slow minute of the machine hits all alike; and the
    fastest until it has its windows. A candidate that is far behind after the first round is timed no more."""
    passed = [c for c in candidates if c.passed]
    points = measured_points(signature)
    taken: dict[tuple[int, int], list[float]] = {}
    windows: tuple[Windows, ...] = ()
    with ExitStack() as stack, progress.step("measuring what passed", total=ROUNDS * len(passed) + 1) as advance:
        processes = [stack.enter_context(RuntimeProcess(c.artifact)) for c in passed if c.artifact is not None]
        running = list(range(len(passed)))
        for _ in range(ROUNDS):
            for index in running:
                for where, point in enumerate(points):
                    times = _timed(processes[index], signature, point, seconds=ROUND_SECONDS, at_least=3)
                    taken.setdefault((index, where), []).extend(times)
                advance()
            scores = {i: math.prod(statistics.median(taken[i, w]) for w in range(len(points))) for i in running}
            running = [i for i in running if scores[i] <= min(scores.values()) * SLOWER ** len(points)]
        measured = [
            replace(c, latencies=tuple(_latency(p, taken[index, where]) for where, p in enumerate(points)))
            for index, c in enumerate(passed)
        ]
        if measured:
            best = min(range(len(measured)), key=lambda i: measured[i].score)
            known = [taken[best, where] for where in range(len(points))]
            windows = _windows(processes[best], signature, list(zip(points, known, strict=True)))
            advance()
    known_by = {id(c): m for c, m in zip(passed, measured, strict=True)}
    return [known_by.get(id(c), c) for c in candidates], windows


def _windows(
    process: RuntimeProcess, signature: Signature, known: Sequence[tuple[Point, Sequence[float]]]
) -> tuple[Windows, ...]:
    """The baseline's windows at each measured point, and at a short length beside it: what was timed already, and as
    many calls as are missing."""
    found = []
    short = [(_short(signature, point), ()) for point, _ in known]
    for point, times in [*known, *(entry for entry in short if entry[0] not in [p for p, _ in known])]:
        taken = list(times) or _timed(process, signature, point, seconds=0, at_least=3)
        usual = statistics.median(taken)
        calls = 1 if usual > SLOW_MS else max(2, min(20, round(WINDOW_MS / usual)))
        if (missing := WINDOWS * calls - len(taken)) > 0:
            taken += _timed(process, signature, point, seconds=0, at_least=missing)
        rows = point.get(lead_axis(signature), 1)
        found.append(Windows.of(taken, point=point, rows=rows, memory_bytes=process.peak_bytes))
    return tuple(found)


def _short(signature: Signature, point: Point) -> Point:
    """The same batch at an eighth of the usual length."""
    lead = lead_axis(signature)
    return {a.name: point[a.name] if a.name == lead else max(a.min, point[a.name] // 8) for a in signature.axes}


def _timed(
    process: RuntimeProcess, signature: Signature, point: Point, *, seconds: float, at_least: int
) -> list[float]:
    arrays = list(sample(signature, point, np.random.default_rng(0)).values())
    return process.time(arrays, seconds=seconds, at_least=at_least)
