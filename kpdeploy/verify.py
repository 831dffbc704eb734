"""The proof: an artifact, reloaded from disk in a fresh process in the runtime that will serve it, against the
unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kpdeploy.artifact import Comparison, Verdict
from kpdeploy.compare import compare
from kpdeploy.errors import ProofFailed
from kpdeploy.inputs import Array, Tensors, middle_point, proof_points, sample
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.signature import Point, Signature


@dataclass(frozen=True, kw_only=True)
class Question:
    """Inputs at one point of the dynamic range, and the unmodified model's answer."""

    point: Point
    inputs: Tensors
    expected: Tensors


def questions(
    signature: Signature, reference: Callable[[Tensors], dict[str, Array]], rng: np.random.Generator
) -> list[Question]:
    """Fresh random questions: the smallest and largest point, batch 1, odd sizes, and random ones, six at least
    where the range has six. A model of fixed sizes is asked twice."""
    points = proof_points(signature, rng)
    asked = []
    for point in points if len(points) > 1 else points * 2:
        inputs = sample(signature, point, rng)
        asked.append(Question(point=point, inputs=inputs, expected=reference(inputs)))
    return asked


def prove(
    process: RuntimeProcess,
    signature: Signature,
    asked: Sequence[Question],
    tolerances: Mapping[str, float],
    rng: np.random.Generator,
) -> Verdict:
    """Put every question to the artifact in `process`; then find the batch size that it really handles.

    Raises:
        ProofFailed: the artifact could not be run on a question.
    """
    worst: dict[str, Comparison] = {}
    for question in asked:
        try:
            answer = _answer(process, signature, question.inputs)
        except ProofFailed as error:
            raise ProofFailed(f"{error.what} at {_sizes(question.point)}", why=error.why) from None
        for found in compare(answer, question.expected, tolerances):
            if found.output not in worst or found.error > worst[found.output].error:
                worst[found.output] = found
    comparisons = tuple(worst.values())
    if not all(c.passed for c in comparisons):
        return Verdict(comparisons=comparisons, points=len(asked), max_batch_size=0)
    size, note = largest_batch(process, signature, tolerances, rng)
    return Verdict(comparisons=comparisons, points=len(asked), max_batch_size=size, notes=(note,) if note else ())


def largest_batch(
    process: RuntimeProcess, signature: Signature, tolerances: Mapping[str, float], rng: np.random.Generator
) -> tuple[int, str]:
    """The largest batch whose rows equal the same rows asked alone, of 1, 2 and the axis' end; 0 and the reason where
    the model cannot batch."""
    axis = signature.batch_axis
    if axis is None:
        return 0, "does not batch: no axis leads every input and output"
    if axis.max < 2 or axis.min > 1:
        return 0, f"does not batch: its batch axis is fixed to {axis.min}..{axis.max}"
    proven = 0
    for size in sorted({2, axis.max}):
        inputs = sample(signature, middle_point(signature, batch=size), rng)
        if why := _rows_differ(process, signature, inputs, size, tolerances):
            return proven, f"batches only up to {proven}: {why}" if proven else f"does not batch: {why}"
        proven = size
    return proven, ""


def _rows_differ(
    process: RuntimeProcess, signature: Signature, inputs: Tensors, size: int, tolerances: Mapping[str, float]
) -> str:
    """Why the first, middle or last row of a batch is not what the row gives alone; empty if they agree."""
    try:
        whole = _answer(process, signature, inputs)
        for row in sorted({0, size // 2, size - 1}):
            alone = _answer(process, signature, {name: a[row : row + 1] for name, a in inputs.items()})
            rows = {name: a[row : row + 1] for name, a in whole.items()}
            wrong = [c for c in compare(rows, alone, tolerances) if not c.passed]
            if wrong:
                return f"row {row} of a batch of {size} differs from the row alone by {wrong[0].error:.1e}"
    except ProofFailed as error:
        return f"a batch of {size} fails: {error.why}"
    return ""


def _answer(process: RuntimeProcess, signature: Signature, inputs: Tensors) -> dict[str, Array]:
    arrays = process.run([inputs[spec.name] for spec in signature.inputs])
    return {spec.name: array for spec, array in zip(signature.outputs, arrays, strict=True)}


def _sizes(point: Point) -> str:
    return ", ".join(f"{name} {size}" for name, size in point.items()) or "its fixed sizes"


def failure(format: str, verdict: Verdict, asked: Sequence[Question]) -> ProofFailed:
    """The error for a verdict that did not pass."""
    worst = verdict.worst
    return ProofFailed(
        f"the {format} artifact does not give the model's answers",
        why=f"output {worst.output}: relative error {worst.error:.2e}, tolerance {worst.tolerance:.0e}, "
        f"over {len(asked)} points of the dynamic range",
        next_step="try another --format, or state what you accept: --tolerance float32=1e-4",
    )
