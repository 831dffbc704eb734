"""How fast the history is: values written a second, and a trend read out of all of them.

python benchmarks/history_rows.py -o benchmarks/results/history_rows.json --rows 1000000
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from kpdeploy import __version__
from kpdeploy.hardware import environment
from kpdeploy.monitoring.history import DAY_S, Entry, Value, open_history

SERIES = 50


def measure(where: str, rows: int, *, each: int = 5000) -> dict[str, Any]:
    """Write `rows` values of SERIES series in entries of `each`, read one series, and compact half of them."""
    clocks = []
    with open_history(where) as history:
        clocks.append((time.perf_counter(), time.process_time()))
        for block in range(rows // each):
            values = tuple(Value(metric=f"metric{i % SERIES}", value=float(i)) for i in range(each))
            history.append(Entry(kind="check", model="m", version="1", values=values, at=(block + 1) * DAY_S / 4))
        clocks.append((time.perf_counter(), time.process_time()))
        (series,) = history.trend("m", metric="metric7")
        clocks.append((time.perf_counter(), time.process_time()))
        removed, kept = history.compact(before=(rows // each / 2 + 1) * DAY_S / 4)
        clocks.append((time.perf_counter(), time.process_time()))
    took = [
        {"seconds": round(end[0] - start[0], 3), "processor_seconds": round(end[1] - start[1], 3)}
        for start, end in itertools.pairwise(clocks)
    ]
    return {
        "rows": rows,
        "read": sum(mark.count for mark in series.marks),
        "write": {**took[0], "rows_per_second": round(rows / took[0]["seconds"])},
        "trend": took[1],
        "compact": {**took[2], "rows_before": removed, "rows_after": kept},
    }


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--url", help="Any SQLAlchemy URL.  [default: a new SQLite file]")
def main(output: Path, rows: int, url: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(url or str(Path(folder) / "history.sqlite"), rows)
    where = {"environment": environment(), "load_average": os.getloadavg(), "kpdeploy": __version__}
    output.write_text(json.dumps({**found, **where}, indent=1) + "\n")
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
