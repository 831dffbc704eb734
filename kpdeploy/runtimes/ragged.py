"""Requests of different sizes as one batch: padded with zeros, run once, and each answer cut to its request's sizes.

Standing alone (NumPy only): the proof of padding runs this file, and the Triton overlay serves with a copy of it.
A shape names its axes: ("batch", "seq", 3). `axes` are the padded ones, each with its largest proven size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
