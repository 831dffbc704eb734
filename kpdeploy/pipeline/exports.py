"""The main job: load, capture, export, prove, measure, and publish the fastest that passed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpdeploy import checkout
from kpdeploy.artifact import MOUNT, Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import TOLERANCES, Budget
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.deployment import Deployment
from kpdeploy.errors import KpdeployError, UnknownName
from kpdeploy.hardware import conditions, environment
from kpdeploy.inputs import Array, Tensors, lead_axis, measured_points, sample
from kpdeploy.model import Model
from kpdeploy.monitoring.history import Entry, record, values_of
from kpdeploy.ops.libraries import contract
from kpdeploy.pipeline.bf16 import FusedInBf16
from kpdeploy.pipeline.candidates import Candidate, Fusion, fastest, formats_of, fuse_for, told_of, try_formats
from kpdeploy.pipeline.graphs import OnGpu
from kpdeploy.pipeline.layout import Wanted, lay_out
from kpdeploy.pipeline.levels import (
    ACCURACY_BUDGET,
    Lower,
    accepted_of,
    asked_of,
    check_latency,
    golden_of,
    rungs_of,
    unusable,
)
from kpdeploy.pipeline.measuring import measure, time_here
from kpdeploy.pipeline.room import told_when_full
from kpdeploy.progress import Progress
from kpdeploy.runtimes.worker import peak_bytes
from kpdeploy.scratch import work_folder
from kpdeploy.serving.target import TARGETS
from kpdeploy.signature import Point, Signature, parse_inputs
from kpdeploy.verify import Question, questions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export` did: every candidate, every decision, and where the result is. `fusions` are what the fused
    candidates hold, whether or not one of them was chosen; `active` says whether the version is what is served."""

    deployment: Deployment
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    decisions: tuple[Decision, ...]
    fusions: tuple[Decision, ...]
    baseline: Baseline
    seconds: float
    peak_bytes: int
    active: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "repository": self.deployment.repository,
            "folder": self.deployment.folder,
            "active": self.active,
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
    accuracy_budget: str | float = ACCURACY_BUDGET,
    latency_budget_ms: float | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    tune: str | None = None,
    memory_budget: str | None = None,
    mount: str = MOUNT,
    serving: Mapping[str, Any] | None = None,
    examine: Callable[[Deployment], None] | None = None,
    activate: bool = True,
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
        accuracy_budget: of levels 2 and 3, the largest ‖out − ref‖ / ‖ref‖, or the least that is right by a task's
            measure, such as "cosine=0.99" or "top1=0.99"; level 1 keeps `tolerance`.
        latency_budget_ms: stop at the first level whose median latency of a single request is within it.
        calibrate: samples for int8: an .npz, one array per input with the samples along its first axis, or a .txt of
            texts, one a line, where the model brings a tokenizer; without it they are drawn at random from the valid
            values. The proof asks some of them too, and they are the golden requests.
        tune: the load to measure instances, threads and allocators for: "latency" or "throughput".
        memory_budget: what all instances may take together, such as "4GiB", of the GPU where the model runs on one:
            the fastest that fits is packaged, with as many instances, CUDA graphs and as large a batch as fit.
        examine: called with the version in a repository of its own before it goes into `repo`: what this raises, export
            raises, and publishes nothing.
        activate: False: the version is published, and the one before it stays in service, until a rollout promotes it.
        mount: where the server will find the repository: the path of kernel libraries in config.pbtxt begins with it.

    Raises:
        KpdeployError: any of its kinds; then nothing was published.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    from kpdeploy.export import Capture
    from kpdeploy.load.calibration import calibration

    _check_choices(target, format, fuse, mount)
    wanted_layout = replace(
        Wanted.parse(memory_budget, tune, target), instances=dict(serving or {}).get("instances", 1)
    )
    rungs, budget = rungs_of(target, format, level, latency_budget_ms), Budget.parse(accuracy_budget)
    tolerances = _tolerances(tolerance)
    # What can be told without the model is told before minutes are spent on it.
    parse_inputs(input)
    package = TARGETS[target].package
    package.check_publishable(str(repo))
    with progress.step("loading the model"):
        loaded = _load(model, inputs, name=name, task=task, texts=input, example=example, max_batch=max_batch)
    package.check_publishable(str(repo), model=loaded.name)
    if not activate:
        _check_served(target, str(repo), loaded.name)
    with work_folder() as work, told_when_full(work):
        settled, asked, baseline = _take_baseline(loaded, stated=bool(input), progress=progress)
        samples = calibration(settled.signature, calibrate, loaded.tokenizer) if calibrate is not None else []
        real = asked_of(samples, settled, budget)
        if real:
            baseline = golden_of(real, baseline)
        tolerances, told = _fitting(tolerances, settled, given=tolerance)
        capture = Capture(settled, work)
        wanted = formats_of(target, format)
        fusing = list(wanted)
        if any(way.on_gpu and not way.missing for rung in rungs for way in rung) and format == "onnx":
            # What is for a GPU fuses the same in each format.
            fusing += formats_of(target, "cuda")
        fused = {} if fuse == "never" else fuse_for(capture, fusing, progress, must=fuse == "always")
        candidates = try_formats(capture, fused, wanted, asked + real, tolerances, progress, plain=fuse != "always")
        fusion = fused.get("cuda", Fusion(()))
        on_gpu = OnGpu(capture, fusion, samples, budget.as_error, progress)
        in_bf16 = FusedInBf16(fused, progress)
        lower = Lower(capture, asked, real, samples, budget, tolerances, progress, on_gpu, in_bf16)
        for rung in rungs:
            for way in rung:
                candidates.append(lower.candidate(way, candidates))
            candidates, windows = measure(candidates, settled.signature, progress)
            chosen = fastest(candidates, format, asked + real)
            if latency_budget_ms is not None and chosen.latencies[0].p50_ms <= latency_budget_ms:
                break
        check_latency(candidates, chosen, latency_budget_ms)
        layout = lay_out(candidates, chosen, settled.signature, wanted_layout, progress)
        if layout.chosen is not chosen or layout.thinned:
            chosen = layout.chosen
            _, windows = measure([chosen], settled.signature, progress)
        told += [*unusable(level), *layout.decisions]
        decisions = (*settled.decisions, *told, *capture.decisions, *_decided(target, candidates, chosen, fused))
        accepted = accepted_of(budget, chosen, baseline) if chosen.level > 1 else tolerances
        manifest = _manifest(settled, target, candidates, chosen, accepted, decisions)
        manifest = layout.within(replace(manifest, mount=mount, serving=dict(serving or {})))
        baseline = replace(baseline, windows=windows)
        if examine is not None:
            examine(_publish(str(work / "examined"), manifest, chosen, baseline, activate=True))
        with progress.step(f"publishing {settled.name} in {repo}"):
            deployment = _publish(str(repo), manifest, chosen, baseline, activate=activate)
    _remember(deployment, baseline, progress)
    return ExportReport(
        deployment=deployment,
        candidates=tuple(candidates),
        chosen=chosen,
        decisions=deployment.manifest.decisions,
        fusions=told_of(fused, chosen),
        baseline=baseline,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
        active=activate,
    )


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
        latencies = tuple(time_here(answer, model.signature, point) for point in measured_points(model.signature))
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


def _decided(
    target: str, candidates: Sequence[Candidate], chosen: Candidate, fused: Mapping[str, Fusion]
) -> Iterator[Decision]:
    if chosen.fused or not any(fusion.capture for fusion in fused.values()):
        yield from told_of(fused, chosen)
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
        detail = f"{worst} was asked for; cosine {worst.cosine:.6f}"
        yield Applied(what=f"level {chosen.level}", detail=detail)
    elif chosen.format == "openvino":
        detail = "NVIDIA's openvino backend has no setting for it, and takes bf16 on CPUs that have it"
        yield Applied(what="float32 inference in `kpdeploy serve`", detail=f"{detail}: run `kpdeploy verify` there")


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
        source={**model.source, "git": checkout.state()},
        environment=environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        padded_axes=() if unbatched else chosen.verdict.padded_axes,
        contract={n: contract(chosen.artifact.folder / n) for n in chosen.settings.get("op_libraries", ())},
    )


def _remember(deployment: Deployment, baseline: Baseline, progress: Progress) -> None:
    """Append the export to the history. That it cannot be is told, and fails nothing."""
    entry = Entry(
        kind="export",
        model=deployment.model,
        version=str(deployment.version),
        values=values_of(baseline.windows),
        windows=baseline.windows,
        environment=baseline.environment,
        label=checkout.branch(),
    )
    if failed := record(entry):
        progress.say(f"not in the history: {failed}")


def _check_served(target: str, repo: str, model: str) -> None:
    """Raise where a version cannot be published without being served."""
    from kpdeploy.serving.repository import find_deployment

    what, next_step = f"{model} cannot wait in {repo} unserved", "export it without --no-activate"
    if not TARGETS[target].staged:
        raise UnknownName(what, why=f"{target} serves whatever its store holds", next_step=next_step)
    try:
        find_deployment(repo, model)
    except KpdeployError as error:
        raise UnknownName(
            what, why=f"the first version is the one that is served, and {error.what}", next_step=next_step
        ) from None


def _publish(repo: str, manifest: Manifest, chosen: Candidate, baseline: Baseline, *, activate: bool) -> Deployment:
    from kpdeploy.serving.triton.config import LABELS

    assert chosen.artifact is not None
    baseline.write(chosen.artifact.folder)
    if labels := manifest.serving.get("labels"):
        (chosen.artifact.folder / LABELS).write_text("".join(f"{label}\n" for label in labels))
    return TARGETS[manifest.target].package.publish(repo, manifest, chosen.artifact.folder, activate=activate)
