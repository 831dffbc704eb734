"""An archive of TorchServe's, exported for another server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.artifact import Manifest
from kpdeploy.decision import Decision
from kpdeploy.deployment import Deployment
from kpdeploy.errors import ModelUnsafe, UnknownName
from kpdeploy.pipeline.exports import ExportReport, export
from kpdeploy.pipeline.handlers import vocabulary_of, write_handler_of
from kpdeploy.pipeline.replaying import Replayed, replay_both
from kpdeploy.progress import Progress
from kpdeploy.scratch import work_folder
from kpdeploy.serving.target import TARGETS
from kpdeploy.serving.triton.handler import Vocabulary
from kpdeploy.serving.triton.repository import publish

if TYPE_CHECKING:
    import torch

    from kpdeploy.load.archive import Archive

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class MigrateReport:
    """What `migrate` did: the export of the archive's model, what of the archive it carried over, or not, the model
    that does what the archive's handler did, and what both servers answered."""

    archive: str
    report: ExportReport
    told: tuple[Decision, ...]
    handler: Deployment | None = None
    replayed: Replayed | None = None

    def to_json(self) -> dict[str, Any]:
        told = [{"kind": type(decision).__name__.lower(), **asdict(decision)} for decision in self.told]
        return {
            "archive": self.archive,
            "told": told,
            "handler": self.handler.model if self.handler is not None else None,
            "replayed": self.replayed.to_json() if self.replayed is not None else None,
            **self.report.to_json(),
        }


def migrate(
    path: str | os.PathLike[str],
    *,
    target: str = "triton",
    repo: str | os.PathLike[str] = "models",
    format: str = "auto",
    name: str | None = None,
    input: Sequence[str] = (),
    trust: bool = False,
    replay: bool = False,
    requests: Sequence[str | os.PathLike[str]] = (),
    tolerance: Mapping[str, float] | None = None,
    fuse: str = "auto",
    progress: Progress | None = None,
) -> MigrateReport:
    """Export the model of a TorchServe archive (.mar) for another server, proven equal, and say what was left behind.

    Args:
        path: an archive of anybody; none of its code runs, unless `trust` allows it.
        input: the model's inputs, which archives do not hold. See `export`, as for the other arguments.
        trust: the archive's model file may be imported, and all of its code run by TorchServe where `replay` asks.
        replay: serve the archive as it is in TorchServe and the result in Triton, and publish only if both answer the
            same requests alike.
        requests: files whose contents are these requests; made up where there are none.

    Raises:
        AnswersDiffer: of `replay`.
        KpdeployError: any of its kinds; then nothing was published.
    """
    from kpdeploy.load.archive import exportable, inputs, read_archive, told

    _check_replay(path, target, replay=replay, trust=trust, requests=requests)
    with work_folder() as work:
        archive = read_archive(Path(path), _made(work / "archive"))
        found = told(archive)
        model = exportable(archive, trust=trust)
        vocabulary, why_not = vocabulary_of(archive) if archive.classifier == "text_classifier" else (None, "")
        examined = _Examined(archive, model, vocabulary, why_not, _made(work / "handler"))
        report = export(
            model,
            target=target,
            repo=repo,
            format=format,
            name=name or archive.name,
            input=inputs(archive, tuple(input), vocabulary.ids if vocabulary is not None else None),
            max_batch=archive.batch if archive.batch > 1 else None,
            tolerance=tolerance,
            fuse=fuse,
            serving=archive.serving,
            examine=partial(examined.examine, replay=replay, requests=requests, progress=progress or Progress()),
            progress=progress,
        )
        handler = examined.published(str(repo))
    return MigrateReport(
        archive=str(path), report=report, told=(*found, *examined.told), handler=handler, replayed=examined.replayed
    )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


class _Examined:
    """What is made and learnt before a model is published: its handler in `files`, and what both servers answer."""

    def __init__(
        self, archive: Archive, model: str | torch.nn.Module, vocabulary: Vocabulary | None, why_not: str, files: Path
    ) -> None:
        self.told: list[Decision] = []
        self.replayed: Replayed | None = None
        self._archive = archive
        self._model = model
        self._vocabulary = vocabulary
        self._why_not = why_not
        self._files = files
        self._handler: Manifest | None = None

    def examine(
        self, trial: Deployment, *, replay: bool, requests: Sequence[str | os.PathLike[str]], progress: Progress
    ) -> None:
        if self._archive.classifier and trial.manifest.target == "triton":
            self._handler, decision = write_handler_of(
                self._archive, self._model, trial.manifest, self._vocabulary, why_not=self._why_not, files=self._files
            )
            self.told.append(decision)
        if replay:
            handler = self.published(trial.repository)
            self.replayed = replay_both(self._archive, trial, handler, [Path(p) for p in requests], progress)

    def published(self, repo: str) -> Deployment | None:
        return publish(repo, self._handler, self._files) if self._handler is not None else None


def _check_replay(
    path: str | os.PathLike[str], target: str, *, replay: bool, trust: bool, requests: Sequence[object]
) -> None:
    from kpdeploy.load import choose

    choose("target", target, tuple(TARGETS))
    if requests and not replay:
        raise UnknownName("--request is for --replay", next_step="give --replay too, or leave --request out")
    if replay and target != "triton":
        raise UnknownName(f"--replay knows no other server than triton, not {target}", next_step="leave --replay out")
    if replay and not trust:
        raise ModelUnsafe(
            f"--replay serves {path} in TorchServe, which runs all of its code as you",
            why="its handler and its model file are Python, and its pickles are loaded",
            next_step="read them (a .mar is a zip file), then give --trust too",
        )
