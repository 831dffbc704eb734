"""Buckets of sizes: which of them a request runs in, and what it becomes there.

Standing alone (NumPy only): the runtimes that capture CUDA graphs load this file from their own folder. A shape names
its dynamic axes: ("batch", "seq", 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Shape = Sequence[int | str]
Sizes = Mapping[str, int]


def sizes_of(arrays: Sequence[Any], shapes: Sequence[Shape]) -> dict[str, int]:
    """The sizes of the dynamic axes in a request."""
    pairs = ((d, n) for a, shape in zip(arrays, shapes, strict=True) for d, n in zip(shape, a.shape, strict=True))
    return {axis: int(size) for axis, size in pairs if isinstance(axis, str)}


def smallest(buckets: Sequence[Sizes], sizes: Sizes, padded: Sequence[str]) -> int | None:
    """The index of the bucket with the least to compute that holds these sizes; None where none does."""

    def holds(bucket: Sizes) -> bool:
        return all(bucket[a] == n or (a in (*padded, "tokens") and bucket[a] > n) for a, n in sizes.items())

    def work(index: int) -> tuple[int, int]:
        bucket = buckets[index]
        whole = math.prod(n for axis, n in bucket.items() if axis != "tokens")
        return bucket.get("tokens", whole), whole

    return min((i for i, bucket in enumerate(buckets) if holds(bucket)), key=work, default=None)


def largest_first(buckets: Sequence[Sizes]) -> list[int]:
    """The indices of buckets in the order to capture them in: what all share is as large as it must be at once."""
    return sorted(range(len(buckets)), key=lambda index: -math.prod(buckets[index].values()))


def shape_in(bucket: Sizes, shape: Shape) -> list[int]:
    """A shape in a bucket."""
    return [bucket[d] if isinstance(d, str) else d for d in shape]


def cut(result: Any, shape: Shape, sizes: Sizes) -> Any:
    """What of a bucket's result is the request's: a view."""
    return result[tuple(slice(sizes[d]) if isinstance(d, str) and d in sizes else slice(None) for d in shape)]


def fill(target: Any, array: Any) -> None:
    """A request's array into a bucket's memory, zeros behind it."""
    if target.shape != array.shape:
        target[...] = 0
    target[tuple(map(slice, array.shape))] = array


def packing(places: np.ndarray[Any, Any], batch: Sequence[int], count: int) -> list[np.ndarray[Any, Any]]:
    """The three inputs of a program that drops padding, int64: where each of `count` tokens comes from in a batch of
    rows and columns, where it goes, and where the tokens of each row begin. `places`: row and column of each real
    token, in order; what is beyond them comes from anywhere, and goes behind the batch."""
    rows, columns = batch
    flat = places[:, 0] * columns + places[:, 1]
    sources, targets = np.zeros(count, np.int64), np.full(count, rows * columns, np.int64)
    sources[: len(flat)] = targets[: len(flat)] = flat
    counts = np.bincount(places[:, 0], minlength=rows)
    return [sources, targets, np.concatenate([[0], np.cumsum(counts)])]
