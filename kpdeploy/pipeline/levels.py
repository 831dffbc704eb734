"""Levels 2 and 3: what level 1 has exported, in fewer bits, within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from kpdeploy.artifact import Artifact, LayerError
from kpdeploy.backends import LEVELS, Lowering, lowerings
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import TOLERANCES, Budget, relative_error
from kpdeploy.decision import Decision, Skipped
from kpdeploy.errors import BudgetUnmet, ExportFailed, FormatUnavailable, LevelUnavailable, UnknownName
from kpdeploy.hardware import detect
from kpdeploy.inputs import Tensors, point_of
from kpdeploy.model import Model
from kpdeploy.pipeline.bf16 import FusedInBf16
from kpdeploy.pipeline.candidates import Candidate, prove_one
from kpdeploy.pipeline.graphs import OnGpu
from kpdeploy.progress import Progress
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.serving.target import TARGETS
from kpdeploy.verify import Question

if TYPE_CHECKING:
    from kpdeploy.export import Capture


ACCURACY_BUDGET = 1e-2
"""Levels 2 and 3 may differ from the model by so much, unless stated."""


ASKED_SAMPLES, COUNTED_SAMPLES = 8, 64
"""So many of the user's calibration samples are asked in the proof: where each has to be right, and where a share of
them has to be."""


GOLDEN_SAMPLES = 3


SERVED = 1.5
"""Of the budget. fp8 at 9.7e-2 of 1e-1 in the proof was seen to give 1.1e-1 when served in another batch."""


Rung = tuple[Lowering, ...]


def rungs_of(target: str, format: str, level: str, latency_ms: float | None) -> list[Rung]:
    """The ways to lower precision that will be tried, all at once; step by step where a latency may end it early.

    Raises:
        UnknownName: no such level, or a latency that is none.
        LevelUnavailable: the level was asked for, and this machine, target or format has none of its ways.
    """
    from kpdeploy.load import choose

    choose("level", level, ("auto", *map(str, LEVELS)))
    if latency_ms is not None and not 0 < latency_ms < math.inf:
        raise UnknownName(f"the latency budget {latency_ms} is not a number above 0", next_step="give one, such as 5")
    top = LEVELS[-1] if level == "auto" else int(level)
    machine = detect()
    known = [_reachable(way, target, format) for way in lowerings(machine) if way.level <= top]
    if format == "cuda" and not any(way.format == format for way in known):
        raise FormatUnavailable(
            "this machine has no NVIDIA GPU" + (" that can be used" if machine.problems else ""),
            why="; ".join(map(str, machine.problems))
            or "what the format cuda holds is proven and measured on the GPU that will run it",
            next_step="export where the GPU is, or in another format (--format auto)",
        )
    missing = [way for way in known if way.level == top and way.missing]
    if level != "auto" and (top > 1 or format == "cuda") and len(missing) == sum(way.level == top for way in known):
        raise LevelUnavailable(
            f"level {level} cannot be had here",
            why="; ".join([*(f"{way.precision}: {way.missing}" for way in missing), *map(str, machine.problems)]),
            next_step="leave it to the tool with --level auto, or see `kpdeploy doctor`",
        )
    steps = [tuple(way for way in known if way.level == step) for step in range(1, top + 1)]
    return steps if latency_ms is not None else [tuple(way for step in steps for way in step)]


def _reachable(way: Lowering, target: str, format: str) -> Lowering:
    """The same way, or what rules it out."""
    if way.missing:
        return way
    if way.on_gpu and "cuda" not in TARGETS[target].formats:
        return replace(way, missing=f"{target} runs models on the CPU here")
    if way.format not in TARGETS[target].formats:
        return replace(way, missing=f"it needs the format {way.format}, which {target} does not serve")
    if format not in ("auto", way.format):
        return replace(way, missing=f"it needs the format {way.format}, and {format} was asked for")
    return way


def unusable(level: str) -> list[Decision]:
    """Accelerators of this machine that cannot be used, where more than level 1 was asked for."""
    problems = detect().problems if level != "1" else ()
    return [Skipped(what="an accelerator of this machine", reason=str(problem)) for problem in problems]


def check_latency(candidates: Sequence[Candidate], chosen: Candidate, budget_ms: float | None) -> None:
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


def asked_of(samples: Sequence[Tensors], model: Model, budget: Budget) -> list[Question]:
    """Some of the user's own samples as questions of the proof."""
    if not samples:
        return []
    from kpdeploy.load.reference import reference

    answer = reference(model)
    count = COUNTED_SAMPLES if budget.metric == "top1" else ASKED_SAMPLES
    some = samples[:: max(1, len(samples) // count)][:count]
    points = [point_of(model.signature, inputs) for inputs in some]
    return [Question(point=p, inputs=i, expected=answer(i)) for p, i in zip(points, some, strict=True)]


def golden_of(real: Sequence[Question], baseline: Baseline) -> Baseline:
    """The baseline with real requests as the golden ones, the smallest: random ones show nothing of a task."""
    smallest = sorted(real, key=lambda question: sum(a.nbytes for a in question.inputs.values()))[:GOLDEN_SAMPLES]
    return replace(baseline, exchanges=tuple(Exchange(inputs=q.inputs, outputs=q.expected) for q in smallest))


def accepted_of(budget: Budget, chosen: Candidate, baseline: Baseline) -> dict[str, float]:
    """What a served answer may be off by: the budget and half as much again, for few bits round otherwise in another
    batch. A share of right answers says nothing of a single one; then it is twice what the golden answers of the chosen
    artifact were off by."""
    if budget.metric != "top1":
        return {kind: SERVED * bound for kind, bound in budget.tolerances.items()}
    assert chosen.artifact is not None
    worst = 0.0
    with RuntimeProcess(chosen.artifact) as process:
        for exchange in baseline.exchanges:
            answers = process.run(list(exchange.inputs.values()))
            pairs = zip(answers, exchange.outputs.values(), strict=True)
            worst = max(worst, *(relative_error(answer, wanted) for answer, wanted in pairs))
    return {**dict.fromkeys(TOLERANCES, 2 * worst), "integer": budget.bound}


@dataclass(frozen=True)
class Lower:
    """Makes candidates of levels 2 and 3 from what level 1 has exported. `asked` are random questions, `real` those of
    the user's samples: a budget by a task's measure is held against these alone, where there are any."""

    capture: Capture
    asked: Sequence[Question]
    real: Sequence[Question]
    samples: Sequence[Tensors]
    budget: Budget
    tolerances: Mapping[str, float]
    progress: Progress
    on_gpu: OnGpu | None = None
    in_bf16: FusedInBf16 | None = None

    def candidate(self, way: Lowering, known: Sequence[Candidate]) -> Candidate:
        if self.on_gpu is not None and way.on_gpu and not way.missing:
            return self.on_gpu.candidate(way, known, partial(self._proven, way))
        if self.in_bf16 is not None and way.fused and not way.missing:
            return self.in_bf16.candidate(way, partial(self._proven, way))
        blank = Candidate(format=way.format, settings=way.settings, level=way.level, reason=way.missing)
        plain = next((c.artifact for c in known if c.format == way.format and c.level == 1 and not c.fused), None)
        if way.missing:
            return replace(blank, format=way.format or way.what, settings={})
        if plain is None:
            return replace(blank, reason=f"there is no {way.format} artifact to begin with")
        told: tuple[Decision, ...] = ()
        layers: tuple[LayerError, ...] = ()
        try:
            artifact = replace(plain, settings=way.settings)
            if way.quantized:
                artifact, decision, layers = self._quantized(plain, way)
                told = (decision,)
        except ExportFailed as error:
            return replace(blank, reason=error.in_a_line)
        with self.progress.step(f"proving {blank.label} in a fresh process"):
            proven = self._proven(way, artifact)
        return replace(proven, level=way.level, layers=layers, decisions=(*told, *proven.decisions))

    def _proven(self, way: Lowering, artifact: Artifact) -> Candidate:
        """Level 1 keeps the tolerances of rounding, the others the budget."""
        if way.level == 1:
            return prove_one(artifact, self.capture.model, (*self.asked, *self.real), self.tolerances)
        apart = bool(self.real) and self.budget.metric != "error"
        judged, told_only = (self.real, self.asked) if apart else ((*self.asked, *self.real), ())
        return prove_one(artifact, self.capture.model, judged, self.budget.tolerances, told_only)

    def _quantized(self, plain: Artifact, way: Lowering) -> tuple[Artifact, Decision, tuple[LayerError, ...]]:
        from kpdeploy.export.int8 import quantize
        from kpdeploy.load.calibration import calibration

        folder = plain.folder.with_name(f"{plain.format}-{way.precision.replace(' ', '-')}")
        folder.mkdir()
        samples = self.samples or calibration(self.capture.signature, None)
        with self.progress.step(f"quantizing to {way.precision} on {len(samples)} samples (minutes)"):
            made = quantize(
                plain.path,
                folder,
                samples,
                budget=self.budget,
                scheme=way.quantized,
                precision=way.settings["precision"],
                activation_group=way.settings.get("activation_group", 0),
            )
        return replace(plain, folder=folder, settings=way.settings), made.decision, made.layers
