"""Candidates for an NVIDIA GPU: the fused model in one precision, in CUDA graphs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kpdeploy.artifact import Artifact
from kpdeploy.backends import Lowering
from kpdeploy.compare import TOLERANCES
from kpdeploy.decision import Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import Tensors, lead_axis
from kpdeploy.ops.libraries import TORCH, find
from kpdeploy.pipeline.candidates import Candidate, Fusion, prove_one
from kpdeploy.progress import Progress
from kpdeploy.verify import Question, masked_axes

if TYPE_CHECKING:
    from kpdeploy.export import Capture
    from kpdeploy.export.cuda import Form


@dataclass(frozen=True)
class OnGpu:
    """Makes and proves them. `device` "cpu" runs the same programs without graphs, for tests."""

    capture: Capture
    fusion: Fusion
    asked: Sequence[Question]
    samples: Sequence[Tensors]
    tolerances: Mapping[str, float]
    budget: float
    progress: Progress
    device: str = "cuda"

    def candidate(self, way: Lowering, known: Sequence[Candidate]) -> Candidate:
        """The first form of a way that passes its proof; else the last one, with the reason."""
        settings = {**way.settings, "op_libraries": (TORCH,)}
        found = Candidate(format=way.format, settings=settings, level=way.level)
        if any(c.passed and c.format == way.format and c.level == way.level for c in known):
            return replace(found, reason="another precision of its level has passed, and is as fast")
        library = find(TORCH)
        if isinstance(library, Skipped):
            return replace(found, reason=f"{library.what} is missing: {library.reason}")
        for index, form in enumerate(self._forms(way)):
            folder = self.capture.folder / "artifacts" / f"{way.format}-{way.precision}-{index}"
            folder.mkdir(parents=True)
            shutil.copyfile(library, folder / library.name)
            found = replace(self._tried(form, found, folder), level=way.level)
            if found.passed:
                break
        return found

    def _forms(self, way: Lowering) -> Iterator[Form]:
        """Without padding before with it; requests filled up along fewer and fewer axes, until answers are right."""
        from kpdeploy.export.cuda import Form

        lead = lead_axis(self.capture.signature)
        padded = dict.fromkeys([(lead, *masked_axes(self.capture.signature)), (lead,), ()])
        if self.fusion.packed is not None:
            yield Form(precision=way.precision, dropped=True, padded=next(iter(padded)))
        for axes in padded:
            yield Form(precision=way.precision, padded=axes)

    def _tried(self, form: Form, blank: Candidate, folder: Path) -> Candidate:
        from kpdeploy.export import cuda

        source = self.fusion.capture or self.capture
        settings = {**blank.settings, **({"padding": "dropped"} if form.dropped else {})}
        blank = replace(blank, settings=settings)
        try:
            with self.progress.step(f"exporting {blank.label}"):
                told = cuda.export(source, folder, form, device=self.device, samples=self.samples, budget=self.budget)
        except ExportFailed as error:
            return replace(blank, reason=error.in_a_line)
        artifact = Artifact(
            format=blank.format,
            folder=folder,
            filename=cuda.FILENAME,
            input_names=tuple(spec.name for spec in source.signature.inputs),
            output_names=tuple(spec.name for spec in source.signature.outputs),
            settings=settings,
        )
        tolerances = self.tolerances if blank.level == 1 else dict.fromkeys(TOLERANCES, self.budget)
        with self.progress.step(f"proving {blank.label} in a fresh process"):
            proven = prove_one(artifact, self.capture.model, self.asked, tolerances)
        return replace(proven, decisions=(*told, cuda.told(form), *proven.decisions))
