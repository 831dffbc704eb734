"""`kpdeploy check` with real runtimes: what it finds, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from chain_model import publish_chain

from kpdeploy.errors import CannotTell, InputMismatch, NothingToCompare, Regressed, UnknownName
from kpdeploy.monitoring.history import open_history
from kpdeploy.pipeline import check

LAYERS = 40
SLOWER = 180


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 and 2 alike, 3 slower, 4 with wrong answers; and another model beside them."""
    folder = tmp_path_factory.mktemp("check")
    for number, (layers, wrong) in enumerate(((LAYERS, 0), (LAYERS, 0), (SLOWER, 0), (LAYERS, 0.5)), 1):
        publish_chain(folder / "models", folder / f"files{number}", layers=layers, wrong=wrong)
    publish_chain(folder / "other", folder / "files-other", layers=2, name="other")
    return folder / "models"


def test_a_version_like_the_other_is_no_regression(repo: Path) -> None:
    report = check(f"{repo}@2", against="1", seconds=20)
    assert report.outcome != "regressed", report.to_json()
    assert all(answer.passed for answer in report.answers)


def test_a_slower_version_is_a_regression(repo: Path) -> None:
    report = check(f"{repo}@3", against=f"{repo}@2", seconds=40)
    assert report.outcome == "regressed", report.to_json()
    assert isinstance(report.error(), Regressed)


def test_wrong_answers_are_a_regression_however_fast(repo: Path) -> None:
    report = check(f"{repo}@4", against="1", seconds=1)
    assert report.outcome == "regressed"
    error = report.error()
    assert error is not None
    assert "y is off by" in error.why


def test_the_command_writes_its_reports_and_the_history(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPDEPLOY_HISTORY", str(tmp_path / "h.sqlite"))
    monkeypatch.setenv("GITHUB_REF_NAME", "main")
    words = ["check", f"{repo}@4", "--against", "1", "--seconds", "1", "--json"]
    words += ["--junit", str(tmp_path / "j.xml"), "--plot", str(tmp_path / "p.png")]
    done = subprocess.run([sys.executable, "-m", "kpdeploy", *words], capture_output=True, text=True, check=False)
    assert done.returncode == Regressed.exit_code, done.stderr
    assert json.loads(done.stdout)["outcome"] == "regressed"
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert int(suite.attrib["failures"]) >= 1
    assert (tmp_path / "p.png").stat().st_size > 5000
    with open_history() as history:
        assert history.models()[0][:2] == ("chain", 1)
    # The branch is in the history now: its windows can be compared with.
    report = check(f"{repo}@1", against="main", seconds=1)
    assert report.old.startswith("main of ")


def test_stored_windows_are_compared_with(repo: Path) -> None:
    report = check(f"{repo}@1", against=str(repo / "chain" / "2" / "baseline.json"), seconds=1)
    assert report.findings[0].what == "p50 1"


@pytest.mark.parametrize(
    ("against", "kind", "told"),
    [
        ("9", UnknownName, "no version 9"),
        ("nosuchbranch", NothingToCompare, "nothing to compare"),
        (".", NothingToCompare, "no baseline"),
    ],
)
def test_what_is_not_there_is_one_clear_error(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: str, kind: type[Exception], told: str
) -> None:
    monkeypatch.setenv("KPDEPLOY_HISTORY", str(tmp_path / "h.sqlite"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=told):
        check(str(repo), against=against, seconds=1)


def test_mixed_models_are_one_clear_error(repo: Path) -> None:
    with pytest.raises(UnknownName, match="holds no model 'chain'"):
        check(str(repo), against=f"{repo.parent / 'other'}@1", seconds=1)


def test_a_point_outside_of_the_range_is_one_clear_error(repo: Path) -> None:
    with pytest.raises(InputMismatch, match="batch=99"):
        check(f"{repo}@2", against="1", points=[{"batch": 99}])


def test_windows_of_another_machine_are_refused(repo: Path, tmp_path: Path) -> None:
    data = json.loads((repo / "chain" / "2" / "baseline.json").read_text())
    data["environment"]["cpu"] = "another"
    (tmp_path / "baseline.json").write_text(json.dumps(data))
    (tmp_path / "golden.npz").write_bytes((repo / "chain" / "2" / "golden.npz").read_bytes())
    with pytest.raises(NothingToCompare, match="cannot be compared") as caught:
        check(f"{repo}@1", against=str(tmp_path), seconds=1)
    assert "another machine: cpu" in caught.value.why


def test_exit_codes_are_apart() -> None:
    assert (Regressed.exit_code, CannotTell.exit_code, NothingToCompare.exit_code) == (90, 91, 92)
