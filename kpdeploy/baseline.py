"""What was so at export: golden requests with the unmodified model's answers and latencies, and the packaged artifact's
latencies as windows, which later ones are compared with. NumPy only, so that a serving host reads it without torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.artifact import BASELINE, GOLDEN, Latency
from kpdeploy.errors import RepositoryBroken
from kpdeploy.inputs import Array, of_bytes

BUCKETS_SECONDS = tuple(float(f"{0.0005 * 1.15**step:.4g}") for step in range(85))
"""Upper bounds of the latency histogram, 0.5 ms to 63 s in steps of 15 %, then infinity: the same at export, in the
probe and in every rule, for a quantile of a histogram depends on its buckets."""

WINDOWS = 20
"""Windows at each point: enough for a test of significance at p < .001."""


def histogram(seconds: Sequence[float]) -> tuple[int, ...]:
    """How many latencies lie in each of BUCKETS_SECONDS, upper bound included, and beyond the last."""
    places = np.searchsorted(BUCKETS_SECONDS, seconds, side="left")
    return tuple(np.bincount(places, minlength=len(BUCKETS_SECONDS) + 1).tolist())


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One golden request: its inputs and the answer, by the names of the signature."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Latencies of the packaged artifact at one point of the dynamic range, window by window, in its runtime in one
    process. Calls of one window are correlated: it is windows that are compared, never single calls.

    `calls` were made in each window (the last may have fewer); `histogram` counts them all by BUCKETS_SECONDS, the last
    entry those above. `rows_per_second` is what one caller gets; `memory_bytes` the process's largest resident size.
    """

    point: Mapping[str, int]
    p50_ms: tuple[float, ...]
    p99_ms: tuple[float, ...]
    calls: int
    histogram: tuple[int, ...]
    rows_per_second: float
    memory_bytes: int

    @classmethod
    def of(
        cls, taken_ms: Sequence[float], *, point: Mapping[str, int], rows: int, memory_bytes: int, count: int = WINDOWS
    ) -> Windows:
        """Single calls, in the order in which they were made, as `count` windows of equal length."""
        parts = [part for part in np.array_split(np.asarray(taken_ms, float), count) if len(part)]
        p50, p99 = np.transpose([np.percentile(part, [50, 99]) for part in parts])
        return cls(
            point=dict(point),
            p50_ms=tuple(np.round(p50, 4).tolist()),
            p99_ms=tuple(np.round(p99, 4).tolist()),
            calls=len(parts[0]),
            histogram=histogram([ms / 1e3 for ms in taken_ms]),
            rows_per_second=round(rows / float(np.mean(taken_ms)) * 1e3, 2),
            memory_bytes=memory_bytes,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Windows:
        lists = {name: tuple(data[name]) for name in ("p50_ms", "p99_ms", "histogram")}
        return cls(**{**data, **lists})


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Golden exchanges and latencies of the unmodified model, windows of the packaged artifact, and where they were
    taken: the environment, with clocks and load at the time. Those of earlier releases have no windows."""

    exchanges: tuple[Exchange, ...]
    latencies: tuple[Latency, ...]
    environment: Mapping[str, Any]
    windows: tuple[Windows, ...] = ()

    def write(self, folder: Path) -> None:
        arrays = {
            f"{index}/{side}/{name}": _stored(array)
            for index, exchange in enumerate(self.exchanges)
            for side, tensors in (("in", exchange.inputs), ("out", exchange.outputs))
            for name, array in tensors.items()
        }
        # numpy's stubs know of no other keywords than allow_pickle
        np.savez(folder / GOLDEN, **arrays)  # type: ignore[arg-type]
        data = {
            "latencies": [asdict(entry) for entry in self.latencies],
            "environment": dict(self.environment),
            "windows": [asdict(entry) for entry in self.windows],
        }
        (folder / BASELINE).write_text(json.dumps(data) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Baseline:
        """The baseline of a version's folder.

        Raises:
            RepositoryBroken: a file is missing or unreadable.
        """
        try:
            data = json.loads((folder / BASELINE).read_text())
            with np.load(folder / GOLDEN, allow_pickle=False) as arrays:
                exchanges = _exchanges({name: _restored(arrays[name]) for name in arrays.files})
            latencies = tuple(Latency(**entry) for entry in data["latencies"])
            windows = tuple(Windows.from_json(entry) for entry in data.get("windows", ()))
            return cls(exchanges=exchanges, latencies=latencies, environment=data["environment"], windows=windows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RepositoryBroken(
                f"the golden requests of {folder} cannot be read",
                why=str(error),
                next_step="export the model again",
            ) from None


def _stored(array: Array) -> Array:
    """Bytes as base64, which NumPy stores without pickling."""
    if array.dtype != object:
        return array
    return np.array([base64.b64encode(body) for body in array.ravel().tolist()], "S").reshape(array.shape)


def _restored(array: Array) -> Array:
    if array.dtype.kind != "S":
        return array
    return of_bytes((base64.b64decode(text) for text in array.ravel().tolist()), array.shape)


def _exchanges(arrays: Mapping[str, Array]) -> tuple[Exchange, ...]:
    found: dict[int, dict[str, dict[str, Array]]] = {}
    for key, array in arrays.items():
        index, side, name = key.split("/", 2)
        found.setdefault(int(index), {"in": {}, "out": {}})[side][name] = array
    return tuple(Exchange(inputs=e["in"], outputs=e["out"]) for _, e in sorted(found.items()))
