"""How far an answer is from its reference, and how far it may be. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kpdeploy.artifact import Comparison
from kpdeploy.errors import UnknownName
from kpdeploy.inputs import Array, Tensors

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "integer": 0.0}
"""Largest ‖out − ref‖ / ‖ref‖ by dtype: about a hundred roundings. Integers and bools: the share that may differ."""


def relative_error(out: Array, ref: Array) -> float:
    """‖out − ref‖ / ‖ref‖ in float64, or the share of differing elements for integers and bools.

    Infinite where shapes or kinds differ, or where only one of the two is NaN or infinite.
    """
    if out.shape != ref.shape or out.dtype.kind != ref.dtype.kind:
        return float("inf")
    if ref.size == 0:
        return 0.0
    if ref.dtype.kind != "f":
        return float(np.mean(out != ref))
    finite = np.isfinite(ref)
    if not np.array_equal(out[~finite], ref[~finite], equal_nan=True) or not np.isfinite(out[finite]).all():
        return float("inf")
    wanted = ref[finite].astype(np.float64)
    distance = float(np.linalg.norm(out[finite].astype(np.float64) - wanted))
    length = float(np.linalg.norm(wanted))
    return distance / length if length else distance


def least_cosine(out: Array, ref: Array) -> float:
    """The least cosine between a row of `out` (its first axis) and the same of `ref`; 1 for integers, for what is
    empty, and for rows of zeros that agree; 0 where shapes differ or numbers are not finite."""
    if ref.dtype.kind != "f" or ref.size == 0:
        return 1.0
    if out.shape != ref.shape or not np.isfinite(out).all() or not np.isfinite(ref).all():
        return 0.0
    rows = ref.shape[0] if ref.ndim > 1 else 1
    a, b = (x.astype(np.float64).reshape(rows, -1) for x in (out, ref))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.einsum("ij,ij->i", a, b)
    same = (a == b).all(axis=1).astype(np.float64)
    return float(np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), same).min())


def agreement(out: Array, ref: Array) -> float:
    """The share of rows along the last axis whose largest element is in the same place (top-1); 1 for integers and for
    what is empty, 0 where shapes differ. A row that is not finite agrees with none."""
    if ref.dtype.kind != "f" or ref.size == 0 or not ref.ndim:
        return 1.0
    if out.shape != ref.shape:
        return 0.0
    finite = np.isfinite(out).all(axis=-1) & np.isfinite(ref).all(axis=-1)
    return float(np.mean((out.argmax(axis=-1) == ref.argmax(axis=-1)) & finite))


METRICS: Mapping[str, Callable[[Array, Array], float]] = {
    "error": relative_error,
    "cosine": lambda out, ref: 1 - least_cosine(out, ref),
    "top1": lambda out, ref: 1 - agreement(out, ref),
}
"""How far an answer is from its reference, by the name of the measure: 0 is equal. `cosine` suits embeddings, `top1`
logits."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far answers of fewer bits may be from the model's: `bound` is the largest `metric` (see METRICS), so that a
    cosine of 0.99 at least is a bound of 0.01."""

    metric: str = "error"
    bound: float = 1e-2

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """1e-2 or "error=1e-2": the largest relative error. "cosine=0.99", "top1=0.99": the least of either.

        Raises:
            UnknownName: it is neither.
        """
        metric, _, number = str(text).rpartition("=")
        metric = metric.strip() or "error"
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        bound = value if metric == "error" else 1 - value
        if metric not in METRICS or not 0 < bound < (math.inf if metric == "error" else 1):
            raise UnknownName(
                f"{text!r} is no accuracy budget",
                next_step="give the largest relative error, such as 1e-2, or the least that is right of a task's "
                "measure: cosine=0.99 (embeddings), top1=0.99 (logits)",
            )
        return cls(metric=metric, bound=bound)

    def __str__(self) -> str:
        return f"error {self.bound:g}" if self.metric == "error" else f"{self.metric} {1 - self.bound:g}"

    @property
    def tolerances(self) -> dict[str, float]:
        """What `compare` takes. Integers may differ in as large a share."""
        bounds = dict.fromkeys(TOLERANCES, self.bound)
        return bounds if self.metric == "error" else {self.metric: self.bound, "integer": self.bound}

    @property
    def as_error(self) -> float:
        """A relative error of that size: exact for a cosine, a rule of thumb for top1."""
        return self.bound if self.metric == "error" else math.sqrt(2 * self.bound)

    def distance(self, out: Iterable[Array], ref: Iterable[Array]) -> float:
        """The largest over several tensors."""
        pairs = zip(out, ref, strict=True)
        return max(METRICS[self.metric if b.dtype.kind == "f" else "error"](a, b) for a, b in pairs)

    def of_all(self, distances: Sequence[float]) -> float:
        """Of several answers: the worst; by top-1, which counts answers, the mean."""
        return sum(distances) / len(distances) if self.metric == "top1" else max(distances)


def tolerance(dtype: str, tolerances: Mapping[str, float]) -> float:
    """The tolerance of a dtype; all integers and bools share one."""
    return tolerances[dtype if np.dtype(dtype).kind == "f" else "integer"]


def worst_of(found: Iterable[Comparison]) -> list[Comparison]:
    """The worst comparison of each output; by top-1, which counts answers, the mean of all with the worst's figures."""
    several: dict[str, list[Comparison]] = {}
    for comparison in found:
        several.setdefault(comparison.output, []).append(comparison)
    return [_pooled(comparisons) for comparisons in several.values()]


def _pooled(several: list[Comparison]) -> Comparison:
    worst = several[0]
    for comparison in several:
        # Not `>`: an error that is not a number must never be lost.
        if not comparison.error <= worst.error:
            worst = comparison
    if worst.metric == "top1":
        error = sum(comparison.error for comparison in several) / len(several)
        return replace(worst, error=error, top1=1 - error)
    return worst


def compare(out: Tensors, ref: Tensors, tolerances: Mapping[str, float]) -> list[Comparison]:
    """One Comparison per output of `ref`; an output that is absent has an infinite error. `tolerances` are by dtype;
    with one of METRICS among them, it is that which is compared of floats."""
    metric = next((name for name in METRICS if name in tolerances), "error")
    return [_compared(name, out.get(name), wanted, metric, tolerances) for name, wanted in ref.items()]


def _compared(name: str, out: Array | None, ref: Array, metric: str, tolerances: Mapping[str, float]) -> Comparison:
    if ref.dtype.kind != "f":
        metric = "error"
    allowed = tolerance(str(ref.dtype), tolerances) if metric == "error" else tolerances[metric]
    if out is None:
        return Comparison(output=name, error=float("inf"), tolerance=allowed, cosine=0.0, top1=0.0, metric=metric)
    return Comparison(
        output=name,
        error=METRICS[metric](out, ref),
        tolerance=allowed,
        cosine=least_cosine(out, ref),
        top1=agreement(out, ref),
        metric=metric,
    )
