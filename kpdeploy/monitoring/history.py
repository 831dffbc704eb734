"""The history: what every export, bench and check measured, in one database for all models and repositories.

By default an SQLite file (WAL) in the user's data folder, $XDG_DATA_HOME/kpdeploy/history.sqlite: repositories may be
URLs, read-only mounts or thrown away, and a trend goes over all of them. KPDEPLOY_HISTORY names another file, any
SQLAlchemy URL, or "off". Times are seconds since 1970, UTC. Old values are compacted into one row a day and series that
keeps their count, mean, lowest and highest; nothing else is ever deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kpdeploy.baseline import Windows
from kpdeploy.errors import HistoryUnusable
from kpdeploy.inputs import point_name

SCHEMA = 1
LOCK_WAIT_S = 60
SKEW_S = 300
"""An entry that is further in the future than this comes from a clock that is wrong."""

DAY_S = 86_400
POINTS = 500
"""A trend has at most so many points: longer ones are averaged over equal numbers of neighbours."""

_METADATA = sa.MetaData()
_META = sa.Table(
    "kpdeploy_meta", _METADATA, sa.Column("name", sa.String(40), primary_key=True), sa.Column("value", sa.Text)
)
_RUNS = sa.Table(
    "kpdeploy_runs",
    _METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("version", sa.String(40), nullable=False),
    sa.Column("label", sa.String(200), nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("environment", sa.Text, nullable=False),
    sa.Column("windows", sa.Text, nullable=False),
    sa.Index("kpdeploy_runs_model", "model", "label", "at"),
)
_VALUES = sa.Table(
    "kpdeploy_values",
    _METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("version", sa.String(40), nullable=False),
    sa.Column("metric", sa.String(60), nullable=False),
    sa.Column("point", sa.String(200), nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("lowest", sa.Double, nullable=False),
    sa.Column("highest", sa.Double, nullable=False),
    sa.Index("kpdeploy_values_series", "model", "metric", "point", "at"),
)


@dataclass(frozen=True, kw_only=True)
class Value:
    """One measured number: `metric` has its unit in the name, such as p50_ms; `point` says where, such as 8×128."""

    metric: str
    value: float
    point: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one command measured. `label` is the branch that it ran on; `at` is in seconds since 1970, UTC."""

    kind: str
    model: str
    version: str
    values: tuple[Value, ...]
    windows: tuple[Windows, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    outcome: str = ""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a trend: the mean of `count` values, and the lowest and highest of them."""

    at: float
    value: float
    count: int
    lowest: float
    highest: float
    version: str


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric of one model at one point of its range, in time: by `kind`, for an export, a bench and a check do not
    measure alike."""

    kind: str
    metric: str
    point: str
    marks: tuple[Mark, ...]


def place() -> str:
    """Where the history is: a path, a URL, or "" where it is turned off."""
    stated = os.environ.get("KPDEPLOY_HISTORY", "")
    if stated == "off":
        return ""
    folder = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return stated or str(folder / "kpdeploy" / "history.sqlite")


@contextmanager
def open_history(where: str = "") -> Iterator[History]:
    """The history at a path or SQLAlchemy URL (default: `place()`), made where it is missing.

    Raises:
        HistoryUnusable: it is turned off, cannot be opened, or a newer release wrote it.
    """
    where = where or place()
    if not where:
        raise HistoryUnusable("there is no history", why="KPDEPLOY_HISTORY is off", next_step="unset it")
    with _errors(where):
        engine = _engine(where)
        try:
            _prepare(engine, where)
            yield History(engine)
        finally:
            engine.dispose()


def _engine(where: str) -> sa.Engine:
    if "://" in where:
        return sa.create_engine(where)
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{where}", connect_args={"timeout": LOCK_WAIT_S})

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _: Any) -> None:
        # WAL: readers never wait for a writer. A full sync at each commit would cost more than the entry is worth.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later is refused when another wrote in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _prepare(engine: sa.Engine, where: str) -> None:
    """Make the tables, or see that they are those of this release."""
    if not sa.inspect(engine).has_table(_META.name):
        _make(engine)
    with engine.begin() as connection:
        found = connection.scalar(sa.select(_META.c.value).where(_META.c.name == "schema"))
    if found is None or int(found) > SCHEMA:
        raise HistoryUnusable(
            f"the history {_shown(where)} was written by a newer release",
            why=f"it has schema {found}, this release knows {SCHEMA}",
            next_step="upgrade kpdeploy, or set KPDEPLOY_HISTORY to another file",
        )


def _make(engine: sa.Engine) -> None:
    try:
        with engine.begin() as connection:
            _METADATA.create_all(connection)
            if connection.scalar(sa.select(_META.c.value)) is None:
                connection.execute(sa.insert(_META), {"name": "schema", "value": str(SCHEMA)})
    except sa.exc.DBAPIError:
        # Another writer made them at this moment; whatever else it was, the next statement says again.
        if not sa.inspect(engine).has_table(_META.name):
            raise


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except (sa.exc.SQLAlchemyError, ImportError, OSError, ValueError) as error:
        why = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise HistoryUnusable(
            f"the history {_shown(where)} cannot be used",
            why=f"{type(error).__name__}: {why[0] if why else ''}",
            next_step="check the path or URL (KPDEPLOY_HISTORY, --db), or turn it off: KPDEPLOY_HISTORY=off",
        ) from None


def _shown(where: str) -> str:
    """A URL without its password."""
    with contextlib.suppress(sa.exc.ArgumentError):
        return str(sa.make_url(where)) if "://" in where else where
    return "at this URL"


class History:
    """An open history. Use `open_history` to get one."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def append(self, *entries: Entry) -> None:
        """Add entries, all or none; those without a time get the present one."""
        now = time.time()
        runs, values = [], []
        for entry in entries:
            shared = {"at": entry.at or now, "kind": entry.kind, "model": entry.model, "version": entry.version}
            runs.append(
                {
                    **shared,
                    "label": entry.label,
                    "outcome": entry.outcome,
                    "environment": json.dumps(dict(entry.environment), default=list),
                    "windows": json.dumps([asdict(windows) for windows in entry.windows]),
                }
            )
            for v in entry.values:
                one = {"count": 1, "value": v.value, "lowest": v.value, "highest": v.value}
                values.append({**shared, "metric": v.metric, "point": v.point, **one})
        with self._engine.begin() as connection:
            connection.execute(sa.insert(_RUNS), runs)
            if values:
                connection.execute(sa.insert(_VALUES), values)

    def models(self) -> list[tuple[str, int, float]]:
        """All models, as (name, entries, time of the last)."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.select(_RUNS.c.model, sa.func.count(), sa.func.max(_RUNS.c.at)).group_by(_RUNS.c.model)
            )
            return sorted((str(model), int(count), float(at)) for model, count, at in rows)

    def trend(self, model: str, *, metric: str = "", since: float = 0.0) -> list[Series]:
        """The series of a model, oldest value first.

        Raises:
            HistoryUnusable: there are entries from the future.
        """
        with self._engine.connect() as connection:
            newest = connection.scalar(sa.select(sa.func.max(_RUNS.c.at)).where(_RUNS.c.model == model))
            _check_clock(newest)
            columns = [
                _VALUES.c[name]
                for name in ("kind", "metric", "point", "at", "value", "count", "lowest", "highest", "version")
            ]
            query = sa.select(*columns).where(_VALUES.c.model == model, _VALUES.c.at >= since)
            if metric:
                query = query.where(_VALUES.c.metric == metric)
            rows = connection.execute(query.order_by(_VALUES.c.at, _VALUES.c.id)).all()
        series: dict[tuple[str, str, str], list[Any]] = {}
        for kind, name, point, *mark in rows:
            series.setdefault((kind, name, point), []).append(mark)
        return [
            Series(kind=kind, metric=name, point=point, marks=_thinned(marks))
            for (kind, name, point), marks in sorted(series.items())
        ]

    def windows(self, model: str, label: str) -> tuple[tuple[Windows, ...], Mapping[str, Any], float] | None:
        """The newest windows of a model with this label, where they were taken, and when."""
        query = sa.select(_RUNS.c.windows, _RUNS.c.environment, _RUNS.c.at)
        query = query.where(_RUNS.c.model == model, _RUNS.c.label == label, _RUNS.c.windows != "[]")
        with self._engine.connect() as connection:
            found = connection.execute(query.order_by(_RUNS.c.at.desc()).limit(1)).first()
        if found is None:
            return None
        return tuple(Windows.from_json(entry) for entry in json.loads(found[0])), json.loads(found[1]), found[2]

    def compact(self, *, before: float) -> tuple[int, int]:
        """Merge the values of each series and day before a time into one row; how many there were, and are now."""
        c = _VALUES.c
        keys = (c.kind, c.model, c.version, c.metric, c.point)
        day = sa.cast(c.at, sa.BigInteger) // DAY_S
        merged = sa.select(
            *keys,
            (sa.func.sum(c.at * c["count"]) / sa.func.sum(c["count"])).label("at"),
            sa.func.sum(c["count"]).label("count"),
            (sa.func.sum(c.value * c["count"]) / sa.func.sum(c["count"])).label("value"),
            sa.func.min(c.lowest).label("lowest"),
            sa.func.max(c.highest).label("highest"),
        )
        with self._engine.begin() as connection:
            last = connection.scalar(sa.select(sa.func.max(c.id))) or 0
            old = sa.and_(c.at < before, c.id <= last)
            rows = [dict(row) for row in connection.execute(merged.where(old).group_by(*keys, day)).mappings()]
            removed = connection.execute(sa.delete(_VALUES).where(old)).rowcount
            if rows:
                connection.execute(sa.insert(_VALUES), rows)
        return removed, len(rows)


def _check_clock(newest: float | None) -> None:
    ahead = (newest or 0.0) - time.time()
    if ahead > SKEW_S:
        raise HistoryUnusable(
            f"the history has entries from {ahead:.0f} s in the future",
            why="the clock of this machine, or of one that wrote to the history, is wrong",
            next_step="set the clocks right (timedatectl); a trend over wrong times would mislead",
        )


def _thinned(marks: Sequence[Sequence[Any]]) -> tuple[Mark, ...]:
    """At most POINTS marks: neighbours are averaged by their counts."""
    size = -(-len(marks) // POINTS)
    found = []
    for start in range(0, len(marks), size):
        part = marks[start : start + size]
        count = sum(m[2] for m in part)
        found.append(
            Mark(
                at=part[-1][0],
                value=sum(m[1] * m[2] for m in part) / count,
                count=count,
                lowest=min(m[3] for m in part),
                highest=max(m[4] for m in part),
                version=part[-1][5],
            )
        )
    return tuple(found)


def record(entry: Entry) -> str:
    """Append an entry to the history of this machine; why that failed, or "". It never raises: what was measured stands
    without it."""
    if not place():
        return ""
    try:
        with open_history() as history:
            history.append(entry)
    except HistoryUnusable as error:
        return error.in_a_line
    return ""


def values_of(windows: Sequence[Windows]) -> tuple[Value, ...]:
    """The medians of windows, their throughput and memory, as values of a history."""
    found: list[Value] = []
    for entry in windows:
        where = point_name(entry.point)
        middle = len(entry.p50_ms) // 2
        found += [
            Value(metric="p50_ms", point=where, value=sorted(entry.p50_ms)[middle]),
            Value(metric="p99_ms", point=where, value=sorted(entry.p99_ms)[middle]),
            Value(metric="rows_per_second", point=where, value=entry.rows_per_second),
        ]
    if windows:
        found.append(Value(metric="memory_mb", value=max(entry.memory_bytes for entry in windows) / 1e6))
    return tuple(found)
