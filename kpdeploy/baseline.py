"""What the unmodified model did: golden requests with their answers, and how long they took. NumPy only, so that a
serving host reads it without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.artifact import BASELINE, GOLDEN, Latency
from kpdeploy.errors import RepositoryBroken
from kpdeploy.inputs import Array

BUCKETS_SECONDS = tuple(float(f"{0.0005 * 1.15**step:.4g}") for step in range(85))
"""Upper bounds of the latency histogram, 0.5 ms to 63 s in steps of 15 %, then infinity: the same at export, in the
probe and in every rule, for a quantile of a histogram depends on its buckets."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One golden request: its inputs and the answer, by the names of the signature."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Golden exchanges and latencies of the unmodified model, with where they were taken."""

    exchanges: tuple[Exchange, ...]
    latencies: tuple[Latency, ...]
    environment: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        arrays = {
            f"{index}/{side}/{name}": array
            for index, exchange in enumerate(self.exchanges)
            for side, tensors in (("in", exchange.inputs), ("out", exchange.outputs))
            for name, array in tensors.items()
        }
        # numpy's stubs know of no other keywords than allow_pickle
        np.savez(folder / GOLDEN, **arrays)  # type: ignore[arg-type]
        data = {"latencies": [asdict(entry) for entry in self.latencies], "environment": dict(self.environment)}
        (folder / BASELINE).write_text(json.dumps(data, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Baseline:
        """The baseline of a version's folder.

        Raises:
            RepositoryBroken: a file is missing or unreadable.
        """
        try:
            data = json.loads((folder / BASELINE).read_text())
            with np.load(folder / GOLDEN, allow_pickle=False) as arrays:
                exchanges = _exchanges({name: arrays[name] for name in arrays.files})
            latencies = tuple(Latency(**entry) for entry in data["latencies"])
            return cls(exchanges=exchanges, latencies=latencies, environment=data["environment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RepositoryBroken(
                f"the golden requests of {folder} cannot be read",
                why=str(error),
                next_step="export the model again",
            ) from None


def _exchanges(arrays: Mapping[str, Array]) -> tuple[Exchange, ...]:
    found: dict[int, dict[str, dict[str, Array]]] = {}
    for key, array in arrays.items():
        index, side, name = key.split("/", 2)
        found.setdefault(int(index), {"in": {}, "out": {}})[side][name] = array
    return tuple(Exchange(inputs=e["in"], outputs=e["out"]) for _, e in sorted(found.items()))
