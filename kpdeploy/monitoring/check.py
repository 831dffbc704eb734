"""The regression gate: two versions of a model measured side by side, and judged by the detector.

Both run in process, in the runtimes that serve them, and take turns within a fraction of a second: what slows the
machine slows both. Where a process's pages fall decides a few percent of its speed for its whole life, so that each
block of windows is measured in a fresh pair of processes, and the blocks must agree. Blocks are added until every
point is decided, or the time is over; the detector is told how often it may look.

One thread, unless told: on a busy machine threads wait for each other's stolen cores. What one thread takes is judged
without the time in which it could run and had no core, which the kernel counts: that is others' load, not the version.
What it waits for by itself (a disk, a lock, a sleep) stays in. Several threads are judged by the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy import checkout
from kpdeploy.artifact import Artifact, Comparison, Manifest
from kpdeploy.baseline import Baseline, Windows
from kpdeploy.compare import compare, worst_of
from kpdeploy.errors import CannotTell, InputMismatch, NothingToCompare, Regressed
from kpdeploy.hardware import conditions, environment
from kpdeploy.inputs import Array, measured_points, sample
from kpdeploy.monitoring.history import Entry, values_of
from kpdeploy.monitoring.regression import Criteria, Judgement, judge, judge_pairs
from kpdeploy.progress import Progress
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.signature import Point, Signature

BLOCK = 12
"""Windows of a block: two blocks are enough for a first look, three for an answer where they differ."""

LOOKS = 8
"""How often the detector is asked at most; there are as many blocks, and one."""

LEAST_CALLS = 3
"""Of a window by the clock, of which others' load may hit one; without that load, one call is enough."""
WINDOW_MS = 60
"""The length of a window, where it need not be longer for LEAST_CALLS."""

TAIL = 5
"""A p99 of a short window is its slowest call: it counts from this many times the effect on."""

MEMORY_EFFECT = 0.1
OWN = "own_time"
"""In the environment of windows: whether they are without what the process waited for a core."""
SAME_MACHINE = ("cpu", "cores", "gpus")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two versions: how it is called, its files in a local folder, and its manifest and baseline.

    `runtime_file` stands in for the runtime of its format (a study injects slowness by it)."""

    name: str
    folder: Path
    manifest: Manifest
    baseline: Baseline
    runtime_file: Path | None = None

    @property
    def artifact(self) -> Artifact:
        manifest = self.manifest
        return Artifact(
            format=manifest.format,
            folder=self.folder,
            filename=manifest.filename,
            input_names=tuple(spec.name for spec in manifest.signature.inputs),
            output_names=tuple(spec.name for spec in manifest.signature.outputs),
            settings=manifest.settings,
        )

    def process(self, threads: int) -> RuntimeProcess:
        """The artifact in its runtime, with this many threads (0: as it is served)."""
        settings = {**self.manifest.settings, **({"threads": threads} if threads else {})}
        return RuntimeProcess(self.artifact, settings, runtime_file=self.runtime_file)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Stored windows to compare with: a baseline, or what the history has."""

    name: str
    model: str
    windows: tuple[Windows, ...]
    environment: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was compared. `old` and `new` are medians in `unit`; the values are those of the windows."""

    what: str
    unit: str
    old: float
    new: float
    judgement: Judgement
    old_values: tuple[float, ...] = ()
    new_values: tuple[float, ...] = ()
    point: Mapping[str, int] = field(default_factory=dict)

    @property
    def decisive(self) -> bool:
        """Must it be known before the check can end well?"""
        return self.what.startswith("p50")

    @property
    def unknown(self) -> bool:
        return self.judgement.outcome == "unknown"


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check found. `windows` are the new version's, for the history."""

    model: str
    old: str
    new: str
    findings: tuple[Finding, ...]
    answers: tuple[Comparison, ...]
    notes: tuple[str, ...]
    windows: tuple[Windows, ...]
    criteria: Criteria
    environment: Mapping[str, Any]
    seconds: float

    @property
    def outcome(self) -> str:
        """regressed if anything is; else unknown if a median latency is; else improved or equal."""
        outcomes = [finding.judgement.outcome for finding in self.findings]
        if "regressed" in outcomes or not all(answer.passed for answer in self.answers):
            return "regressed"
        if any(f.unknown and f.decisive for f in self.findings):
            return "unknown"
        return "improved" if "improved" in outcomes else "equal"

    def error(self) -> Regressed | CannotTell | None:
        """The outcome as what the command ends with; None for no worse."""
        if self.outcome in ("improved", "equal"):
            return None
        wrong = [f"{a.output} is off by {a.error:.1e}, at most {a.tolerance:.0e}" for a in self.answers if not a.passed]
        if self.outcome == "regressed":
            worse = [f"{f.what} {f.judgement.reason}" for f in self.findings if f.judgement.outcome == "regressed"]
            return Regressed(
                f"{self.new} is worse than {self.old}",
                why="; ".join([*wrong, *worse]),
                next_step="compare their manifests: format, settings, source and packages say what changed",
            )
        unsure = [f for f in self.findings if f.unknown and f.decisive]
        return CannotTell(
            f"whether {self.new} is slower than {self.old} cannot be told",
            why="; ".join(f"{f.what}: {f.judgement.reason}" for f in unsure),
            next_step="give it more time with --seconds, or a quieter machine",
        )

    def entry(self, version: str) -> Entry:
        """What the history keeps of it."""
        return Entry(
            kind="check",
            model=self.model,
            version=version,
            values=values_of(self.windows),
            windows=self.windows,
            environment=self.environment,
            label=checkout.branch(),
            outcome=self.outcome,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "old": self.old,
            "new": self.new,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 1),
            "criteria": asdict(self.criteria),
            "findings": [asdict(finding) for finding in self.findings],
            "answers": [{**asdict(answer), "passed": answer.passed} for answer in self.answers],
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }


def check_versions(
    new: Side,
    old: Side,
    *,
    criteria: Criteria,
    seconds: float,
    points: Sequence[Point] = (),
    threads: int = 1,
    progress: Progress | None = None,
) -> CheckReport:
    """Measure `new` and `old` side by side for at most about `seconds`, and compare their answers.

    `points` default to one usual request alone, and a batch of eight. `threads`: of each runtime; 0: as it is served.

    Raises:
        NothingToCompare: they are versions of different models.
        InputMismatch: a point outside of the dynamic range.
        ProofFailed: an artifact cannot be run here.
    """
    started = time.monotonic()
    same_model(new.manifest, old.manifest, new.name, old.name)
    where = _points(new.manifest.signature, points)
    measured = _Measured(where, own=threads == 1)
    found: tuple[Finding, ...] = ()
    answers: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    with (progress or Progress()).step(f"measuring {new.name} beside {old.name}", total=LOOKS + 1) as advance:
        for block in range(LOOKS + 1):
            begun = time.monotonic()
            with ExitStack() as stack:
                pair = processes_of(stack, (old, new), threads, turned=block % 2 == 1)
                if block == 0:
                    answers, notes = _answers(pair[1], new, old)
                measured.take(pair, new.manifest.signature, block)
            advance()
            now = time.monotonic()
            if block == 0:
                continue
            found = measured.findings(replace(criteria, looks=LOOKS * criteria.looks))
            undecided = any(f.unknown and f.decisive for f in found)
            # Another block takes about as long as this one.
            if not undecided or now - started + (now - begun) > seconds:
                break
    return CheckReport(
        model=new.manifest.model,
        old=old.name,
        new=new.name,
        findings=found,
        answers=answers,
        notes=(*notes, *measured.notes()),
        windows=measured.windows(),
        criteria=criteria,
        environment={**environment(), **conditions(), "threads": threads, OWN: measured.own},
        seconds=time.monotonic() - started,
    )


def processes_of(stack: ExitStack, sides: Sequence[Side], threads: int, *, turned: bool) -> list[RuntimeProcess]:
    """A process of each side. The one that starts later is often a little faster: they take turns in that, too."""
    processes = [side.process(threads) for side in sides]
    for process in reversed(processes) if turned else processes:
        stack.enter_context(process)
    return processes


def check_against(
    new: Side, stored: Reference, *, criteria: Criteria, seconds: float, progress: Progress | None = None
) -> CheckReport:
    """Measure `new` at the points of stored windows, and compare it with them: independent windows, so that what the
    machine did meanwhile cannot be told from what the version does. Prefer check_versions where the version is there.

    Raises:
        NothingToCompare: the windows are of another model, of another machine, or there are none.
        ProofFailed: the artifact cannot be run here.
    """
    started = time.monotonic()
    here = environment()
    _comparable(new, stored, here)
    signature = new.manifest.signature
    threads = int(stored.environment.get("threads", 0))
    measured = _Measured([dict(entry.point) for entry in stored.windows], own=bool(stored.environment.get(OWN)))
    with (progress or Progress()).step(f"measuring {new.name}", total=LOOKS + 1) as advance, ExitStack() as stack:
        process = stack.enter_context(new.process(threads))
        answers, notes = _answers(process, new, None)
        for block in range(LOOKS + 1):
            measured.take([process], signature, block)
            advance()
            if block and time.monotonic() - started > seconds:
                break
    findings = tuple(
        _finding(
            f"p50 {_named(entry.point)}", list(entry.p50_ms), new_ms, judge(entry.p50_ms, new_ms, criteria), entry.point
        )
        for entry, new_ms in zip(stored.windows, measured.percentile(0, 50), strict=True)
    )
    return CheckReport(
        model=new.manifest.model,
        old=stored.name,
        new=new.name,
        findings=findings,
        answers=answers,
        notes=(
            *notes,
            *measured.notes(),
            f"{stored.name} was measured at another time: give a version to measure it beside",
        ),
        windows=measured.windows(),
        criteria=criteria,
        environment={**here, **conditions(), "threads": threads, OWN: measured.own},
        seconds=time.monotonic() - started,
    )


class _Measured:
    """Times of all windows so far, by side (old, new), point and window. With `own` they are without what the processes
    waited for a core, if the kernel tells it."""

    def __init__(self, points: Sequence[Point], *, own: bool) -> None:
        self.points = list(points)
        self.own = own
        self.calls = [0] * len(points)
        self.blocks: list[int] = []
        self.taken: dict[int, list[list[list[float]]]] = {}
        self.memory: dict[int, list[int]] = {}
        self.clock_ms = 0.0
        self.judged_ms = 0.0

    def take(self, processes: Sequence[RuntimeProcess], signature: Signature, block: int) -> None:
        """One block: the sides take turns, call by call, the first one changing."""
        arrays = [list(sample(signature, point, np.random.default_rng(0)).values()) for point in self.points]
        for where, request in enumerate(arrays):
            self._begin(processes, where, request)
        for window in range(BLOCK):
            order = list(enumerate(processes))
            for where, request in enumerate(arrays):
                self._window(order if window % 2 else order[::-1], where, request)
            self.blocks.append(block)
        for side, process in enumerate(processes):
            self.memory.setdefault(side, []).append(process.peak_bytes)

    def _begin(self, processes: Sequence[RuntimeProcess], where: int, request: list[Array]) -> None:
        """Warm up, and see how many calls make a window."""
        usual = []
        for process in processes:
            clock, own = process.time_both(request, seconds=0, at_least=1, warmup=2)
            self.own = self.own and bool(own)
            usual.append(statistics.median(own if self.own else clock))
        least = 1 if self.own else LEAST_CALLS
        self.calls[where] = self.calls[where] or max(least, min(20, round(WINDOW_MS / min(usual))))

    def _window(self, order: Sequence[tuple[int, RuntimeProcess]], where: int, request: list[Array]) -> None:
        taken: dict[int, list[float]] = {side: [] for side, _ in order}
        for _ in range(self.calls[where]):
            for side, process in order:
                clock, own = process.time_both(request, seconds=0, at_least=1, warmup=0)
                judged = own if self.own else clock
                taken[side] += judged
                self.clock_ms, self.judged_ms = self.clock_ms + sum(clock), self.judged_ms + sum(judged)
        for side, window in taken.items():
            self.taken.setdefault(side, [[] for _ in self.points])[where].append(window)

    def percentile(self, side: int, percentile: float) -> list[list[float]]:
        """By point, the percentile of each window."""
        return [[float(np.percentile(w, percentile)) for w in windows] for windows in self.taken[side]]

    def findings(self, criteria: Criteria) -> tuple[Finding, ...]:
        tails = replace(criteria, effect=criteria.effect * TAIL)
        found = []
        for name, percentile, asked in (("p50", 50, criteria), ("p99", 99, tails)):
            sides = (self.percentile(side, percentile) for side in (0, 1))
            for point, old, new in zip(self.points, *sides, strict=True):
                judgement = judge_pairs(old, new, asked, blocks=self.blocks)
                found.append(_finding(f"{name} {_named(point)}", old, new, judgement, point))
        return (*found, self._memory())

    def notes(self) -> tuple[str, ...]:
        """What the times are, where they are not the clock's."""
        if not self.own or self.clock_ms < 1.02 * self.judged_ms:
            return ()
        waited = 1 - self.judged_ms / self.clock_ms
        return (f"the machine was busy: {waited:.0%} of the time went by waiting for a core, and is left out",)

    def _memory(self) -> Finding:
        """Sizes hardly vary: worse is what is larger in every process than in any of the old version's."""
        old, new = ([size / 1e6 for size in self.memory[side]] for side in (0, 1))
        ratio = statistics.median(new) / statistics.median(old)
        worse, better = min(new) > max(old) * (1 + MEMORY_EFFECT), max(new) * (1 + MEMORY_EFFECT) < min(old)
        judgement = Judgement(
            outcome="regressed" if worse else "improved" if better else "equal",
            ratio=ratio, low=min(new) / max(old), high=max(new) / min(old), p=1, p_better=1, windows=len(new),
            reason=f"{ratio - 1:+.1%} in {len(new)} processes",
        )  # fmt: skip
        return Finding(
            what="memory", unit="MB", old=statistics.median(old), new=statistics.median(new), judgement=judgement,
            old_values=tuple(old), new_values=tuple(new),
        )  # fmt: skip

    def windows(self) -> tuple[Windows, ...]:
        new = max(self.taken)
        return tuple(
            Windows.of(
                [ms for window in taken for ms in window],
                point=point,
                rows=next(iter(point.values()), 1),
                memory_bytes=max(self.memory[new]),
                count=len(taken),
            )
            for point, taken in zip(self.points, self.taken[new], strict=True)
        )


def _finding(what: str, old: Sequence[float], new: Sequence[float], judgement: Judgement, point: Point) -> Finding:
    return Finding(
        what=what,
        unit="ms",
        old=statistics.median(old),
        new=statistics.median(new),
        judgement=judgement,
        old_values=tuple(round(v, 4) for v in old),
        new_values=tuple(round(v, 4) for v in new),
        point=dict(point),
    )


def _answers(process: RuntimeProcess, new: Side, old: Side | None) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    """The golden requests: the new version must give its own answers, and the old one's where both were made from the
    same source."""
    found = _replayed(process, new, new.baseline)
    if old is None:
        return found, ()
    if _source(new) == _source(old):
        theirs = _replayed(process, new, old.baseline)
        return tuple(max(pair, key=lambda c: (not c.passed, c.error)) for pair in zip(found, theirs, strict=True)), ()
    worst = max((c.error for c in _replayed(process, new, old.baseline)), default=0.0)
    return found, (f"the versions have different sources; their golden answers differ by {worst:.1e}",)


def _source(side: Side) -> dict[str, Any]:
    return {key: value for key, value in side.manifest.source.items() if key != "git"}


def _replayed(process: RuntimeProcess, side: Side, baseline: Baseline) -> tuple[Comparison, ...]:
    signature, found = side.manifest.signature, list[Comparison]()
    for exchange in baseline.exchanges:
        arrays = process.run([exchange.inputs[spec.name] for spec in signature.inputs])
        answer = {spec.name: array for spec, array in zip(signature.outputs, arrays, strict=True)}
        found += compare(answer, exchange.outputs, side.manifest.tolerances)
    return tuple(worst_of(found))


def same_model(ours: Manifest, theirs: Manifest, new: str, old: str) -> None:
    """Raise NothingToCompare unless both take the same requests."""
    if ours.model != theirs.model:
        why = f"one is {ours.model}, the other {theirs.model}"
    elif ours.signature.inputs != theirs.signature.inputs or ours.signature.axes != theirs.signature.axes:
        why = "they take different inputs"
    elif [spec.name for spec in ours.signature.outputs] != [spec.name for spec in theirs.signature.outputs]:
        why = "they give different outputs"
    else:
        return
    raise NothingToCompare(
        f"{new} and {old} are not versions of one model",
        why=why,
        next_step="name two versions that take the same requests",
    )


def _comparable(new: Side, stored: Reference, here: Mapping[str, Any]) -> None:
    why = next_step = ""
    elsewhere = [name for name in SAME_MACHINE if stored.environment.get(name) != here.get(name)]
    if stored.model and stored.model != new.manifest.model:
        why, next_step = f"it is of {stored.model}", "name a baseline of the same model"
    elif not stored.windows:
        why, next_step = "it has no windows", "export the model again, or give a version to measure beside this one"
    elif elsewhere:
        why = f"it was taken on another machine: {', '.join(elsewhere)}"
        next_step = "give a version to measure beside this one, such as --against REPO@VERSION"
    if why:
        raise NothingToCompare(f"{new.name} cannot be compared with {stored.name}", why=why, next_step=next_step)


def _points(signature: Signature, points: Sequence[Point]) -> list[Point]:
    usual = measured_points(signature)
    found: list[Point] = []
    for point in [{**usual[0], **point} for point in points] or usual:
        for name, size in point.items():
            axis = next((axis for axis in signature.axes if axis.name == name), None)
            if axis is None or not axis.min <= size <= axis.max:
                known = ", ".join(f"{a.name}={a.min}..{a.max}" for a in signature.axes)
                raise InputMismatch(f"{name}={size} is outside of the model's range", next_step=f"it has {known}")
        if point not in found:
            found.append(point)
    return found


def _named(point: Point) -> str:
    return "×".join(str(size) for size in point.values()) or "fixed"
