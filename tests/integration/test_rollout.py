"""`kpdeploy rollout` against the real tritonserver: promoted, rolled back, stopped, gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain_model import publish_chain

from kpdeploy.errors import NothingToCompare, NotReady, RepositoryBroken, RepositoryBusy, UnknownName, Unreachable
from kpdeploy.monitoring.regression import Criteria
from kpdeploy.monitoring.rollout import STATE, Trial
from kpdeploy.pipeline import abort_rollout, rollout
from kpdeploy.serving.repository import find_version
from kpdeploy.serving.triton.server import Server, serve

LAYERS = 40
SLOWER = 160


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """Versions 1 and 2 alike, 3 slower; 1 is what serves, and the others wait."""
    folder = tmp_path_factory.mktemp("rollout")
    repo = folder / "models"
    for number, layers in enumerate((LAYERS, LAYERS, SLOWER), 1):
        publish_chain(repo, folder / f"files{number}", layers=layers, activate=False)
    with serve(repo, http_port=0, grpc_port=0, metrics_port=0, poll=True) as server:
        yield repo, server


def committed(repo: Path) -> int:
    return find_version(str(repo), "chain", None).version


def left(repo: Path) -> list[str]:
    return sorted(p.name for p in repo.iterdir()) + [p.name for p in (repo / "chain").glob("*.json")]


def test_a_good_version_is_promoted(served: tuple[Path, Server]) -> None:
    repo, server = served
    assert committed(repo) == 1
    # Noise must not decide this test: only twice the latency matters.
    report = rollout(str(repo), to=2, against=1, url=f"grpc://{server.grpc}", seconds=30, criteria=Criteria(effect=1))
    assert report.decision.promote, report.to_json()
    assert committed(repo) == 2
    assert left(repo) == ["chain"]


def test_a_slower_version_is_rolled_back(served: tuple[Path, Server]) -> None:
    repo, server = served
    report = rollout(str(repo), to=3, against=2, url=f"grpc://{server.grpc}", seconds=60)
    assert not report.decision.promote
    assert "slower" in report.decision.why or report.decision.undecided
    error = report.error()
    assert error is not None
    assert "version 2 serves" in error.what
    assert committed(repo) == 2
    assert left(repo) == ["chain"]


def test_a_stopped_trial_goes_on_and_can_be_ended(served: tuple[Path, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    repo, server = served
    written = Trial.write
    blocks = []

    def stop_after_a_block(self: Trial, path: Path) -> None:
        written(self, path)
        blocks.append(len(self.blocks))
        if self.blocks:
            raise KeyboardInterrupt

    url = f"grpc://{server.grpc}"
    monkeypatch.setattr(Trial, "write", stop_after_a_block)
    with pytest.raises(KeyboardInterrupt):
        rollout(str(repo), to=1, against=2, url=url)
    monkeypatch.undo()
    assert (repo / "chain-canary").is_dir()
    assert len(json.loads((repo / "chain" / STATE).read_text())["old_ms"]) == 12
    assert committed(repo) == 2
    with pytest.raises(RepositoryBusy, match="version 1 against 2 was stopped"):
        rollout(str(repo), to=3, against=2, url=url)
    report = rollout(str(repo), to=1, against=2, url=url, seconds=1)
    assert report.resumed
    assert len(report.trial.blocks) >= 24
    rollout_state = repo / "chain" / STATE
    Trial(to=3, against=2, canary="chain-canary").write(rollout_state)
    assert abort_rollout(str(repo)).to == 3
    assert committed(repo) == 2
    assert left(repo) == ["chain"]


def test_what_cannot_be_is_one_clear_error(served: tuple[Path, Server], tmp_path: Path) -> None:
    repo, server = served
    with pytest.raises(Unreachable):
        rollout(str(repo), to=2, against=1, url="grpc://127.0.0.1:1")
    with pytest.raises(UnknownName, match="no version 9"):
        rollout(str(repo), to=9, against=1, url=f"grpc://{server.grpc}")
    with pytest.raises(UnknownName, match="no folder"):
        rollout("s3://bucket/models", to=2, against=1, url=f"grpc://{server.grpc}")
    with pytest.raises(NothingToCompare, match="no rollout was stopped"):
        abort_rollout(str(repo))
    # This server serves another repository: it never sees the canary.
    elsewhere = tmp_path / "models"
    for number in (1, 2):
        publish_chain(elsewhere, tmp_path / f"files{number}", layers=2, name="elsewhere")
    with pytest.raises(NotReady, match="does not serve"):
        rollout(str(elsewhere), to=2, against=1, url=f"grpc://{server.grpc}", ready_timeout_s=2)
    (elsewhere / "elsewhere" / STATE).write_text('{"schema": 99}')
    with pytest.raises(RepositoryBroken, match="cannot be read"):
        rollout(str(elsewhere), to=2, against=1, url=f"grpc://{server.grpc}")
