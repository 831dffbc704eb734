"""How far an answer is from its reference, and how far it may be. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from kpdeploy.artifact import Comparison
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


def tolerance(dtype: str, tolerances: Mapping[str, float]) -> float:
    """The tolerance of a dtype; all integers and bools share one."""
    return tolerances[dtype if np.dtype(dtype).kind == "f" else "integer"]


def worst_of(found: Iterable[Comparison]) -> list[Comparison]:
    """The worst comparison of each output."""
    worst: dict[str, Comparison] = {}
    for comparison in found:
        known = worst.setdefault(comparison.output, comparison)
        # Not `>`: an error that is not a number must never be lost.
        if not comparison.error <= known.error:
            worst[comparison.output] = comparison
    return list(worst.values())


def compare(out: Tensors, ref: Tensors, tolerances: Mapping[str, float]) -> list[Comparison]:
    """One Comparison per output of `ref`; an output that is absent has an infinite error."""
    return [
        Comparison(
            output=name,
            error=relative_error(out[name], wanted) if name in out else float("inf"),
            tolerance=tolerance(str(wanted.dtype), tolerances),
            cosine=least_cosine(out[name], wanted) if name in out else 0.0,
        )
        for name, wanted in ref.items()
    ]
