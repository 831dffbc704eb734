"""An archive of TorchServe's, exported for another server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kpdeploy.decision import Decision
from kpdeploy.pipeline.exports import ExportReport, export
from kpdeploy.progress import Progress
from kpdeploy.scratch import work_folder


@dataclass(frozen=True, kw_only=True)
class MigrateReport:
    """What `migrate` did: the export of the archive's model, and what of the archive it carried over, or not."""

    archive: str
    report: ExportReport
    told: tuple[Decision, ...]

    def to_json(self) -> dict[str, Any]:
        told = [{"kind": type(decision).__name__.lower(), **asdict(decision)} for decision in self.told]
        return {"archive": self.archive, "told": told, **self.report.to_json()}


def migrate(
    path: str | os.PathLike[str],
    *,
    target: str = "triton",
    repo: str | os.PathLike[str] = "models",
    format: str = "auto",
    name: str | None = None,
    input: Sequence[str] = (),
    trust: bool = False,
    tolerance: Mapping[str, float] | None = None,
    fuse: str = "auto",
    progress: Progress | None = None,
) -> MigrateReport:
    """Export the model of a TorchServe archive (.mar) for another server, proven equal, and say what was left behind.

    Args:
        path: an archive of anybody; none of its code runs, unless `trust` allows its model file.
        input: the model's inputs, which archives do not hold. See `export`, as for the other arguments.

    Raises:
        KpdeployError: any of its kinds; then nothing was published.
    """
    from kpdeploy.load.archive import exportable, inputs, read_archive, told

    with work_folder() as work:
        archive = read_archive(Path(path), work)
        found = told(archive)
        model = exportable(archive, trust=trust)
        report = export(
            model,
            target=target,
            repo=repo,
            format=format,
            name=name or archive.name,
            input=inputs(archive, tuple(input)),
            max_batch=archive.batch if archive.batch > 1 else None,
            tolerance=tolerance,
            fuse=fuse,
            serving=archive.serving,
            progress=progress,
        )
    return MigrateReport(archive=str(path), report=report, told=tuple(found))
