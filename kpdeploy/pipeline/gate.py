"""One version against another: the regression gate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from kpdeploy.artifact import BASELINE, MANIFEST, Manifest
from kpdeploy.baseline import Baseline
from kpdeploy.errors import NothingToCompare
from kpdeploy.monitoring.check import CheckReport, Reference, Side, check_against, check_versions
from kpdeploy.monitoring.history import open_history, record
from kpdeploy.monitoring.regression import Criteria
from kpdeploy.progress import Progress
from kpdeploy.runtimes import RUNTIMES
from kpdeploy.signature import Point


def check(
    repo: str,
    *,
    against: str,
    model: str | None = None,
    seconds: float = 90,
    points: Sequence[Point] = (),
    threads: int = 1,
    criteria: Criteria | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare a version with an earlier one, side by side on this machine, or with stored windows.

    Args:
        repo: REPO, or REPO@VERSION; without a version the committed one.
        against: REPO@VERSION or a version's number; a version's folder or its baseline.json; or a label of the history,
            such as main.
        seconds: how long to measure, at most and about. threads: of each runtime; 0: as it is served.

    Raises:
        RepositoryBroken, DigestMismatch, UnknownName: a version is not there, or not what was proven.
        NothingToCompare: no baseline, or of another model. InputMismatch: a point outside of the range.
        ProofFailed: an artifact cannot be run here.
    """
    judged, shown = criteria or Criteria(), progress or Progress()
    with ExitStack() as held:
        new = _side(held, *_at_version(repo), model)
        old = _reference(held, against, repo, new)
        if isinstance(old, Side):
            report = check_versions(
                new, old, criteria=judged, seconds=seconds, points=points, threads=threads, progress=shown
            )
        else:
            report = check_against(new, old, criteria=judged, seconds=seconds, progress=shown)
    if failed := record(report.entry(str(new.manifest.version))):
        shown.say(f"not in the history: {failed}")
    return report


def _at_version(text: str) -> tuple[str, int | None]:
    repo, at, version = text.rpartition("@")
    return (repo, int(version)) if at and version.isdecimal() else (text, None)


def _side(held: ExitStack, repo: str, version: int | None, model: str | None) -> Side:
    from kpdeploy.serving.repository import artifact_files, find_version

    deployment = find_version(repo, model, version)
    if deployment.manifest.format not in RUNTIMES:
        raise NothingToCompare(
            f"{deployment.model} is no model that can be run here",
            why="it is a handler, which runs in its server, in front of another model",
            next_step=f"check {deployment.manifest.source.get('model', 'that model')}; time it with kpdeploy bench",
        )
    folder = held.enter_context(artifact_files(deployment))
    name = f"{deployment.model} {repo.rstrip('/')}@{deployment.version}"
    return Side(name=name, folder=folder, manifest=deployment.manifest, baseline=Baseline.read(folder))


def _reference(held: ExitStack, against: str, repo: str, new: Side) -> Side | Reference:
    """What `against` names: a version, a stored baseline, or a label of the history."""
    place, version = _at_version(against)
    if against.isdecimal():
        place, version = _at_version(repo)[0], int(against)
    if version is not None:
        return _side(held, place, version, new.manifest.model)
    path = Path(against)
    if path.exists():
        return _stored(path)
    with open_history() as history:
        found = history.windows(new.manifest.model, against)
    if found is None:
        raise NothingToCompare(
            f"there is nothing to compare {new.name} with",
            why=f"{against!r} is no REPO@VERSION, no file, and no label that the history has of {new.manifest.model}",
            next_step="give a version, such as --against models@3",
        )
    windows, where, at = found
    name = f"{against} of {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"
    return Reference(name=name, model=new.manifest.model, windows=windows, environment=where)


def _stored(path: Path) -> Reference:
    folder = path if path.is_dir() else path.parent
    if not (folder / BASELINE).is_file():
        raise NothingToCompare(
            f"{path} holds no baseline",
            why=f"there is no {folder / BASELINE}",
            next_step="give the folder of a version, or its baseline.json; or a version, such as --against models@3",
        )
    model = Manifest.read(folder).model if (folder / MANIFEST).is_file() else ""
    baseline = Baseline.read(folder)
    return Reference(name=str(path), model=model, windows=baseline.windows, environment=baseline.environment)
