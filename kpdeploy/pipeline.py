"""The only file that joins steps: load, export, verify, and package into a server's repository."""

from __future__ import annotations

import errno
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpdeploy.artifact import BASELINE, MANIFEST, MOUNT, Artifact, Latency, Manifest, Verdict
from kpdeploy.backends import LEVELS, Lowering, lowerings
from kpdeploy.baseline import WINDOWS, Baseline, Exchange, Windows
from kpdeploy.compare import TOLERANCES
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.deployment import Deployment
from kpdeploy.errors import (
    BudgetUnmet,
    DiskFull,
    ExportFailed,
    FormatUnavailable,
    KpdeployError,
    LevelUnavailable,
    ModelNotServed,
    NothingToCompare,
    NotReady,
    PackageMissing,
    ProofFailed,
    RepositoryBusy,
    RolledBack,
    UnknownName,
)
from kpdeploy.hardware import conditions, detect, environment
from kpdeploy.inputs import Array, Tensors, lead_axis, middle_point, sample
from kpdeploy.model import Model
from kpdeploy.monitoring.check import CheckReport, Reference, Side, check_against, check_versions, same_model
from kpdeploy.monitoring.history import Entry, branch, open_history, record, values_of
from kpdeploy.monitoring.regression import Criteria
from kpdeploy.monitoring.rollout import CANARY, STATE, Trial, try_out
from kpdeploy.monitoring.rollout import Decision as RolloutDecision
from kpdeploy.ops.libraries import contract, find
from kpdeploy.progress import Progress
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.runtimes.worker import peak_bytes
from kpdeploy.scratch import work_folder
from kpdeploy.serving.client import Client, connect, replay
from kpdeploy.serving.target import TARGETS
from kpdeploy.signature import Point, Signature, parse_inputs
from kpdeploy.verify import Question, ask, failure, prove, questions

if TYPE_CHECKING:
    import torch

    from kpdeploy.export import Capture, Format
    from kpdeploy.monitoring.alerts import Intervals, Slo
    from kpdeploy.monitoring.stack import Stack
    from kpdeploy.serving.triton.server import Server

FULL_BYTES = 1 << 20
"""A disk with less left is full: whoever met its end has often removed a part of what it wrote."""

ACCURACY_BUDGET = 1e-2
"""Levels 2 and 3 may differ from the model by so much, unless stated."""

ASKED_SAMPLES = 8
"""So many of the user's calibration samples are asked in the proof."""

ROUNDS = 3
ROUND_SECONDS = 0.5
SLOWER = 1.2
"""A candidate that takes this times as long as the fastest in the first round is timed no more."""

WINDOW_MS = 60
"""The length of a window of the baseline, where two calls take no longer; a call slower than SLOW_MS is a window."""
SLOW_MS = 150


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One format with one set of runtime settings: what its proof and its measurement showed.

    `reason` says why it is out; then `artifact` and `verdict` are None where it did not get that far. `decisions` are
    those that hold if this candidate is chosen.
    """

    format: str
    settings: Mapping[str, Any]
    artifact: Artifact | None = None
    verdict: Verdict | None = None
    latencies: tuple[Latency, ...] = ()
    reason: str = ""
    decisions: tuple[Decision, ...] = ()
    level: int = 1

    @property
    def fused(self) -> bool:
        """Does it hold fused ops, whose kernels come in a library beside it?"""
        return bool(self.settings.get("op_libraries"))

    @property
    def label(self) -> str:
        said = [f"{key} {value}" for key, value in self.settings.items() if key != "op_libraries"]
        said += ["fused ops"] if self.fused else []
        return f"{self.format} ({', '.join(said)})" if said else self.format

    @property
    def passed(self) -> bool:
        return self.verdict is not None and self.verdict.passed

    @property
    def score(self) -> float:
        """The geometric mean of the median latencies in milliseconds: smaller is faster."""
        return math.exp(statistics.fmean(math.log(entry.p50_ms) for entry in self.latencies))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "settings": dict(self.settings),
            "level": self.level,
            "passed": self.passed,
            "reason": self.reason,
            "bytes": self.artifact.bytes if self.artifact is not None and self.artifact.folder.is_dir() else None,
            "verdict": asdict(self.verdict) if self.verdict is not None else None,
            "latencies": [asdict(entry) for entry in self.latencies],
        }


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export` did: every candidate, every decision, and where the result is. `fusions` are what the fused
    candidates hold, whether or not one of them was chosen."""

    deployment: Deployment
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    decisions: tuple[Decision, ...]
    fusions: tuple[Decision, ...]
    baseline: Baseline
    seconds: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "repository": self.deployment.repository,
            "folder": self.deployment.folder,
            "seconds": round(self.seconds, 2),
            "peak_bytes": self.peak_bytes,
            "baseline": [asdict(entry) for entry in self.baseline.latencies],
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "manifest": self.deployment.manifest.to_json(),
        }


def export(
    model: str | torch.nn.Module,
    inputs: Any = None,
    *,
    target: str = "triton",
    repo: str | os.PathLike[str] = "models",
    format: str = "auto",
    name: str | None = None,
    task: str | None = None,
    input: Sequence[str] = (),
    example: str | os.PathLike[str] | None = None,
    max_batch: int | None = None,
    tolerance: Mapping[str, float] | None = None,
    fuse: str = "auto",
    level: str = "1",
    accuracy_budget: float = ACCURACY_BUDGET,
    latency_budget_ms: float | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    mount: str = MOUNT,
    serving: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a model, prove each artifact, and publish the fastest that passed as the next version in `repo`.

    Args:
        model: a MODEL as the command line takes it, or a module.
        inputs: example inputs of a module: a tensor, a sequence, or a dict by the names of forward's parameters.
        target: the server, a key of kpdeploy.serving.target.TARGETS.
        repo: the repository's folder, or any fsspec URL.
        format: "auto", or one format.
        input: texts such as "input_ids:int64[batch=1..32,seq=1..512]"; example: an .npz with one array per input.
        max_batch: the largest batch of inputs that do not say it themselves.
        tolerance: largest relative errors by dtype, in place of kpdeploy.compare.TOLERANCES.
        fuse: "auto" tries each format with and without fused ops (those that take a minute without), "never" without,
            "always" only with.
        serving: what Manifest.serving holds: how the server shall run the model.
        level: the highest that is tried: "1" changes nothing but rounding, "2" computes in bf16 too, "3" in int8 too,
            "auto" all that this machine has. The fastest that holds its budget is packaged.
        accuracy_budget: the largest ‖out − ref‖ / ‖ref‖ of levels 2 and 3; level 1 keeps `tolerance`.
        latency_budget_ms: stop at the first level whose median latency of a single request is within it.
        calibrate: an .npz of samples for int8, one array per input with the samples along its first axis; without it
            they are drawn at random from the valid values. The proof asks some of them, too.
        mount: where the server will find the repository: the path of kernel libraries in config.pbtxt begins with it.

    Raises:
        KpdeployError: any of its kinds; then nothing was published.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    from kpdeploy.export import Capture
    from kpdeploy.load.calibration import calibration

    _check_choices(target, format, fuse, mount)
    rungs = _rungs(target, format, level, accuracy_budget, latency_budget_ms)
    tolerances = _tolerances(tolerance)
    # What can be told without the model is told before minutes are spent on it.
    parse_inputs(input)
    package = TARGETS[target].package
    package.check_publishable(str(repo))
    with progress.step("loading the model"):
        loaded = _load(model, inputs, name=name, task=task, texts=input, example=example, max_batch=max_batch)
    package.check_publishable(str(repo), model=loaded.name)
    with work_folder() as work, _told_when_full(work):
        settled, asked, baseline = _take_baseline(loaded, stated=bool(input), progress=progress)
        samples = calibration(settled.signature, calibrate) if calibrate is not None else []
        if calibrate is not None:
            asked += _asked_of(samples, settled)
        tolerances, told = _fitting(tolerances, settled, given=tolerance)
        capture = Capture(settled, work)
        wanted = _formats(target, format)
        fused = {} if fuse == "never" else _fuse(capture, wanted, progress, must=fuse == "always")
        candidates = _try_formats(capture, fused, wanted, asked, tolerances, progress, plain=fuse != "always")
        lower = _Lower(capture, asked, samples, accuracy_budget, progress)
        for rung in rungs:
            candidates += [lower.candidate(way, candidates) for way in rung]
            candidates, windows = _measure(candidates, settled.signature, progress)
            chosen = _choose(candidates, format, asked)
            if latency_budget_ms is not None and chosen.latencies[0].p50_ms <= latency_budget_ms:
                break
        _check_latency(candidates, chosen, latency_budget_ms)
        decisions = (*settled.decisions, *told, *capture.decisions, *_decided(target, candidates, chosen, fused))
        manifest = replace(_manifest(settled, target, candidates, chosen, tolerances, decisions), mount=mount)
        manifest = replace(manifest, serving=dict(serving or {}))
        with progress.step(f"publishing {settled.name} in {repo}"):
            deployment = _publish(str(repo), manifest, chosen, replace(baseline, windows=windows))
    _remember(deployment, windows, baseline, progress)
    return ExportReport(
        deployment=deployment,
        candidates=tuple(candidates),
        chosen=chosen,
        decisions=deployment.manifest.decisions,
        fusions=_told_of(fused, chosen),
        baseline=replace(baseline, windows=windows),
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
    )


@dataclass(frozen=True, kw_only=True)
class MigrateReport:
    """What `migrate` did: the export of the archive's model, and what of the archive it carried over, or not."""

    archive: str
    report: ExportReport
    told: tuple[Decision, ...]

    def to_json(self) -> dict[str, Any]:
        told = [{"kind": type(decision).__name__.lower(), **asdict(decision)} for decision in self.told]
        return {"archive": self.archive, "told": told, **self.report.to_json()}


def migrate(
    path: str | os.PathLike[str],
    *,
    target: str = "triton",
    repo: str | os.PathLike[str] = "models",
    format: str = "auto",
    name: str | None = None,
    input: Sequence[str] = (),
    trust: bool = False,
    tolerance: Mapping[str, float] | None = None,
    fuse: str = "auto",
    progress: Progress | None = None,
) -> MigrateReport:
    """Export the model of a TorchServe archive (.mar) for another server, proven equal, and say what was left behind.

    Args:
        path: an archive of anybody; none of its code runs, unless `trust` allows its model file.
        input: the model's inputs, which archives do not hold. See `export`, as for the other arguments.

    Raises:
        KpdeployError: any of its kinds; then nothing was published.
    """
    from kpdeploy.load.archive import exportable, inputs, read_archive, told

    with work_folder() as work:
        archive = read_archive(Path(path), work)
        found = told(archive)
        model = exportable(archive, trust=trust)
        report = export(
            model,
            target=target,
            repo=repo,
            format=format,
            name=name or archive.name,
            input=inputs(archive, tuple(input)),
            max_batch=archive.batch if archive.batch > 1 else None,
            tolerance=tolerance,
            fuse=fuse,
            serving=archive.serving,
            progress=progress,
        )
    return MigrateReport(archive=str(path), report=report, told=tuple(found))


Rung = tuple[Lowering, ...]


def _rungs(target: str, format: str, level: str, accuracy: float, latency_ms: float | None) -> list[Rung]:
    """The ways to lower precision that will be tried, all at once; step by step where a latency may end it early.

    Raises:
        UnknownName: no such level, or a budget that is none.
        LevelUnavailable: the level was asked for, and this machine, target or format has none of its ways.
    """
    from kpdeploy.load import choose

    choose("level", level, ("auto", *map(str, LEVELS)))
    for name, value in (("accuracy budget", accuracy), ("latency budget", latency_ms)):
        if value is not None and not 0 < value < math.inf:
            raise UnknownName(f"the {name} {value} is not a number above 0", next_step="give one, such as 1e-2")
    top = LEVELS[-1] if level == "auto" else int(level)
    known = [_reachable(way, target, format) for way in lowerings(detect()) if way.level <= top]
    missing = [way for way in known if way.level == top and way.missing]
    if level != "auto" and top > 1 and len(missing) == sum(way.level == top for way in known):
        raise LevelUnavailable(
            f"level {level} cannot be had here",
            why="; ".join(f"{way.precision}: {way.missing}" for way in missing),
            next_step="leave it to the tool with --level auto, or see `kpdeploy doctor`",
        )
    steps = [tuple(way for way in known if way.level == step) for step in range(1, top + 1)]
    return steps if latency_ms is not None else [tuple(way for step in steps for way in step)]


def _reachable(way: Lowering, target: str, format: str) -> Lowering:
    """The same way, or what rules it out."""
    if way.missing:
        return way
    if way.format not in TARGETS[target].formats:
        return replace(way, missing=f"it needs the format {way.format}, which {target} does not serve")
    if format not in ("auto", way.format):
        return replace(way, missing=f"it needs the format {way.format}, and {format} was asked for")
    return way


def _check_latency(candidates: Sequence[Candidate], chosen: Candidate, budget_ms: float | None) -> None:
    if budget_ms is None or chosen.latencies[0].p50_ms <= budget_ms:
        return
    reached = ", ".join(
        f"{c.label} {c.latencies[0].p50_ms:.2f} ms" if c.latencies else f"{c.label} out ({c.reason})"
        for c in candidates
    )
    raise BudgetUnmet(
        f"nothing answers a single request within {budget_ms:g} ms",
        why=f"reached: {reached}",
        next_step="allow more with --latency-budget-ms or --accuracy-budget, or more of --level",
    )


def _asked_of(samples: Sequence[Tensors], model: Model) -> list[Question]:
    """Some of the user's own samples as questions of the proof."""
    from kpdeploy.load.reference import reference

    answer = reference(model)
    some = samples[:: max(1, len(samples) // ASKED_SAMPLES)][:ASKED_SAMPLES]
    points = [_point_of(model.signature, inputs) for inputs in some]
    return [Question(point=p, inputs=i, expected=answer(i)) for p, i in zip(points, some, strict=True)]


def _point_of(signature: Signature, inputs: Tensors) -> Point:
    sizes = ((dim, size) for s in signature.inputs for dim, size in zip(s.shape, inputs[s.name].shape, strict=True))
    return {dim: size for dim, size in sizes if isinstance(dim, str)}


@dataclass(frozen=True)
class _Lower:
    """Makes candidates of levels 2 and 3 from what level 1 has exported."""

    capture: Capture
    asked: Sequence[Question]
    samples: Sequence[Tensors]
    budget: float
    progress: Progress

    def candidate(self, way: Lowering, known: Sequence[Candidate]) -> Candidate:
        blank = Candidate(format=way.format, settings=way.settings, level=way.level, reason=way.missing)
        plain = next((c.artifact for c in known if c.format == way.format and c.level == 1 and not c.fused), None)
        if way.missing:
            return replace(blank, format=way.format or way.what, settings={})
        if plain is None:
            return replace(blank, reason=f"there is no {way.format} artifact to begin with")
        tolerances = dict.fromkeys(TOLERANCES, self.budget)
        told: tuple[Decision, ...] = ()
        try:
            artifact = replace(plain, settings=way.settings)
            if way.quantized:
                artifact, decision = self._quantized(plain, way)
                told = (decision,)
        except ExportFailed as error:
            return replace(blank, reason=_reason(error))
        with self.progress.step(f"proving {blank.label} in a fresh process"):
            proven = _prove_one(artifact, self.capture.model, self.asked, tolerances)
        return replace(proven, level=way.level, decisions=(*told, *proven.decisions))

    def _quantized(self, plain: Artifact, way: Lowering) -> tuple[Artifact, Decision]:
        from kpdeploy.export.int8 import quantize
        from kpdeploy.load.calibration import calibration

        folder = plain.folder.with_name(f"{plain.format}-{way.precision}")
        folder.mkdir()
        samples = self.samples or calibration(self.capture.signature, None)
        with self.progress.step(f"quantizing to {way.precision} on {len(samples)} samples (minutes)"):
            decision = quantize(plain.path, folder, samples, budget=self.budget)
        return replace(plain, folder=folder, settings=way.settings), decision


def _check_choices(target: str, format: str, fuse: str, mount: str) -> None:
    from kpdeploy.load import choose

    choose("target", target, tuple(TARGETS))
    choose("format", format, ("auto", *TARGETS[target].formats))
    choose("value of fuse", fuse, ("auto", "always", "never"))
    if not mount.startswith("/"):
        raise UnknownName(
            f"the mount {mount!r} is no absolute path",
            why="the server opens kernel libraries by the path that config.pbtxt states",
            next_step="give the folder where the server will see the repository, such as --mount /models",
        )


@contextmanager
def _told_when_full(work: Path) -> Iterator[None]:
    """A full disk shows as an error of whatever wrote to it: tell it as what it is."""
    try:
        yield
    except (OSError, ExportFailed, ProofFailed) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and shutil.disk_usage(work).free > FULL_BYTES:
            raise
        raise _full(work, _reason(error) if isinstance(error, KpdeployError) else str(error)) from None


def _full(work: Path, why: str) -> DiskFull:
    return DiskFull(
        f"no space is left in the temporary folder {work.parent}",
        why=why,
        next_step="free space there, or set TMPDIR to a folder on a larger disk",
    )


def _check_room(model: Model, format: str, work: Path) -> None:
    """Raise DiskFull where the weights do not fit: torch ends the whole process when it cannot write TorchScript."""
    if model.module is None:
        needed = model.path.stat().st_size if model.path is not None else 0
    else:
        needed = sum(t.nbytes for t in (*model.module.parameters(), *model.module.buffers()))
    free = shutil.disk_usage(work).free
    if free < needed + FULL_BYTES:
        raise _full(work, f"the {format} artifact needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")


def _tolerances(given: Mapping[str, float] | None) -> dict[str, float]:
    unknown = set(given or ()) - set(TOLERANCES)
    if unknown:
        raise UnknownName(f"unknown dtype {min(unknown)!r} in a tolerance", next_step=f"use {', '.join(TOLERANCES)}")
    return {**TOLERANCES, **(given or {})}


def _fitting(
    tolerances: dict[str, float], model: Model, *, given: Mapping[str, float] | None
) -> tuple[dict[str, float], list[Decision]]:
    """The tolerances for a model that computes in bfloat16 behind a float32 boundary: bfloat16's, unless stated."""
    import torch

    module = model.module
    if module is None or "float32" in (given or {}):
        return tolerances, []
    if not any(p.dtype is torch.bfloat16 for p in module.parameters()):
        return tolerances, []
    accepted = tolerances["bfloat16"]
    detail = f"the model computes in bfloat16, whose own rounding is of that size ({accepted:.1e})"
    return {**tolerances, "float32": accepted}, [
        Applied(what="tolerance of bfloat16 for float32 outputs", detail=detail)
    ]


def _load(
    model: str | torch.nn.Module,
    inputs: Any,
    *,
    name: str | None,
    task: str | None,
    texts: Sequence[str],
    example: str | os.PathLike[str] | None,
    max_batch: int | None,
) -> Model:
    from kpdeploy.load import DEFAULT_MAX_BATCH, Request, load_model

    request = Request(
        inputs=tuple(texts),
        example=Path(example) if example is not None else None,
        task=task,
        name=name,
        max_batch=max_batch or DEFAULT_MAX_BATCH,
    )
    if isinstance(model, str):
        return load_model(model, request)
    from kpdeploy.load.factory import from_module

    kind = type(model).__name__
    return from_module(model, inputs, request, name=kind, source={"kind": "module", "class": kind})


def _take_baseline(loaded: Model, *, stated: bool, progress: Progress) -> tuple[Model, list[Question], Baseline]:
    """Settle the dynamic axes, then ask the unmodified model everything that will be asked of the artifacts."""
    from kpdeploy.export.capture import settle_axes
    from kpdeploy.load.reference import reference

    with progress.step("capturing the graph"):
        model = settle_axes(loaded, stated=stated)
    with progress.step("taking the baseline of the unmodified model"):
        rng = np.random.default_rng()
        answer = reference(model)
        asked = questions(model.signature, answer, rng)
        exchanges = tuple(_exchange(model.signature, answer, point, rng) for point in _golden_points(model.signature))
        latencies = tuple(_time_here(answer, model.signature, point) for point in measured_points(model.signature))
    where = {**environment(), **conditions()}
    return model, asked, Baseline(exchanges=exchanges, latencies=latencies, environment=where)


def _golden_points(signature: Signature) -> list[dict[str, int]]:
    """Small sizes, for golden requests are stored and replayed: alone, in a batch of two, and the smallest."""
    lead = lead_axis(signature)
    short = {a.name: min(a.max, max(a.min, 1 if a.name == lead else 16)) for a in signature.axes}
    pair = {a.name: min(a.max, max(a.min, 2 if a.name == lead else 7)) for a in signature.axes}
    smallest = {a.name: a.min for a in signature.axes}
    points: list[dict[str, int]] = []
    for point in (short, pair, smallest):
        if point not in points:
            points.append(point)
    return points


def _exchange(
    signature: Signature, answer: Callable[[Tensors], dict[str, Array]], point: Point, rng: np.random.Generator
) -> Exchange:
    inputs = sample(signature, point, rng)
    return Exchange(inputs=inputs, outputs=answer(inputs))


def measured_points(signature: Signature) -> list[dict[str, int]]:
    """Where speed is measured: one usual request alone, and a batch of eight."""
    points = [middle_point(signature, batch=1), middle_point(signature, batch=8)]
    return points[:1] if points[0] == points[1] else points


def _time_here(answer: Callable[[Tensors], dict[str, Array]], signature: Signature, point: Point) -> Latency:
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


def _formats(target: str, format: str) -> list[Format]:
    from kpdeploy.export import FORMATS

    names = TARGETS[target].formats if format == "auto" else (format,)
    return [FORMATS[name] for name in names]


@dataclass(frozen=True)
class Fusion:
    """The model with fused ops, captured again (None: there are none), and what was fused and refused."""

    decisions: tuple[Decision, ...]
    capture: Capture | None = None


def _fuse(capture: Capture, formats: Sequence[Format], progress: Progress, *, must: bool) -> dict[str, Fusion]:
    """Replace subgraphs by fused ops for each format that can carry them, by its name."""
    model = capture.model
    carry = [f for f in formats if f.library]
    missing = [found for f in carry if isinstance(found := find(f.library), Skipped)]
    fusions: dict[str, Fusion] = {}
    if model.program is None:
        skipped: list[Decision] = [Skipped(what="fused ops", reason=f"a model given as {model.kind} has no graph here")]
    elif not carry:
        skipped = [Skipped(what="fused ops", reason=f"{formats[0].name} cannot carry them")]
    elif len(missing) == len(carry):
        skipped = list(missing[:1])
    else:
        with progress.step("fusing subgraphs"):
            made = {left: _fused(capture, left) for left in {f.leaves: None for f in carry}}
        fusions = {f.name: made[f.leaves] for f in carry}
        skipped = [d for fusion in fusions.values() for d in fusion.decisions]
    if must and not any(fusion.capture for fusion in fusions.values()):
        why = "; ".join(f"{d.what}: {d.reason}" for d in skipped if isinstance(d, Skipped))
        raise ExportFailed(
            f"nothing of {model.name} can be fused",
            why=why or "no subgraph matches a fused op",
            next_step="export it without: --fuse never, or --fuse auto",
        )
    return fusions or {formats[0].name: Fusion(tuple(skipped))}


def _fused(capture: Capture, left: tuple[str, ...]) -> Fusion:
    """The fusion of all ops but those that are left to the format's own compiler."""
    from kpdeploy.export.capture import settle_axes
    from kpdeploy.load.flat import Flat
    from kpdeploy.optimize import fuse

    result = fuse(capture.model, left=left)
    if not result.counts:
        return Fusion(result.decisions)
    again = replace(capture.model, kind="module", module=Flat(result.module, None), program=None, decisions=())
    try:
        settled = settle_axes(again, stated=True)
    except ExportFailed as error:
        return Fusion((Skipped(what="fused ops", reason=f"the fused graph cannot be captured: {error.why}"),))
    folder = capture.folder / "-".join(("fused", *left))
    folder.mkdir()
    return Fusion(result.decisions, replace(capture, model=settled, folder=folder, decisions=[]))


def _try_formats(
    capture: Capture,
    fused: Mapping[str, Fusion],
    formats: Sequence[Format],
    asked: Sequence[Question],
    tolerances: Mapping[str, float],
    progress: Progress,
    *,
    plain: bool,
) -> list[Candidate]:
    """Export and prove each format, with fused ops and without. Where only one was asked for, its failure is the
    command's."""
    candidates: list[Candidate] = []
    for format in formats:
        found: list[Candidate] = []
        fusion = fused.get(format.name)
        # A slow export is made once: without, where that may be, for its compiler has fused better wherever measured.
        if fusion is not None and fusion.capture is not None and not (format.slow and plain):
            found += _try_one(format, fusion.capture, asked, tolerances, progress, fused=True)
        if plain:
            try:
                found += _try_one(format, capture, asked, tolerances, progress, fused=False)
            except (ExportFailed, FormatUnavailable, PackageMissing) as error:
                if len(formats) == 1 and not any(c.passed for c in found):
                    raise
                found.append(Candidate(format=format.name, settings={}, reason=_reason(error)))
        candidates += found
    return candidates


def _try_one(
    format: Format,
    capture: Capture,
    asked: Sequence[Question],
    tolerances: Mapping[str, float],
    progress: Progress,
    *,
    fused: bool,
) -> list[Candidate]:
    """One format, with each of its variants. What fails of an artifact with fused ops is a candidate that is out.

    Raises:
        ExportFailed, FormatUnavailable, PackageMissing: the plain artifact cannot be made.
    """
    settings: dict[str, Any] = {"op_libraries": (format.library,)} if fused else {}
    try:
        artifact = _export_one(format, capture, progress, fused=fused)
    except (ExportFailed, FormatUnavailable, PackageMissing) as error:
        if not fused:
            raise
        return [Candidate(format=format.name, settings=settings, reason=_reason(error))]
    candidates = []
    for variant in format.fused_variants if fused else format.variants:
        candidate = Candidate(format=format.name, settings={**variant, **settings})
        with progress.step(f"proving {candidate.label} in a fresh process"):
            proposed = replace(artifact, settings=candidate.settings)
            candidates.append(_prove_one(proposed, capture.model, asked, tolerances))
    return candidates


def _export_one(format: Format, capture: Capture, progress: Progress, *, fused: bool) -> Artifact:
    kind = f"{format.name} with fused ops" if fused else format.name
    folder = capture.folder / "artifacts" / format.name
    folder.mkdir(parents=True)
    _check_room(capture.model, format.name, capture.folder)
    minute = " (compiles for about a minute)" if format.slow else ""
    if fused:
        library = find(format.library)
        if isinstance(library, Skipped):
            raise FormatUnavailable(f"{library.what} is missing", why=library.reason)
        shutil.copyfile(library, folder / library.name)
    with progress.step(f"exporting {kind}{minute}"):
        format.export(capture, folder)
    return Artifact(
        format=format.name,
        folder=folder,
        filename=format.filename,
        input_names=tuple(spec.name for spec in capture.signature.inputs),
        output_names=tuple(spec.name for spec in capture.signature.outputs),
    )


def _prove_one(
    artifact: Artifact, model: Model, asked: Sequence[Question], tolerances: Mapping[str, float]
) -> Candidate:
    candidate = Candidate(format=artifact.format, settings=artifact.settings, artifact=artifact)
    try:
        with RuntimeProcess(artifact) as process:
            verdict = prove(process, model.signature, asked, tolerances, np.random.default_rng())
        if verdict.passed and candidate.fused and artifact.format == "onnx":
            candidate = replace(candidate, decisions=(_prove_portable(artifact, model, asked, tolerances),))
    except ProofFailed as error:
        return replace(candidate, reason=_reason(error))
    return replace(
        candidate, verdict=verdict, reason="" if verdict.passed else _reason(failure(artifact.format, verdict, asked))
    )


def _prove_portable(
    artifact: Artifact, model: Model, asked: Sequence[Question], tolerances: Mapping[str, float]
) -> Decision:
    """Ask an ONNX file with fused ops where their library is not: its own functions then define them. Half of the
    questions will do, the smaller ones: it is the definitions that are new, and they hold at any size or at none.

    Raises:
        ProofFailed: it does not run there, or gives other answers.
    """
    bare = {key: value for key, value in artifact.settings.items() if key != "op_libraries"}
    libraries = ", ".join(artifact.settings["op_libraries"])
    smaller = sorted(asked, key=lambda q: sum(a.size for a in q.inputs.values()))[: max(3, len(asked) // 2)]
    with RuntimeProcess(artifact, bare) as process:
        found = ask(process, model.signature, smaller, tolerances)
    worst = max(found, key=lambda c: c.error)
    if not all(c.passed for c in found):
        raise ProofFailed(f"without {libraries} the ONNX file gives other answers", why=f"error {worst.error:.1e}")
    return Applied(
        what=f"runs without {libraries} too, slower",
        detail=f"the file defines its fused ops: error {worst.error:.1e}",
    )


def _reason(error: KpdeployError) -> str:
    return f"{error.what}: {error.why}" if error.why else error.what


def _measure(
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


def _choose(candidates: Sequence[Candidate], format: str, asked: Sequence[Question]) -> Candidate:
    passed = [c for c in candidates if c.passed]
    if passed:
        return min(passed, key=lambda c: c.score)
    judged = [c for c in candidates if c.verdict is not None]
    if format != "auto" and judged and judged[0].verdict is not None:
        raise failure(format, judged[0].verdict, asked)
    kind = ProofFailed if any(c.artifact is not None for c in candidates) else ExportFailed
    raise kind(
        "no format passed; nothing was packaged" if format == "auto" else f"the {format} artifact failed its proof",
        why="\n      ".join(f"{c.label}: {c.reason}" for c in candidates),
        next_step="fix what is named, or state what you accept: --tolerance float32=1e-4",
    )


def _decided(
    target: str, candidates: Sequence[Candidate], chosen: Candidate, fused: Mapping[str, Fusion]
) -> Iterator[Decision]:
    if chosen.fused or not any(fusion.capture for fusion in fused.values()):
        yield from _told_of(fused, chosen)
    yield from chosen.decisions
    for candidate in candidates:
        label = candidate.label
        if candidate is chosen:
            yield Applied(what=label, detail="the fastest that passed its proof, over the measured points")
        elif candidate.passed:
            yield Skipped(what=label, reason=f"{candidate.score / chosen.score:.2f} x the time of {chosen.label}")
        else:
            yield Skipped(what=label, reason=candidate.reason)
    assert chosen.verdict is not None
    for note in chosen.verdict.notes:
        yield Skipped(what="dynamic batching", reason=note)
    unbatched = TARGETS[target].package.why_unbatched(chosen.format)
    if chosen.verdict.padding is not None and not unbatched:
        yield chosen.verdict.padding
    if unbatched:
        yield Skipped(what="dynamic batching", reason=unbatched)
    if chosen.format == "pt2":
        yield Applied(what="pt2 is machine code for this CPU", detail="serve it where it was exported, or export there")
    if chosen.level > 1:
        worst = chosen.verdict.worst
        detail = f"error {worst.error:.1e}, at most {worst.tolerance:.0e} was asked for; cosine {worst.cosine:.6f}"
        yield Applied(what=f"level {chosen.level}", detail=detail)
    elif chosen.format == "openvino":
        detail = "NVIDIA's openvino backend has no setting for it, and takes bf16 on CPUs that have it"
        yield Applied(what="float32 inference in `kpdeploy serve`", detail=f"{detail}: run `kpdeploy verify` there")


def _told_of(fused: Mapping[str, Fusion], chosen: Candidate) -> tuple[Decision, ...]:
    """What the fused form of the chosen format holds; of the first format where that one has none."""
    fusion = fused.get(chosen.format) or next(iter(fused.values()), None)
    return fusion.decisions if fusion is not None else ()


def _manifest(
    model: Model,
    target: str,
    candidates: Sequence[Candidate],
    chosen: Candidate,
    tolerances: Mapping[str, float],
    decisions: Sequence[Decision],
) -> Manifest:
    assert chosen.verdict is not None
    assert chosen.artifact is not None
    package = TARGETS[target].package
    unbatched = bool(package.why_unbatched(chosen.format))
    inputs, outputs = package.served_names(chosen.format, model.signature)
    return Manifest(
        model=model.name,
        version=0,
        target=target,
        format=chosen.format,
        filename=chosen.artifact.filename,
        signature=model.signature,
        max_batch_size=0 if unbatched else chosen.verdict.max_batch_size,
        input_names=inputs,
        output_names=outputs,
        settings=chosen.settings,
        files={},
        tolerances=tolerances,
        decisions=tuple(decisions),
        formats=tuple(candidate.to_json() for candidate in candidates),
        source={**model.source, "git": _git_state()},
        environment=environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        padded_axes=() if unbatched else chosen.verdict.padded_axes,
        contract={n: contract(chosen.artifact.folder / n) for n in chosen.settings.get("op_libraries", ())},
    )


def _remember(deployment: Deployment, windows: Sequence[Windows], baseline: Baseline, progress: Progress) -> None:
    """Append the export to the history. That it cannot be is told, and fails nothing."""
    entry = Entry(
        kind="export",
        model=deployment.model,
        version=str(deployment.version),
        values=values_of(windows),
        windows=tuple(windows),
        environment=baseline.environment,
        label=branch(),
    )
    if failed := record(entry):
        progress.say(f"not in the history: {failed}")


def _publish(repo: str, manifest: Manifest, chosen: Candidate, baseline: Baseline) -> Deployment:
    from kpdeploy.serving.triton.config import LABELS

    assert chosen.artifact is not None
    baseline.write(chosen.artifact.folder)
    if labels := manifest.serving.get("labels"):
        (chosen.artifact.folder / LABELS).write_text("".join(f"{label}\n" for label in labels))
    return TARGETS[manifest.target].package.publish(repo, manifest, chosen.artifact.folder)


# What is measured afterwards


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a rollout ended."""

    model: str
    to: int
    against: int
    decision: RolloutDecision
    trial: Trial
    resumed: bool

    def error(self) -> RolledBack | None:
        if self.decision.promote:
            return None
        return RolledBack(
            f"{self.model} version {self.to} is not promoted; version {self.against} serves",
            why=self.decision.why,
            next_step="give it more time with --seconds" if self.decision.undecided else "fix it, and export again",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "to": self.to, "against": self.against, "promoted": self.decision.promote,
            "resumed": self.resumed, "decision": self.decision.to_json(), "trial": asdict(self.trial),
        }  # fmt: skip


def check(
    repo: str,
    *,
    against: str,
    model: str | None = None,
    seconds: float = 60,
    points: Sequence[Point] = (),
    threads: int = 1,
    criteria: Criteria | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare a version with an earlier one, side by side on this machine, or with stored windows.

    Args:
        repo: REPO, or REPO@VERSION; without a version the committed one.
        against: REPO@VERSION or a version's number; a version's folder or its baseline.json; or a label of the history,
            such as main.
        seconds: how long to measure, at most and about. threads: of each runtime; 0: as it is served.

    Raises:
        RepositoryBroken, DigestMismatch, UnknownName: a version is not there, or not what was proven.
        NothingToCompare: no baseline, or of another model. InputMismatch: a point outside of the range.
        ProofFailed: an artifact cannot be run here.
    """
    judged, shown = criteria or Criteria(), progress or Progress()
    with ExitStack() as held:
        new = _side(held, *_at_version(repo), model)
        old = _reference(held, against, repo, new)
        if isinstance(old, Side):
            report = check_versions(
                new, old, criteria=judged, seconds=seconds, points=points, threads=threads, progress=shown
            )
        else:
            report = check_against(new, old, criteria=judged, seconds=seconds, progress=shown)
    if failed := record(report.entry(str(new.manifest.version))):
        shown.say(f"not in the history: {failed}")
    return report


def rollout(
    repo: str,
    *,
    to: int,
    against: int,
    url: str,
    model: str | None = None,
    seconds: float = 60,
    ready_timeout_s: float = 60,
    criteria: Criteria | None = None,
    progress: Progress | None = None,
) -> Rollout:
    """Try version `to` beside version `against` on the running server at `url`; promote it, or roll back.

    During the trial `against` serves, and `to` runs beside it as the model NAME-canary: no user's request reaches it.
    The server must serve new versions of `repo` by itself (`kpdeploy serve --poll`, or tritonserver in poll mode), or
    be reachable at its HTTP port with its model control open. A trial that was stopped goes on where it was.

    Raises:
        RepositoryBroken, UnknownName: a version is not there. NothingToCompare: they take different requests.
        RepositoryBusy: a rollout of other versions was stopped here. Unreachable, NotReady: the server.
        RolledBack: the trial says no, or the server does not serve the promoted version; `against` serves.
    """
    from kpdeploy.serving.repository import find_version
    from kpdeploy.serving.storage import local_path
    from kpdeploy.serving.triton.repository import activate, publish, withdraw

    shown = progress or Progress()
    place = Path(_local_repository(local_path(repo)))
    model = model or _tried(place)
    new, old = find_version(str(place), model, to), find_version(str(place), model, against)
    same_model(new.manifest, old.manifest, f"version {to}", f"version {against}")
    state = place / new.model / STATE
    trial = Trial.read(state)
    if trial is not None and (trial.to, trial.against) != (to, against):
        raise RepositoryBusy(
            f"a rollout of version {trial.to} against {trial.against} was stopped here",
            next_step=f"go on with it (--to {trial.to} --against {trial.against}), or end it with --abort",
        )
    resumed = trial is not None
    trial = trial or Trial(to=to, against=against, canary=f"{new.model}{CANARY}")
    with connect(url) as client:
        client.live()
        new.manifest.check_files(Path(new.folder))
        if find_version(str(place), new.model, None).version != against:
            shown.say(f"version {against} serves during the trial; {to} was named before")
            activate(old)
        if not resumed or not (place / trial.canary).exists():
            withdraw(place, trial.canary)
            publish(str(place), replace(new.manifest, model=trial.canary), Path(new.folder))
        trial.write(state)
        canary = find_version(str(place), trial.canary, None)
        with shown.step(f"waiting until the server serves {trial.canary}"):
            _await_served(client, canary, ready_timeout_s)
            _await_served(client, old, ready_timeout_s)
        decision = try_out(
            client, old, canary, trial, state=state, criteria=criteria or Criteria(), seconds=seconds, progress=shown
        )
        if decision.promote:
            activate(new)
            try:
                with shown.step(f"waiting until the server serves version {to}"):
                    _await_served(client, new, ready_timeout_s)
            except KpdeployError as error:
                decision = replace(decision, promote=False, why=f"promoted, it was not served: {error.what}")
                activate(old)
        withdraw(place, trial.canary)
        state.unlink(missing_ok=True)
    return Rollout(model=new.model, to=to, against=against, decision=decision, trial=trial, resumed=resumed)


def abort_rollout(repo: str, *, model: str | None = None) -> Trial:
    """End a rollout that was stopped: the version before it serves, and the canary is gone.

    Raises:
        NothingToCompare: there is none.
    """
    from kpdeploy.serving.repository import find_version, read_repository
    from kpdeploy.serving.triton.repository import activate, withdraw

    place = Path(_local_repository(repo))
    names = [model] if model else [d.model for d in read_repository(str(place))]
    for name in names:
        trial = Trial.read(place / name / STATE)
        if trial is not None:
            activate(find_version(str(place), name, trial.against))
            withdraw(place, trial.canary)
            (place / name / STATE).unlink()
            return trial
    raise NothingToCompare(f"no rollout was stopped in {repo}", next_step="nothing is to be done")


def _tried(repo: Path) -> str | None:
    """The model that is meant where none is named: the only one, but for the canary of a trial that was stopped."""
    from kpdeploy.serving.repository import read_repository

    names = {deployment.model for deployment in read_repository(str(repo))}
    own = [name for name in names if name.removesuffix(CANARY) not in names - {name}]
    return own[0] if len(own) == 1 else None


def _local_repository(repo: str) -> str:
    if "://" in repo:
        raise UnknownName(
            f"{repo} is no folder",
            why="a rollout replaces config.pbtxt under a lock, which only a file system has",
            next_step="give the folder that the server serves",
        )
    return repo


def _await_served(client: Client, deployment: Deployment, timeout_s: float) -> None:
    """Until the server has this version and its golden answers come back; it is asked to load it where it may be."""
    from kpdeploy.serving.triton import control

    end = time.monotonic() + timeout_s
    asked = False
    while time.monotonic() < end:
        with suppress(ModelNotServed):
            if client.model_ready(deployment.model, deployment.version):
                replay(client, deployment, Baseline.read(Path(deployment.folder)))
                return
        if not asked and client.protocol == "http" and time.monotonic() > end - timeout_s + 3:
            asked = True
            with suppress(KpdeployError):
                control.load(client.address, deployment.model, timeout_s=timeout_s)
        time.sleep(0.2)
    raise NotReady(
        f"the server at {client.address} does not serve {deployment.model} version {deployment.version}",
        why=f"it did not within {timeout_s:g} s",
        next_step="start it so that it sees new versions: kpdeploy serve REPO --poll (or tritonserver "
        "--model-control-mode=poll), then give the same command again",
    )


def _at_version(text: str) -> tuple[str, int | None]:
    repo, at, version = text.rpartition("@")
    return (repo, int(version)) if at and version.isdecimal() else (text, None)


def _side(held: ExitStack, repo: str, version: int | None, model: str | None) -> Side:
    from kpdeploy.serving.repository import find_version, local_files

    deployment = find_version(repo, model, version)
    folder = held.enter_context(local_files(deployment))
    deployment.manifest.check_files(folder)
    name = f"{deployment.model} {repo.rstrip('/')}@{deployment.version}"
    return Side(name=name, folder=folder, manifest=deployment.manifest, baseline=Baseline.read(folder))


def _reference(held: ExitStack, against: str, repo: str, new: Side) -> Side | Reference:
    """What `against` names: a version, a stored baseline, or a label of the history."""
    place, version = _at_version(against)
    if against.isdecimal():
        place, version = _at_version(repo)[0], int(against)
    if version is not None:
        return _side(held, place, version, new.manifest.model)
    path = Path(against)
    if path.exists():
        return _stored(path)
    with open_history() as history:
        found = history.windows(new.manifest.model, against)
    if found is None:
        raise NothingToCompare(
            f"there is nothing to compare {new.name} with",
            why=f"{against!r} is no REPO@VERSION, no file, and no label that the history has of {new.manifest.model}",
            next_step="give a version, such as --against models@3",
        )
    windows, where, at = found
    name = f"{against} of {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"
    return Reference(name=name, model=new.manifest.model, windows=windows, environment=where)


def _stored(path: Path) -> Reference:
    folder = path if path.is_dir() else path.parent
    if not (folder / BASELINE).is_file():
        raise NothingToCompare(
            f"{path} holds no baseline",
            why=f"there is no {folder / BASELINE}",
            next_step="give the folder of a version, or its baseline.json; or a version, such as --against models@3",
        )
    model = Manifest.read(folder).model if (folder / MANIFEST).is_file() else ""
    baseline = Baseline.read(folder)
    return Reference(name=str(path), model=model, windows=baseline.windows, environment=baseline.environment)


def _git_state() -> dict[str, Any] | None:
    """The commit that the user's folder stands at, and whether it has changes; None outside a checkout."""
    if shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (subprocess.SubprocessError, OSError):
        return None


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What `watch` started: the server, Prometheus with Alertmanager, and the address of the probe's metrics."""

    server: Server
    stack: Stack
    probe: str


@contextmanager
def watch(
    repo: str,
    *,
    slo: Slo,
    webhook: str,
    rate: float = 1.0,
    window_seconds: float = 15.0,
    scrape_seconds: int = 5,
    prometheus_port: int = 0,
    alertmanager_port: int = 0,
    ready_timeout_s: float = 120.0,
    revive: bool = True,
    intervals: Intervals | None = None,
    progress: Progress | None = None,
) -> Iterator[Watching]:
    """Serve a repository on this machine and watch it until the block ends: server, probe, rules, Alertmanager.

    A model without a served baseline gets one first: 20 windows of `window_seconds`, kept beside its version. With
    `revive` False the server stays as Triton is: a model whose process died is not loaded again.

    Raises:
        KpdeployError: as kpdeploy.serve, kpdeploy.monitoring.served.record and kpdeploy.monitoring.stack.stack.
    """
    from kpdeploy.monitoring import alerts, probe, served, stack
    from kpdeploy.serving.repository import read_repository
    from kpdeploy.serving.triton.server import serve

    progress = progress or Progress()
    intervals = intervals or alerts.Intervals(every=scrape_seconds)
    for program in stack.PACKAGES:
        stack.program(program)
    with (
        serve(
            repo,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            revive=revive,
            ready_timeout_s=ready_timeout_s,
            progress=progress,
        ) as server,
        work_folder() as work,
    ):
        url = f"grpc://{server.grpc}"
        exporter, watched, probes = probe.Exporter(), [], []
        for deployment in read_repository(repo):
            recorded = served.find_served(deployment)
            if recorded is None or recorded.rate != rate:
                recorded = served.record(
                    repo, deployment.model, url=url, rate=rate, window_seconds=window_seconds, progress=progress
                )
                recorded.write(served.served_path(deployment))
            watched.append(alerts.watched(deployment, (), (), recorded))
            probes.append(probe.Probe(repo, deployment.model, url=url, rate=rate, exporter=exporter, say=progress.say))
        rules = work / "rules.yml"
        rules.write_text(stack.to_yaml(alerts.rule_groups(watched, slo=slo, intervals=intervals)))
        with (
            probe.probing(probes),
            stack.export_metrics(exporter.registry, 0) as metrics,
            stack.stack(
                rules,
                webhook=webhook,
                targets={"kpdeploy-probe": metrics, "triton": f"{server.ports.client_host}:{server.ports.metrics}"},
                every_seconds=scrape_seconds,
                prometheus_port=prometheus_port,
                alertmanager_port=alertmanager_port,
            ) as running,
        ):
            yield Watching(server=server, stack=running, probe=metrics)
