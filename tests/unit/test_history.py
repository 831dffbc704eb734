"""The history: nothing is lost, whoever writes and whatever is compacted; what cannot be used is one clear error."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from kpdeploy.baseline import Windows
from kpdeploy.errors import HistoryUnusable, NothingToCompare
from kpdeploy.monitoring.history import (
    Entry,
    Mark,
    Series,
    Value,
    open_history,
    place,
    record,
)
from kpdeploy.monitoring.regression import Criteria
from kpdeploy.monitoring.trend import changes, check_export, export

DAY = 86_400
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
POSTGRES = next(Path("/usr/lib/postgresql").glob("*/bin/initdb"), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real PostgreSQL server on a socket of its own."""
    if POSTGRES is None:
        pytest.skip("NOT RUN on PostgreSQL: no server is installed (Debian package postgresql)")
    pytest.importorskip("psycopg", reason="NOT RUN on PostgreSQL: psycopg is not installed")
    # Not below pytest's folder, which only its user may enter; and a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="kpdeploy-pg-"))
    # The server refuses to run as root.
    prefix: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data, tools = folder / "data", POSTGRES.parent
    subprocess.run(
        [*prefix, tools / "initdb", "-D", data, "-A", "trust", "-U", "kp"], check=True, capture_output=True, cwd=folder
    )
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    start = [*prefix, tools / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    try:
        yield f"postgresql+psycopg://kp@/postgres?host={folder}"
    finally:
        subprocess.run(
            [*prefix, tools / "pg_ctl", "-D", data, "-m", "immediate", "stop"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "history.sqlite")
    url = str(request.getfixturevalue("postgres"))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for table in ("kpdeploy_meta", "kpdeploy_runs", "kpdeploy_values"):
            connection.execute(sa.text(f"drop table if exists {table}"))
    engine.dispose()
    return url


def entry(value: float, at: float, *, version: str = "1", model: str = "m") -> Entry:
    windows = Windows.of([value] * 40, point={"batch": 1}, rows=1, memory_bytes=7)
    values = (Value(metric="p50_ms", point="batch=1", value=value),)
    return Entry(kind="check", model=model, version=version, values=values, windows=(windows,), label="main", at=at)


def test_what_is_appended_comes_back(where: str) -> None:
    with open_history(where) as history:
        history.append(entry(10, 1000), entry(12, 2000, version="2"))
        (series,) = history.trend("m")
        assert [(m.value, m.at, m.version) for m in series.marks] == [(10, 1000, "1"), (12, 2000, "2")]
        assert history.trend("m", since=1500)[0].marks == series.marks[1:]
        assert history.trend("other") == []
        assert history.models() == [("m", 2, 2000)]
        found = history.windows("m", "main")
        assert found is not None
        assert found[0][0].p50_ms == (12.0,) * 20
        assert history.windows("m", "elsewhere") is None


WRITER = """
import sys
from kpdeploy.monitoring.history import Entry, Value, open_history
where, number = sys.argv[1], int(sys.argv[2])
for index in range(25):
    value = Value(metric="p50_ms", value=number * 1000 + index)
    with open_history(where) as history:
        history.append(Entry(kind="check", model="m", version="1", values=(value,), at=1000 + index))
"""


def test_two_writers_at_once_lose_nothing(where: str) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, where, str(number)]) for number in (1, 2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    with open_history(where) as history:
        values = [mark.value for mark in history.trend("m")[0].marks]
    assert sorted(values) == sorted(number * 1000 + index for number in (1, 2) for index in range(25))


def test_compaction_keeps_every_aggregate(where: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(10, 1, 96)
    with open_history(where) as history:
        history.append(*(entry(v, DAY * 1000 + 3600 * i) for i, v in enumerate(values)))
        before = DAY * 1003
        assert history.compact(before=before) == (72, 3)
        marks = history.trend("m")[0].marks
        assert [m.count for m in marks[:3]] == [24, 24, 24]
        assert [m.value for m in marks[:3]] == pytest.approx([values[i : i + 24].mean() for i in (0, 24, 48)])
        assert [m.lowest for m in marks[:3]] == pytest.approx([values[i : i + 24].min() for i in (0, 24, 48)])
        assert [m.highest for m in marks[:3]] == pytest.approx([values[i : i + 24].max() for i in (0, 24, 48)])
        assert sum(m.count for m in marks) == 96
        assert history.compact(before=before) == (3, 3)  # again, it changes nothing
        assert history.trend("m")[0].marks == marks
        assert history.models() == [("m", 96, DAY * 1000 + 3600 * 95)]


def test_many_values_are_written_and_read_fast(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("history_rows", BENCHMARKS / "history_rows.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure(str(tmp_path / "h.sqlite"), 100_000)
    print(found)
    assert found["read"] == 2000
    # Processor time: a busy machine is no failure. benchmarks/results/history_rows.json has 10^6 rows.
    assert 100_000 / found["write"]["processor_seconds"] >= 5000
    assert found["trend"]["processor_seconds"] <= 0.5
    assert found["compact"]["rows_before"] == 50_000


def test_a_history_of_a_newer_release_is_one_clear_error(where: str) -> None:
    with open_history(where):
        pass
    engine = sa.create_engine(where if "://" in where else f"sqlite:///{where}")
    with engine.begin() as connection:
        connection.execute(sa.text("update kpdeploy_meta set value = '99'"))
    engine.dispose()
    with pytest.raises(HistoryUnusable, match="newer release"), open_history(where):
        pass


def test_entries_from_the_future_are_one_clear_error(tmp_path: Path) -> None:
    with open_history(str(tmp_path / "h.sqlite")) as history:
        history.append(entry(1, time.time() + 7200))
        with pytest.raises(HistoryUnusable, match="in the future"):
            history.trend("m")


@pytest.mark.parametrize("text", ["not a database at all" * 100, ""], ids=["garbage", "a folder"])
def test_what_is_no_history_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "h.sqlite"
    path.write_text(text) if text else path.mkdir()
    with pytest.raises(HistoryUnusable, match="cannot be used"), open_history(str(path)):
        pass


@pytest.mark.parametrize("url", ["postgresql+psycopg://u:geheim@127.0.0.1:1/x", "nosuch://u:geheim@h/x"])
def test_a_url_that_does_not_work_is_told_without_its_password(url: str) -> None:
    with pytest.raises(HistoryUnusable) as caught, open_history(url):
        pass
    assert "geheim" not in str(caught.value)


def test_recording_never_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPDEPLOY_HISTORY", str(tmp_path))
    assert "cannot be used" in record(entry(1, 1))
    monkeypatch.setenv("KPDEPLOY_HISTORY", "off")
    assert record(entry(1, 1)) == ""
    monkeypatch.delenv("KPDEPLOY_HISTORY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert record(entry(1, 1)) == ""
    assert Path(place()).is_file()


def series(values: np.ndarray) -> Series:
    marks = [
        Mark(at=float(i), value=float(v), count=1, lowest=v, highest=v, version=str(i)) for i, v in enumerate(values)
    ]
    return Series(kind="check", metric="p50_ms", point="", marks=tuple(marks))


def test_changes_are_located() -> None:
    pytest.importorskip("ruptures", reason="NOT RUN: ruptures is not installed")
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 0.02, 90)) * np.repeat([20, 23, 19], 30)
    found = changes(series(values), Criteria())
    assert [change.index for change in found] == [30, 60]
    assert [change.worse for change in found] == [True, False]
    assert found[0].ratio == pytest.approx(1.15, abs=0.02)


def test_noise_has_no_changes() -> None:
    pytest.importorskip("ruptures", reason="NOT RUN: ruptures is not installed")
    rng = np.random.default_rng(1)
    assert not any(changes(series(np.exp(rng.normal(3, 0.03, 60))), Criteria()) for _ in range(50))


@pytest.mark.parametrize("name", ["trend.csv", "trend.parquet"])
def test_a_trend_is_exported(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="NOT RUN: pyarrow is not installed")
    check_export(path)
    assert export(path, "m", [series(np.arange(1.0, 6.0))]) == 5
    if path.suffix == ".parquet":
        assert parquet.read_table(path).column("value").to_pylist() == [1, 2, 3, 4, 5]
    else:
        assert path.read_text().splitlines()[1] == "1970-01-01T00:00:00+00:00,m,0,check,p50_ms,,1.0,1,1.0,1.0"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kpdeploy", *words], capture_output=True, text=True, check=False)


def test_the_command_shows_a_trend_and_refuses_what_it_does_not_have(tmp_path: Path) -> None:
    db = str(tmp_path / "h.sqlite")
    with open_history(db) as history:
        history.append(*(entry(10 + index, DAY * (1000 + index)) for index in range(3)))
    done = run("history", "m", "--db", db, "--no-changes", "--json", "--export", str(tmp_path / "t.csv"))
    assert done.returncode == 0, done.stderr
    assert [mark["value"] for mark in json.loads(done.stdout)["series"][0]["marks"]] == [10, 11, 12]
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 4
    assert "p50_ms" in run("history", "m", "--db", db, "--no-changes").stdout
    missing = run("history", "other", "--db", db)
    assert missing.returncode == NothingToCompare.exit_code
    assert "it has: m" in missing.stderr
