"""The proof: an artifact, reloaded from disk in a fresh process in the runtime that will serve it, against the
unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kpdeploy.artifact import Comparison, Verdict
from kpdeploy.compare import compare, worst_of
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ProofFailed
from kpdeploy.inputs import Array, Tensors, default_values, middle_point, proof_points, sample
from kpdeploy.runtimes import ragged
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
    """Put every question to the artifact in `process`; then find the batch size that it really handles, and whether
    padded requests can share a batch.

    Raises:
        ProofFailed: the artifact could not be run on a question.
    """
    comparisons = ask(process, signature, asked, tolerances)
    if not all(c.passed for c in comparisons):
        return Verdict(comparisons=comparisons, points=len(asked), max_batch_size=0)
    size, note = largest_batch(process, signature, tolerances, rng)
    padded, padding = neutral_padding(process, signature, size, tolerances, rng)
    return Verdict(
        comparisons=comparisons,
        points=len(asked),
        max_batch_size=size,
        notes=(note,) if note else (),
        padded_axes=padded,
        padding=padding,
    )


def ask(
    process: RuntimeProcess, signature: Signature, asked: Sequence[Question], tolerances: Mapping[str, float]
) -> tuple[Comparison, ...]:
    """Put every question to the artifact in `process`; the worst comparison of each output.

    Raises:
        ProofFailed: the artifact could not be run on a question.
    """
    comparisons: list[Comparison] = []
    for question in asked:
        try:
            answer = _answer(process, signature, question.inputs)
        except ProofFailed as error:
            raise ProofFailed(f"{error.what} at {_sizes(question.point)}", why=error.why) from None
        comparisons += compare(answer, question.expected, tolerances)
    return tuple(worst_of(comparisons))


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


def masked_axes(signature: Signature) -> tuple[str, ...]:
    """The dynamic axes beside the batch that a mask is over: what a request holds there can be told from padding."""
    batch = signature.batch_axis.name if signature.batch_axis is not None else None
    lasts = [s.shape[-1] for s in signature.inputs if s.values is not None and s.values.kind == "prefix_mask"]
    return tuple(dict.fromkeys(axis for axis in lasts if isinstance(axis, str) and axis != batch))


def neutral_padding(
    process: RuntimeProcess, signature: Signature, size: int, tolerances: Mapping[str, float], rng: np.random.Generator
) -> tuple[tuple[str, ...], Decision | None]:
    """The axes along which requests padded by zeros, in one batch of at most `size` rows, get the answers that they get
    alone; and what showed it. Nothing to decide where no input is a mask or the artifact does not batch."""
    axes = masked_axes(signature)
    if not axes or size < 2:
        return (), None
    what = f"requests of different {' and '.join(axes)} are merged"
    for spec in signature.inputs:
        values = spec.values or default_values(spec.dtype)
        if values.kind == "range" and not values.low <= 0 <= values.high and set(axes) & set(spec.shape):
            return (), Skipped(what=what, reason=f"0, the padding, is no valid value of {spec.name}")
    worst = 0.0
    for points in _ragged_points(signature, axes, size):
        # Every other request has a mask of its own, with zeros at its end, as the second row of a sample has.
        rows = [i % 2 for i in range(len(points))]
        samples = [sample(signature, point, rng) for point in points]
        requests = [{n: a[row : row + 1] for n, a in s.items()} for s, row in zip(samples, rows, strict=True)]
        try:
            found = _padded_apart(process, signature, axes, requests, tolerances)
        except ProofFailed as error:
            return (), Skipped(what=what, reason=f"padded requests fail: {error.why}")
        for request, comparison in found:
            if not comparison.passed:
                sizes = ", ".join(f"{axis} {request[axis]}" for axis in axes)
                reason = f"padding changes {comparison.output} at {sizes} by {comparison.error:.1e}"
                return (), Skipped(what=what, reason=f"{reason}, at most {comparison.tolerance:.0e} is right")
            worst = max(worst, comparison.error)
    return axes, Applied(what=what, detail=f"padding proven neutral, worst error {worst:.1e}")


def _ragged_points(signature: Signature, axes: Sequence[str], size: int) -> list[list[Point]]:
    """Batches of requests of different sizes: short ones, and the smallest size beside the largest."""
    usual = middle_point(signature, batch=2)
    batches: list[list[Point]] = []
    for share in ([1 / 100, 1 / 16, 1 / 8, 1 / 4], [0, 1 / 2, 1]):
        points: list[Point] = []
        for part in share:
            ends = {a.name: (a.min, a.max) for a in signature.axes if a.name in axes}
            points.append({**usual, **{name: low + round((high - low) * part) for name, (low, high) in ends.items()}})
        # The largest stays in each batch, for it is what the others are padded to.
        batches += [[*points[i : i + size - 1], points[-1]] for i in range(0, len(points) - 1, size - 1)]
    return batches


def _padded_apart(
    process: RuntimeProcess,
    signature: Signature,
    axes: Sequence[str],
    requests: Sequence[Tensors],
    tolerances: Mapping[str, float],
) -> list[tuple[dict[str, int], Comparison]]:
    """Run requests of one row each as one padded batch, and each alone: the sizes and the comparisons of each."""
    limits = {name: signature.axis(name).max for name in axes}
    names = [spec.name for spec in signature.inputs]
    whole = _answer(process, signature, {name: ragged.merge([r[name] for r in requests]) for name in names})
    compared = []
    for row, request in enumerate(requests):
        sizes = ragged.sizes([request[name] for name in names], [spec.shape for spec in signature.inputs], limits)
        assert sizes is not None
        answer = {s.name: ragged.cut(whole[s.name], s.shape, row, 1, sizes) for s in signature.outputs}
        alone = _answer(process, signature, request)
        compared += [(sizes, comparison) for comparison in compare(answer, alone, tolerances)]
    return compared


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
        why=f"output {worst.output}: {'relative error ' if worst.metric == 'error' else ''}{worst}, "
        f"over {len(asked)} points of the dynamic range",
        next_step="try another --format, or state what you accept: --tolerance float32=1e-4",
    )
