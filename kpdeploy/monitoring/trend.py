"""Where a trend changed: PELT (Killick et al., 2012) proposes the places, and the detector confirms each. Alone it
proposes one in every fifth series that never changed (benchmarks/detectors.py)."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.errors import PackageMissing, RepositoryUnwritable, UnknownName
from kpdeploy.monitoring.history import Series
from kpdeploy.monitoring.pictures import BLUE, FAINT, ORANGE
from kpdeploy.monitoring.regression import Criteria, judge

SHORTEST = 8
"""Entries on each side of a change: fewer cannot be significant at p < .001."""

LARGER_IS_BETTER = ("rows_per_second", "requests_per_second")
EXPORTS = (".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the level of a series before its mark `index`: `ratio` is new / old; worse is slower or larger."""

    index: int
    at: float
    version: str
    ratio: float
    worse: bool


def changes(series: Series, criteria: Criteria) -> list[Change]:
    """The confirmed changes of a series, oldest first.

    Raises:
        PackageMissing: ruptures is not installed.
    """
    values = [mark.value for mark in series.marks]
    if len(values) < 2 * SHORTEST or min(values) <= 0:
        return []
    ends = _proposed(np.log(values))
    needed = Criteria(significance=criteria.significance, effect=criteria.effect, windows=SHORTEST)
    found: list[Change] = []
    start = 0
    for place, end in itertools.pairwise(ends):
        old, new = values[start:place], values[place:end]
        up, down = judge(old, new, needed), judge(new, old, needed)
        if "regressed" not in (up.outcome, down.outcome):
            continue
        rose = up.outcome == "regressed"
        mark = series.marks[place]
        worse = rose != (series.metric in LARGER_IS_BETTER)
        found.append(Change(index=place, at=mark.at, version=mark.version, ratio=up.ratio, worse=worse))
        start = place
    return found


def _proposed(logs: np.ndarray[Any, Any]) -> list[int]:
    try:
        import ruptures
    except ImportError:
        raise PackageMissing(
            "change points need ruptures", next_step="pip install 'kpdeploy[history]', or leave them out: --no-changes"
        ) from None
    # The noise is told from neighbours, which a change of level hardly touches.
    noise = float(np.median(np.abs(np.diff(logs)))) / (0.6745 * math.sqrt(2)) or 1e-9
    search = ruptures.KernelCPD(kernel="linear", min_size=SHORTEST).fit((logs / noise).reshape(-1, 1))
    return [int(place) for place in search.predict(pen=10 * math.log(len(logs)))]


def check_export(path: Path) -> None:
    """Raise before any work where the export could not be written."""
    if path.suffix not in EXPORTS:
        raise UnknownName(f"{path} is no kind of table", next_step=f"end it in {' or '.join(EXPORTS)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise PackageMissing("Parquet needs pyarrow", next_step="pip install 'kpdeploy[history]'") from None


COLUMNS = ("at", "model", "version", "kind", "metric", "point", "value", "count", "lowest", "highest")


def export(path: Path, model: str, series: Sequence[Series]) -> int:
    """Write all marks as CSV or Parquet; how many there are. `at` is ISO 8601 in CSV, a UTC timestamp in Parquet."""
    rows = [
        (datetime.fromtimestamp(m.at, UTC), model, m.version, *_named(s), m.value, m.count, m.lowest, m.highest)
        for s in series
        for m in s.marks
    ]
    aside = path.with_name(f".{path.name}.part")
    try:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
            pyarrow.parquet.write_table(pyarrow.table(dict(zip(COLUMNS, map(list, columns), strict=True))), aside)
        else:
            with aside.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                writer.writerows((row[0].isoformat(), *row[1:]) for row in rows)
        aside.replace(path)
    except OSError as error:
        raise RepositoryUnwritable(f"{path} cannot be written", why=str(error)) from None
    return len(rows)


def _named(series: Series) -> tuple[str, str, str]:
    return series.kind, series.metric, series.point


def draw(model: str, found: Sequence[tuple[Series, Sequence[Change]]], path: Path) -> None:
    """The median latencies in time, each change with a line; of all metrics where there is no latency."""
    from matplotlib.figure import Figure

    shown = [entry for entry in found if entry[0].metric == "p50_ms"] or list(found)
    figure = Figure(figsize=(9, 0.8 + 2.2 * len(shown)), dpi=160, layout="constrained")
    for axes, (series, changes) in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        at = [datetime.fromtimestamp(mark.at, UTC) for mark in series.marks]
        values = [mark.value for mark in series.marks]
        axes.fill_between(at, [m.lowest for m in series.marks], [m.highest for m in series.marks], color=FAINT)
        axes.plot(at, values, color=BLUE, marker="o", markersize=3, linewidth=1.2)
        for change in changes:
            when = datetime.fromtimestamp(change.at, UTC)
            axes.axvline(when, color=ORANGE, linewidth=1)
            told = f" {change.ratio - 1:+.1%}, version {change.version}"
            axes.annotate(told, (when, max(values)), color=ORANGE, fontsize=8, va="top")
        axes.set_title(f"{series.kind} {series.metric} {series.point}", loc="left", fontsize=9)
        axes.set_ylim(0, None)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(model, x=0.012, ha="left", fontsize=12, weight="bold")
    try:
        figure.savefig(path, facecolor="white")
    except OSError as error:
        raise RepositoryUnwritable(f"{path} cannot be written", why=str(error)) from None
