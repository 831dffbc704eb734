"""How many instances run a model on this machine's cores, with how many threads each, and with which allocator:
measured under the kind of load that the user states, and written into the configuration."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.artifact import Artifact
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ProofFailed
from kpdeploy.hardware import usable_cores
from kpdeploy.hardware.allocators import installed_allocators
from kpdeploy.inputs import measured_points, sample
from kpdeploy.progress import Progress
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.signature import Point, Signature

LOADS = ("latency", "throughput")
"""`latency`: one caller with one request at a time. `throughput`: every instance always has a batch to answer."""

PASSES = 2
"""Each layout is measured so often, the last ones first in every second pass: what drifts meets all alike."""

SECONDS = 1.0

WORTH = 1.03
"""A layout or an allocator has to be this times as good as the plain one to be taken: less is noise."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`instances` processes of `threads` each; `allocator` is the path of a library that replaces malloc, or ""."""

    instances: int
    threads: int
    allocator: str = ""

    def __str__(self) -> str:
        kind = f" with {Path(self.allocator).name}" if self.allocator else ""
        many = f"{self.instances} instances" if self.instances > 1 else "1 instance"
        return f"{many} of {self.threads} thread{'s' * (self.threads > 1)}{kind}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a layout reached: the median of a call, and rows a second of all instances together. `peak_bytes` are those
    of all of them."""

    layout: Layout
    p50_ms: float
    rows_per_second: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The layout that was taken, all that were measured, and why."""

    load: str
    point: Point
    chosen: Measured
    measured: tuple[Measured, ...]
    decisions: tuple[Decision, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "load": self.load,
            "point": dict(self.point),
            "chosen": asdict(self.chosen),
            "measured": [asdict(entry) for entry in self.measured],
        }


def tune(artifact: Artifact, signature: Signature, load: str, progress: Progress, *, most_instances: int) -> Tuning:
    """Measure layouts of the artifact under a load; `most_instances` fit into memory.

    Raises:
        ProofFailed: the artifact cannot be run.
    """
    points = measured_points(signature)
    point = points[0] if load == "latency" else points[-1]
    layouts = list(layouts_of(int(usable_cores()), load, most_instances))
    found = _measure_all(artifact, signature, point, layouts, progress)
    plain = found[0]
    best = _best(found, load, plain)
    wanted = [replace(best.layout, allocator=path) for path in installed_allocators()]
    refused = {layout: _refusal(artifact, signature, point, layout) for layout in wanted}
    allocators = [layout for layout, reason in refused.items() if not reason]
    again = _measure_all(artifact, signature, point, [best.layout, *allocators], progress) if allocators else [best]
    chosen = _best(again, load, again[0])
    decisions = (
        *_decided(load, chosen, [*found, *again[1:]]),
        *(Skipped(what=str(layout), reason=reason) for layout, reason in refused.items() if reason),
        *_left(wanted),
    )
    return Tuning(load=load, point=point, chosen=chosen, measured=(*found, *again[1:]), decisions=decisions)


def layouts_of(cores: int, load: str, most_instances: int) -> Iterator[Layout]:
    """The plain layout, one instance on all cores, first. For latency one instance with fewer threads, and as many
    beside it as cores remain for; for throughput the cores shared out evenly."""
    cores = max(1, cores)
    halves = [cores >> shift for shift in range(cores.bit_length())]
    for threads in halves:
        instances = 1 if load == "latency" else max(1, cores // threads)
        if instances <= max(1, most_instances):
            yield Layout(instances=instances, threads=threads)


def _measure_all(
    artifact: Artifact, signature: Signature, point: Point, layouts: Sequence[Layout], progress: Progress
) -> list[Measured]:
    taken: dict[Layout, list[Measured]] = {layout: [] for layout in layouts}
    with progress.step("measuring instances, threads and allocators", total=PASSES * len(layouts)) as advance:
        for number in range(PASSES):
            for layout in layouts if number % 2 == 0 else reversed(layouts):
                taken[layout].append(_measure(artifact, signature, point, layout))
                advance()
    return [
        Measured(
            layout=layout,
            p50_ms=round(statistics.median(m.p50_ms for m in several), 4),
            rows_per_second=round(statistics.median(m.rows_per_second for m in several), 2),
            peak_bytes=max(m.peak_bytes for m in several),
        )
        for layout, several in taken.items()
    ]


def _measure(artifact: Artifact, signature: Signature, point: Point, layout: Layout) -> Measured:
    """All instances of a layout at once, each answering one call after the other."""
    arrays = list(sample(signature, point, np.random.default_rng(0)).values())
    rows = len(arrays[0]) if signature.batch_axis is not None else 1
    settings = {**artifact.settings, "threads": layout.threads}
    with ExitStack() as stack, ThreadPoolExecutor(layout.instances) as callers:
        started = [RuntimeProcess(artifact, settings, preload=layout.allocator) for _ in range(layout.instances)]
        processes = [stack.enter_context(process) for process in started]
        taken = list(callers.map(lambda process: process.time(arrays, seconds=SECONDS, at_least=3), processes))
        return Measured(
            layout=layout,
            p50_ms=statistics.median(ms for times in taken for ms in times),
            rows_per_second=sum(rows * len(times) / sum(times) * 1e3 for times in taken),
            peak_bytes=sum(process.peak_bytes for process in processes),
        )


def _refusal(artifact: Artifact, signature: Signature, point: Point, layout: Layout) -> str:
    """Why the runtime does not run with an allocator (OpenVINO 2026.4 with neither of these two); "" where it does."""
    try:
        with RuntimeProcess(artifact, preload=layout.allocator) as process:
            process.run(list(sample(signature, point, np.random.default_rng(0)).values()))
    except ProofFailed as error:
        return error.in_a_line
    return ""


def _goodness(entry: Measured, load: str) -> float:
    return 1 / entry.p50_ms if load == "latency" else entry.rows_per_second


def _best(found: Sequence[Measured], load: str, plain: Measured) -> Measured:
    best = max(found, key=lambda entry: _goodness(entry, load))
    return best if _goodness(best, load) >= WORTH * _goodness(plain, load) else plain


def _decided(load: str, chosen: Measured, found: Sequence[Measured]) -> Iterator[Decision]:
    """The chosen layout as Applied, each other as Skipped with its figure."""

    def figure(entry: Measured) -> str:
        return f"{entry.p50_ms:.2f} ms" if load == "latency" else f"{entry.rows_per_second:.1f} rows/s"

    yield Applied(what=str(chosen.layout), detail=f"measured for {load}: {figure(chosen)}")
    for entry in found:
        if entry.layout != chosen.layout:
            reason = f"{figure(entry)}, {_goodness(entry, load) / _goodness(chosen, load):.2f} x as good"
            yield Skipped(what=str(entry.layout), reason=reason)


def _left(allocators: Sequence[Layout]) -> Iterator[Decision]:
    """What was not measured at all."""
    if not allocators:
        get = "apt install libtcmalloc-minimal4 libjemalloc2"
        yield Skipped(what="another allocator", reason=f"neither tcmalloc nor jemalloc is on this machine: {get}")
    yield Skipped(what="streams", reason="an instance answers one batch at a time: instances take their place")


def settings_of(tuning: Tuning) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the layout adds to an artifact's settings, and to how its server shall run it."""
    layout = tuning.chosen.layout
    serving: dict[str, Any] = {"instances": layout.instances}
    if layout.allocator:
        serving["allocator"] = Path(layout.allocator).name
    return {"threads": layout.threads}, serving
