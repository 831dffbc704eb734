"""Requests of different sizes as one batch: padded with zeros, run once, and each answer cut to its request's sizes.

Standing alone (NumPy only): the proof of padding runs this file, and the Triton overlay serves with a copy of it.
A shape names its axes: ("batch", "seq", 3). `axes` are the padded ones, each with its largest proven size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str]

CALL = 16
"""What a call costs whatever it holds, in positions (an element of the padded axis, for one row). Most of it is reading
every weight once, which takes a core as long as computing 2 × FLOP/s ÷ bytes/s positions, whatever the model is: 3
(ONNX Runtime) to 19 (OpenVINO) were measured. Half or twice the right number costs a twentieth at most."""


def sizes(request: Sequence[Array], shapes: Sequence[Shape], axes: Mapping[str, int]) -> dict[str, int] | None:
    """The size of each padded axis in a request; None where its inputs disagree or leave the proven range."""
    found: dict[str, int] = {}
    for array, shape in zip(request, shapes, strict=True):
        for axis, size in zip(shape, array.shape, strict=True):
            if axis in axes and (found.setdefault(str(axis), size) != size or size > axes[str(axis)]):
                return None
    return found


def batches(
    requests: Sequence[Sequence[Array]], shapes: Sequence[Shape], axes: Mapping[str, int], *, most: int = 0
) -> list[list[int]]:
    """Which requests run together, by index: those whose sizes are equal, but for the axes that may be padded. `most`
    rows (0: any number) fit into one call."""
    alike: dict[Any, list[int]] = {}
    lengths = []
    for index, request in enumerate(requests):
        found = sizes(request, shapes, axes)
        # What the proof of padding does not cover meets only its like.
        padded = axes if found is not None else {}
        lengths.append(math.prod(found.values()) if found else 1)
        key = tuple(
            None if axis in padded else size
            for shape, array in zip(shapes, request, strict=True)
            for axis, size in zip(shape[1:], array.shape[1:], strict=True)
        )
        alike.setdefault(key, []).append(index)
    return [
        part
        for members in alike.values()
        for group in groups([len(requests[i][0]) for i in members], [lengths[i] for i in members])
        for part in _parts([members[i] for i in group], [len(request[0]) for request in requests], most)
    ]


def _parts(members: Sequence[int], rows: Sequence[int], most: int) -> list[list[int]]:
    """The members in their order, in parts of at most `most` rows."""
    parts: list[list[int]] = []
    room = 0
    for index in members:
        if not parts or (most and rows[index] > room):
            parts.append([])
            room = most
        parts[-1].append(index)
        room -= rows[index]
    return parts


def together(
    run: Callable[[list[Array]], Sequence[Array]],
    requests: Sequence[Sequence[Array]],
    shapes: Sequence[Shape],
    output_shapes: Sequence[Shape],
    axes: Mapping[str, int],
) -> list[list[Array]]:
    """The answers to requests that run as one batch."""
    if len(requests) == 1:
        return [list(run(list(requests[0])))]
    results = run([merge(parts) for parts in zip(*requests, strict=True)])
    first, answers = 0, []
    for request in requests:
        found, rows = sizes(request, shapes, axes) or {}, len(request[0])
        answers.append(
            [cut(result, shape, first, rows, found) for result, shape in zip(results, output_shapes, strict=True)]
        )
        first += rows
    return answers


def groups(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Which requests run together, by index: from the longest on, until the padding of a call outweighs another."""
    found: list[list[int]] = []
    padding = CALL + 1
    for index in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        padding += (lengths[found[-1][0]] - lengths[index]) * rows[index] if found else 0
        if padding > CALL:
            found.append([])
            padding = 0
        found[-1].append(index)
    return found


def merge(arrays: Sequence[Array]) -> Array:
    """One input of all requests: concatenated along the first axis, zeros after what is shorter in the others."""
    first = arrays[0]
    if all(array.shape[1:] == first.shape[1:] for array in arrays):
        return np.concatenate(arrays)
    largest = np.max([array.shape[1:] for array in arrays], axis=0)
    whole = np.zeros((sum(map(len, arrays)), *largest), first.dtype)
    row = 0
    for array in arrays:
        whole[(slice(row, row + len(array)), *map(slice, array.shape[1:]))] = array
        row += len(array)
    return whole


def cut(array: Array, shape: Shape, first: int, rows: int, sizes: Mapping[str, int]) -> Array:
    """The answer to one request in an output of the batch: `rows` rows from `first` on, without the padding."""
    return array[(slice(first, first + rows), *(slice(sizes.get(str(axis))) for axis in shape[1:]))]
