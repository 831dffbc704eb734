"""Valid random inputs, and the points of the dynamic range at which an artifact is proven. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kpdeploy.signature import Point, Signature, TensorSpec, Values

Array = npt.NDArray[np.generic]
Tensors = Mapping[str, Array]
"""Arrays by tensor name."""

PROOF_POINTS = 6


def of_bytes(values: Iterable[bytes], shape: tuple[int, ...]) -> Array:
    """Files or texts (the dtype BYTES) as an array of this shape: each element is one `bytes`."""
    found: npt.NDArray[Any] = np.empty(shape, object)
    # Not np.array(…): NumPy would take equal lengths for an array of texts, and cut zeros at their end.
    for index, value in zip(np.ndindex(shape), values, strict=True):
        found[index] = value
    return found


def sample(signature: Signature, point: Point, rng: np.random.Generator) -> dict[str, Array]:
    """Fresh random inputs at one point: valid for the model, as each input's `values` says."""
    return {spec.name: _draw(spec, spec.dims(point), rng) for spec in signature.inputs}


def _draw(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    dtype = np.dtype(spec.dtype)
    values = spec.values or default_values(spec.dtype)
    if values.kind == "prefix_mask":
        width = shape[-1]
        lengths = rng.integers(1, width, size=(*shape[:-1], 1), endpoint=True)
        # One full row: the longest request of a real batch is not padded.
        lengths.reshape(-1)[:1] = width
        return (np.arange(width) < lengths).astype(dtype)
    if values.kind == "normal":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind in "iub":
        return rng.integers(int(values.low), int(values.high), size=shape, endpoint=True).astype(dtype)
    return rng.uniform(values.low, values.high, size=shape).astype(dtype)


def default_values(dtype: str) -> Values:
    """What an input of this dtype holds when nothing is known: N(0, 1), or 0 and 1 for integers and bools."""
    return Values(kind="normal") if np.dtype(dtype).kind == "f" else Values(kind="range", low=0, high=1)


def proof_points(signature: Signature, rng: np.random.Generator) -> list[dict[str, int]]:
    """At least six distinct points where the range has six: the smallest, the largest, batch 1 at full size,
    odd sizes, and random ones. The first is the smallest, the second the largest."""
    axes = signature.axes
    if not axes:
        return [{}]
    batch = lead_axis(signature)
    odd = {a.name: _odd((a.min + a.max) // 2, a.min, a.max) for a in axes}
    wanted: list[dict[str, int]] = [
        {a.name: a.min for a in axes},
        {a.name: a.max for a in axes},
        {a.name: a.min if a.name == batch else a.max for a in axes},
        odd,
        {a.name: min(a.max, max(a.min, 2)) if a.name == batch else odd[a.name] for a in axes},
    ]
    points: list[dict[str, int]] = []
    for point in wanted + list(_random_points(signature, rng, tries=64)):
        if point not in points and (len(points) < PROOF_POINTS or point in wanted):
            points.append(point)
    return points


def _odd(size: int, low: int, high: int) -> int:
    return size if size % 2 or not low <= size + 1 <= high else size + 1


def _random_points(signature: Signature, rng: np.random.Generator, *, tries: int) -> Iterator[dict[str, int]]:
    for _ in range(tries):
        yield {a.name: int(rng.integers(a.min, a.max, endpoint=True)) for a in signature.axes}


def middle_point(signature: Signature, *, batch: int) -> dict[str, int]:
    """A usual request: `batch` along the leading axis, and half of the range (at most 128) elsewhere."""
    lead = lead_axis(signature)
    return {a.name: min(max(batch if a.name == lead else min(128, a.max // 2), a.min), a.max) for a in signature.axes}


def measured_points(signature: Signature) -> list[dict[str, int]]:
    """Where speed is measured: one usual request alone, and a batch of eight."""
    points = [middle_point(signature, batch=1), middle_point(signature, batch=8)]
    return points[:1] if points[0] == points[1] else points


def point_of(signature: Signature, inputs: Tensors) -> Point:
    """The sizes of the dynamic axes in a request."""
    sizes = ((dim, size) for s in signature.inputs for dim, size in zip(s.shape, inputs[s.name].shape, strict=True))
    return {dim: size for dim, size in sizes if isinstance(dim, str)}


def point_name(point: Point) -> str:
    """A point of the dynamic range as text: batch=8,seq=128."""
    return ",".join(f"{name}={size}" for name, size in point.items())


def lead_axis(signature: Signature) -> str:
    """The name of the axis that counts requests; the first axis where none leads every tensor."""
    if signature.batch_axis is not None:
        return signature.batch_axis.name
    return signature.axes[0].name if signature.axes else ""
