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


def holding(buckets: Sequence[Sizes], sizes: Sizes, padded: Sequence[str]) -> list[int]:
    """The indices of the buckets that hold these sizes, those first in which the least is computed. `tokens` are a
    bucket's own, whatever the sizes say."""

    def holds(bucket: Sizes) -> bool:
        return all(bucket[a] == n or (a in padded and bucket[a] > n) for a, n in sizes.items())

    def work(index: int) -> tuple[int, int]:
        bucket = buckets[index]
        whole = math.prod(n for axis, n in bucket.items() if axis != "tokens")
        return bucket.get("tokens", whole), whole

    return sorted((i for i, bucket in enumerate(buckets) if holds(bucket)), key=work)


class Ladder:
    """Which bucket a request runs in. What is found out about shapes is kept: a server that wakes up for a request
    runs Python three times slower than a loop does."""

    KEPT = 4096
    """So many shapes."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        self.described = described
        self.known: dict[Any, tuple[list[tuple[float, int]], list[tuple[slice, ...]]]] = {}

    def find(self, arrays: Sequence[Any], tokens: int = 0) -> tuple[int | None, list[tuple[slice, ...]]]:
        """The index of the bucket with the least to compute (None: none holds the request and its tokens), and what of
        each output of that bucket is the request's."""
        key = tuple([array.shape for array in arrays])
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= self.KEPT:
                self.known.clear()
            found = self.known[key] = self._examined(arrays)
        for most, index in found[0]:
            if most >= tokens:
                return index, found[1]
        return None, found[1]

    def _examined(self, arrays: Sequence[Any]) -> tuple[list[tuple[float, int]], list[tuple[slice, ...]]]:
        """The buckets that hold arrays of these shapes, each with its room for tokens, the least to compute first."""
        buckets = self.described["buckets"]
        sizes = sizes_of(arrays, self.described["inputs"])
        indices = holding(buckets, sizes, self.described["padded"])
        cuts = [
            tuple(slice(sizes[d]) if isinstance(d, str) and d in sizes else slice(None) for d in shape)
            for shape in self.described["outputs"]
        ]
        return [(buckets[index].get("tokens", math.inf), index) for index in indices], cuts


def largest_first(buckets: Sequence[Sizes]) -> list[int]:
    """The indices of buckets in the order to capture them in: what all share is as large as it must be at once."""
    return sorted(range(len(buckets)), key=lambda index: -math.prod(buckets[index].values()))


def shape_in(bucket: Sizes, shape: Shape) -> list[int]:
    """A shape in a bucket."""
    return [bucket[d] if isinstance(d, str) else d for d in shape]


def fill(target: Any, array: Any) -> None:
    """A request's array into a bucket's memory, zeros behind it."""
    if target.shape == array.shape:
        target[...] = array
        return
    target[...] = 0
    target[tuple(map(slice, array.shape))] = array


def pack(
    mask: np.ndarray[Any, Any],
    sources: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    begins: np.ndarray[Any, Any],
) -> None:
    """Write the three inputs of a program that drops padding: where each token comes from in a batch of rows and
    columns, where it goes, and where the tokens of each row begin (rows + 1). What is beyond the tokens of `mask`
    comes from anywhere, and goes behind the batch."""
    rows, columns = mask.shape
    flat = mask.reshape(-1).nonzero()[0]
    count = len(flat)
    sources[:count] = targets[:count] = flat
    sources[count:] = 0
    targets[count:] = mask.size
    begins[:] = flat.searchsorted(np.arange(rows + 1) * columns)
