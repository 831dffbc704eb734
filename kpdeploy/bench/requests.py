"""What is sent: valid tensors at one point of the model's range, as the server names them, from the repository's
manifest or from what the server says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.utils import triton_to_np_dtype

from kpdeploy.artifact import Manifest
from kpdeploy.baseline import Baseline
from kpdeploy.errors import InputMismatch, InputsUnknown
from kpdeploy.inputs import Array, middle_point, sample
from kpdeploy.signature import BYTES, DTYPES, Axis, Signature, TensorSpec, Values

UNBOUNDED = 2**31 - 1
BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How requests are made: a signature, the server's name of each input, the point; `notes`: what was guessed.

    `batches`: the signature's first axis is one that the server adds itself (it has a max_batch_size). `golden`: the
    requests of a model whose inputs cannot be drawn, such as images.
    """

    signature: Signature
    names: Mapping[str, str]
    point: Mapping[str, int]
    batches: bool
    golden: tuple[Mapping[str, Array], ...] = ()
    notes: tuple[str, ...] = ()

    def requests(self, count: int) -> list[dict[str, Array]]:
        """`count` distinct requests, by the server's names; the same ones each time."""
        rng = np.random.default_rng(0)
        drawn: Iterable[Mapping[str, Array]] = (sample(self.signature, self.point, rng) for _ in range(count))
        drawn = islice(cycle(self.golden), count) if self.golden else drawn
        return [{self.names[name]: self._sent(array) for name, array in tensors.items()} for tensors in drawn]

    def _sent(self, array: Array) -> Array:
        # Triton carries no tensor without dims beside the batch: one number a row travels as [batch, 1].
        return array[:, None] if array.ndim == 1 and self.batches else array

    @property
    def described(self) -> tuple[str, ...]:
        return tuple(
            f"{self.names[s.name]}:{s.dtype}[{','.join(map(str, s.dims(self.point)))}]" for s in self.signature.inputs
        )


def from_repository(repo: Path, model: str, version: str, shape: Mapping[str, int]) -> Recipe:
    """Requests by the manifest of the version that the server runs.

    Raises:
        RepositoryBroken: the repository does not hold that version.
        InputMismatch: `shape` names no axis of the model, or leaves its range.
    """
    manifest = Manifest.read(repo / model / version)
    signature = manifest.signature
    golden: tuple[Mapping[str, Array], ...] = ()
    if any(spec.dtype == BYTES for spec in signature.inputs):
        golden = tuple(exchange.inputs for exchange in Baseline.read(repo / model / version).exchanges)
    names = {spec.name: served for spec, served in zip(signature.inputs, manifest.input_names, strict=True)}
    return Recipe(
        signature=signature,
        names=names,
        point=_point(signature, shape),
        batches=manifest.max_batch_size > 0 and manifest.target == "triton",
        golden=golden,
        notes=(f"the {len(golden)} golden requests, in turns",) if golden else (),
    )


def from_server(metadata: Mapping[str, Any], *, max_batch_size: int, shape: Mapping[str, int]) -> Recipe:
    """Requests by the server's own metadata (the v2 protocol's, as a dict), which knows no axis names and no values.

    The leading dimension of a model that batches is `batch`; another free dimension is `dim1`, `dim2`, … by its
    position, or has the name that `shape` gives where only one is left on both sides.

    Raises:
        InputsUnknown: an input holds strings or another dtype that cannot be made up.
        InputMismatch: `shape` names no dimension of the model.
    """
    specs = tuple(_spec(entry, batches=max_batch_size > 0) for entry in metadata["inputs"])
    free = {d: None for spec in specs for d in spec.shape if isinstance(d, str)}
    unnamed, unmatched = [d for d in free if d not in shape and d != BATCH], [d for d in shape if d not in free]
    if len(unnamed) == len(unmatched) == 1:
        shape = {unnamed[0] if d == unmatched[0] else d: size for d, size in shape.items()}
    limits = {BATCH: max_batch_size} if max_batch_size else {}
    signature = Signature(inputs=specs, axes=tuple(Axis(name=d, min=1, max=limits.get(d, UNBOUNDED)) for d in free))
    point = _point(signature, shape)
    notes = []
    if guessed := [s.name for s in specs if s.values is None and np.dtype(s.dtype).kind in "iub"]:
        notes.append(f"integers of {', '.join(guessed)} are 0 and 1: give --repo for the model's own range")
    if chosen := [f"{d}={point[d]}" for d in free if d not in shape]:
        notes.append(f"free dimensions chosen here: {', '.join(chosen)}; --shape sets them")
    names = {spec.name: spec.name for spec in specs}
    return Recipe(signature=signature, names=names, point=point, batches=False, notes=tuple(notes))


def _spec(entry: Mapping[str, Any], *, batches: bool) -> TensorSpec:
    # gRPC's JSON has 64-bit integers as strings, HTTP's as numbers.
    dims = [int(d) for d in entry["shape"]]
    shape = tuple((BATCH if batches and i == 0 else f"dim{i}") if d < 0 else d for i, d in enumerate(dims))
    found = triton_to_np_dtype(entry["datatype"])
    dtype = np.dtype(found).name if found is not None else entry["datatype"]
    if dtype not in DTYPES:
        raise InputsUnknown(
            f"input {entry['name']} is {entry['datatype']}, for which no request can be made up",
            next_step="give --repo with the repository that the model was exported to",
        )
    values = Values(kind="prefix_mask") if entry["name"].endswith("mask") and dims else None
    return TensorSpec(name=entry["name"], dtype=dtype, shape=shape, values=values)


def _point(signature: Signature, shape: Mapping[str, int]) -> dict[str, int]:
    axes = {axis.name: axis for axis in signature.axes}
    for name, size in shape.items():
        if name not in axes:
            known = ", ".join(f"{a.name}={a.min}..{a.max if a.max < UNBOUNDED else ''}" for a in axes.values())
            raise InputMismatch(
                f"the model has no dynamic axis {name!r}", next_step=f"it has {known or 'none: leave --shape out'}"
            )
        if not axes[name].min <= size <= axes[name].max:
            raise InputMismatch(
                f"{name}={size} is outside of the model's range",
                next_step=f"{name} goes from {axes[name].min} to {axes[name].max}",
            )
    return {**middle_point(signature, batch=1), **shape}
