"""Which buckets of sizes are captured where not all may be: a request then runs in a larger one, filled up further."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from kpdeploy.signature import Point

PROBED = 8
"""So many graphs tell what each of them takes."""


def ladders(buckets: Sequence[Point], padded: Sequence[str]) -> Iterator[list[Point]]:
    """The buckets, and then fewer and fewer of them which hold the same requests: each time every second number of
    tokens goes, or every second size along the padded axis that has the most of them."""
    left = list(buckets)
    yield left
    while True:
        sizes = {axis: len({bucket[axis] for bucket in left}) for axis in padded if axis in left[0]}
        if len({_without(bucket, "tokens") for bucket in left}) < len(left):
            left = [bucket for bucket in left if _rank(bucket, "tokens", left) % 2 == 0]
        elif max(sizes.values(), default=0) > 1:
            axis = max(sizes, key=lambda name: sizes[name])
            kept = sorted({bucket[axis] for bucket in left}, reverse=True)[::2]
            left = [bucket for bucket in left if bucket[axis] in kept]
        else:
            return
        yield left


def _rank(bucket: Point, axis: str, buckets: Sequence[Point]) -> int:
    """How many are larger of the buckets that differ along one axis alone."""
    return sum(_without(b, axis) == _without(bucket, axis) and b[axis] > bucket[axis] for b in buckets)


def _without(bucket: Point, axis: str) -> frozenset[tuple[str, int]]:
    return frozenset((name, size) for name, size in bucket.items() if name != axis)


def places_of(bucket: Point) -> int:
    """What activations grow by: the tokens of a bucket, or the product of all its sizes."""
    return bucket.get("tokens", math.prod(bucket.values()))


def some_of(buckets: Sequence[Point]) -> list[Point]:
    """At most PROBED buckets, evenly from the smallest to one of half the places of the largest."""
    ordered = sorted(buckets, key=places_of)
    half = [b for b in ordered if 2 * places_of(b) <= places_of(ordered[-1])] or ordered[:1]
    chosen = np.linspace(0, len(half) - 1, min(PROBED, len(half))).round().astype(int)
    return [half[index] for index in chosen]
