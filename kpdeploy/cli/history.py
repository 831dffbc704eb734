"""`kpdeploy history`"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kpdeploy.monitoring.history import Series
    from kpdeploy.monitoring.trend import Change

EPILOG = """\b
Examples:
  kpdeploy history                                   # all models
  kpdeploy history minilm --since 30d
  kpdeploy history minilm --metric p50_ms --plot trend.png --export trend.parquet
  kpdeploy history minilm --db postgresql+psycopg://ci@db/kpdeploy --json

The history is $XDG_DATA_HOME/kpdeploy/history.sqlite (or below ~/.local/share), or what KPDEPLOY_HISTORY names: a file,
any SQLAlchemy URL, or "off".
"""
UNITS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
SHOWN_METRICS = ("p50_ms", "p99_ms", "rows_per_second", "requests_per_second", "memory_mb")


def _since(ctx: click.Context, param: click.Parameter, text: str | None) -> float:
    """Seconds since 1970."""
    if not text:
        return 0.0
    if match := re.fullmatch(r"(\d+)([hdw])", text):
        return time.time() - int(match[1]) * UNITS[match[2]]
    from datetime import UTC, datetime

    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise click.BadParameter(f"{text!r}: write it as 30d, 12h, 4w or 2026-01-31") from None


@click.command(epilog=EPILOG)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--since", callback=_since, metavar="TIME", help="Only from then on: 30d, 12h, 4w, or 2026-01-31 (UTC).")
@click.option("--metric", default="", metavar="NAME", help="Only this one, such as p50_ms.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the trend (.png, .svg or .pdf).")
@click.option("--export", "table", type=click.Path(path_type=Path), metavar="FILE", help="Write a .csv or .parquet.")
@click.option("--changes/--no-changes", default=True, help="Look for changes of level (needs ruptures).")
@click.option("--compact", type=click.IntRange(1), metavar="DAYS", help="First merge values older than so many days.")
@click.option("--db", default="", metavar="FILE|URL", help="Another history than the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None, since: float, metric: str, plot: Path | None, table: Path | None, changes: bool,
    compact: int | None, db: str, as_json: bool,
) -> None:  # fmt: skip
    """Show how the figures of MODEL changed over its exports, benches and checks, and at which version.

    A change of level is told where it is significant and at least 5 %, with 8 entries or more on each side.
    """
    from kpdeploy.cli import console
    from kpdeploy.errors import NothingToCompare
    from kpdeploy.monitoring import trend
    from kpdeploy.monitoring.history import open_history
    from kpdeploy.monitoring.pictures import check_picture
    from kpdeploy.monitoring.regression import Criteria

    if table is not None:
        trend.check_export(table)
    if plot is not None:
        check_picture(plot)
    with open_history(db) as history:
        if compact is not None:
            before, after = history.compact(before=time.time() - compact * UNITS["d"])
            console.err.print(f"compacted {before} values into {after}")
        models = history.models()
        if model is None:
            _show_models(models, as_json=as_json)
            return
        series = history.trend(model, metric=metric, since=since)
    if not series:
        known = ", ".join(name for name, _, _ in models)
        raise NothingToCompare(
            f"the history has nothing of {model}"
            + (f" named {metric}" if metric else "")
            + (" since then" if since else ""),
            why=f"it has: {known}" if known else "it is empty",
            next_step="exports, benches and checks are kept: run one, such as kpdeploy check REPO --against REPO@1",
        )
    found = [(s, trend.changes(s, Criteria()) if changes else []) for s in series]
    if table is not None:
        console.err.print(f"{trend.export(table, model, series)} rows in {table}")
    if plot is not None:
        trend.draw(model, found, plot)
        console.err.print(f"drawn: {plot}")
    if as_json:
        console.print_json({"model": model, "series": [_json(s, c) for s, c in found]})
        return
    _show(model, found)
    if plot is None:
        console.next_command(f"kpdeploy history {model} --plot trend.png")


def _json(series: Series, changes: list[Change]) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(series), "changes": [asdict(change) for change in changes]}


def _show_models(models: list[tuple[str, int, float]], *, as_json: bool) -> None:
    from kpdeploy.cli import console

    if as_json:
        console.print_json([{"model": name, "entries": count, "last": at} for name, count, at in models])
        return
    console.table(("model", "entries", "last"), [(name, count, _day(at)) for name, count, at in models])
    console.next_command(f"kpdeploy history {models[0][0]}" if models else "kpdeploy export minilm")


def _show(model: str, found: list[tuple[Series, list[Change]]]) -> None:
    from kpdeploy.cli import console

    rows = []
    for series, _ in found:
        if series.metric in SHOWN_METRICS:
            marks = series.marks
            count = sum(mark.count for mark in marks)
            values = (marks[0].value, marks[-1].value, min(m.lowest for m in marks), max(m.highest for m in marks))
            rows.append(
                (series.kind, series.metric, series.point, count, *(f"{v:.4g}" for v in values), marks[-1].version)
            )
    console.table(
        ("from", "metric", "point", "values", "first", "last", "lowest", "highest", "version"), rows, title=model
    )
    for series, changes in found:
        for change in changes:
            word = "worse" if change.worse else "better"
            console.out.print(
                f"  {_day(change.at)} version {change.version}: {series.kind} {series.metric} {series.point} "
                f"{change.ratio - 1:+.1%}, {word}",
                markup=False,
            )


def _day(at: float) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"
