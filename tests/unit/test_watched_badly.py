"""What is wrong with what is watched, judged or remembered: one clear error each, its exit code, nothing written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from tiny_version import manifest, write_files

from kpdeploy import errors
from kpdeploy.baseline import Baseline, Windows, histogram
from kpdeploy.deployment import Deployment
from kpdeploy.monitoring.history import Entry, Value, open_history
from kpdeploy.monitoring.probe import Exporter, Probe
from kpdeploy.monitoring.served import SCHEMA, PointLatency, ServedBaseline
from kpdeploy.serving.repository import find_deployment
from kpdeploy.serving.triton.repository import publish

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with two models whose exports timed nothing."""
    for name in ("other", "tiny"):
        publish(str(tmp_path / "models"), manifest(name), write_files(tmp_path / "files"))
    return tmp_path / "models"


def deployment(repo: Path, name: str = "tiny") -> Deployment:
    return find_deployment(str(repo), name)


def served(of: Deployment, **changes: object) -> dict[str, object]:
    values = (0.004,) * 20
    point = PointLatency(point="batch=1,width=3", p50_seconds=values, p99_seconds=values, counts=histogram(values))
    found = ServedBaseline(
        model=of.model, version=of.version, digest=of.manifest.digest, recorded="2026-01-01T00:00:00+00:00", rate=1.0,
        points=(point,), demand=(),
    )  # fmt: skip
    return {"schema": SCHEMA, **asdict(found), **changes}


def timed(repo: Path) -> None:
    """Windows as an export leaves them, of requests as large as any."""
    folder = Path(deployment(repo).folder)
    windows = Windows.of([2.0] * 40, point={"batch": 10, "width": 9}, rows=10, memory_bytes=1)
    replace(Baseline.read(folder), windows=(windows,)).write(folder)


def history(place: Path, *, ahead_s: float = 0, schema: int = 1) -> None:
    with open_history(str(place)) as opened:
        entry = Entry(kind="check", model="tiny", version="1", values=(Value(metric="p50_ms", value=1.0),))
        opened.append(replace(entry, at=time.time() + ahead_s))
    engine = sa.create_engine(f"sqlite:///{place}")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE kpdeploy_meta SET value = :schema"), {"schema": str(schema)})
    engine.dispose()


@dataclass(frozen=True)
class Bad:
    """A command line, what is put right before it (in the folder that it runs in), and what must be said."""

    words: str
    error: type[errors.KpdeployError]
    told: tuple[str, ...]
    before: Callable[[Path], object] = lambda repo: None


def write_served(data: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda repo: (repo.parent / "served.json").write_text(json.dumps(data(repo)))


CASES = {
    "no baseline": Bad(
        "monitor rules models --model tiny", errors.BaselineUnusable,
        ("tiny version 1 has no baseline", "neither a served one", "kpdeploy monitor baseline models --url"),
    ),
    "no baseline to check against": Bad(
        "check models@1 --model tiny --against nosuch", errors.NothingToCompare,
        ("nothing to compare", "no label that the history has of tiny", "--against models@3"),
    ),
    "a baseline of another model": Bad(
        "monitor rules models --model tiny --baseline served.json", errors.BaselineUnusable,
        ("baseline of other version 1", "not of this artifact of tiny", "record it again"),
        write_served(lambda repo: served(deployment(repo, "other"))),
    ),
    "one file for two models": Bad(
        "monitor baseline models --url 127.0.0.1:1 -o one.json", errors.UnknownName, ("holds 2 models", "--model"),
    ),
    "another model to check against": Bad(
        "check models --model tiny --against elsewhere@1", errors.UnknownName, ("holds no model 'tiny'", "elsewhere"),
        lambda repo: publish(str(repo.parent / "elsewhere"), manifest("another"), repo.parent / "files"),
    ),
    "no server, for a baseline": Bad(
        "monitor baseline models --model tiny --url 127.0.0.1:1", errors.Unreachable, ("127.0.0.1:1", "next:"),
    ),
    "no server, for a rollout": Bad(
        "rollout models --model tiny --to 2 --against 1 --url 127.0.0.1:1", errors.Unreachable, ("127.0.0.1:1",),
        lambda repo: publish(str(repo), manifest("tiny"), repo.parent / "files"),
    ),
    "a baseline from the future": Bad(
        "monitor rules models --model tiny --baseline served.json", errors.ClockSkewed,
        ("recorded in the future", "this machine's clock says", "timedatectl"),
        write_served(lambda repo: served(deployment(repo), recorded="2999-01-01T00:00:00+00:00")),
    ),
    "a baseline of a newer release": Bad(
        "monitor rules models --model tiny --baseline served.json", errors.BaselineUnusable,
        ("cannot be read", "schema", "record it again"),
        write_served(lambda repo: served(deployment(repo), schema=99)),
    ),
    "a history of a newer release": Bad(
        "history tiny --db h.sqlite", errors.HistoryUnusable, ("newer release", "schema 2", "upgrade kpdeploy"),
        lambda repo: history(repo.parent / "h.sqlite", schema=2),
    ),
    "a history from the future": Bad(
        "history tiny --db h.sqlite", errors.HistoryUnusable, ("in the future", "timedatectl"),
        lambda repo: history(repo.parent / "h.sqlite", ahead_s=86_400),
    ),
    "an objective that is none": Bad(
        "monitor rules models --model tiny --slo p99=fast", errors.UnknownName, ("p99=fast", "p99=50ms"), timed,
    ),
    "a port that is taken": Bad(
        "monitor probe models --url 127.0.0.1:1 --port 1 --host 203.0.113.1", errors.PortInUse, ("port 1", "--port"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_clear_error(
    name: str, models: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KPDEPLOY_HISTORY", str(tmp_path / "own.sqlite"))
    bad = CASES[name]
    bad.before(models)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = run(*bad.words.split())
    assert (code, out) == (bad.error.exit_code, ""), err
    for words in bad.told:
        assert words in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("own.sqlite")) == before


def test_a_probe_outlives_a_server_that_is_away(models: Path) -> None:
    said: list[str] = []
    probe = Probe(str(models), "tiny", url="127.0.0.1:1", exporter=Exporter(), timeout_s=1, say=said.append)
    for index in range(3):
        assert probe.ask(index, time.monotonic()) is None
    probe.look()
    assert len(said) == 1
    assert "127.0.0.1:1" in said[0]
    assert "127.0.0.1:1" in probe.last_failure
