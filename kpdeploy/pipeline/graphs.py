"""Candidates for an NVIDIA GPU: the fused model in one precision, in CUDA graphs of torch's or of ONNX Runtime's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.artifact import Artifact, LayerError
from kpdeploy.backends import Lowering
from kpdeploy.decision import Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import Tensors, lead_axis
from kpdeploy.ops.libraries import find
from kpdeploy.pipeline.candidates import Candidate, Fusion
from kpdeploy.progress import Progress
from kpdeploy.verify import masked_axes

if TYPE_CHECKING:
    from kpdeploy.export import Capture
    from kpdeploy.export.cuda import Form
    from kpdeploy.optimize.lowered import Lowered


@dataclass(frozen=True)
class OnGpu:
    """Makes the candidates; `budget` is the error that 8 bits may have on `samples`. `device` "cpu" runs the same
    programs without graphs, for tests."""

    capture: Capture
    fusion: Fusion
    samples: Sequence[Tensors]
    budget: float
    progress: Progress
    device: str = "cuda"

    def candidate(self, way: Lowering, known: Sequence[Candidate], prove: Callable[[Artifact], Candidate]) -> Candidate:
        """The first form of a way that `prove` finds right; else the last one, with the reason."""
        from kpdeploy.export import FORMATS

        name = FORMATS[way.format].library
        settings = {**way.settings, "op_libraries": (name,)}
        if way.format == "onnx":
            settings["device"] = self.device
        found = blank = Candidate(format=way.format, settings=settings, level=way.level)
        if any(c.passed and c.level == way.level and _of_one_kind(c, way) for c in known):
            return replace(found, reason="another precision of its level has passed, and is as fast")
        library = find(name)
        if isinstance(library, Skipped):
            return replace(found, reason=f"{library.what} is missing: {library.reason}")
        for index, form in enumerate(self._forms(way, known)):
            folder = self.capture.folder / "artifacts" / f"{way.format}-{way.precision}-{index}"
            folder.mkdir(parents=True)
            shutil.copyfile(library, folder / library.name)
            why = found.reason
            found = replace(self._tried(form, blank, folder, prove), level=way.level)
            if not form.graphs:
                found = replace(found, decisions=(Skipped(what="CUDA graphs", reason=why), *found.decisions))
            if found.passed:
                break
        return found

    def _forms(self, way: Lowering, known: Sequence[Candidate]) -> Iterator[Form]:
        """The form that was right in more bits. Else without padding before with it, and requests filled up along fewer
        and fewer axes, until answers are right. What ONNX Runtime cannot capture it can still run."""
        from kpdeploy.export.cuda import Form, form_of

        right = [c.artifact for c in known if c.passed and _of_one_kind(c, way) and c.artifact is not None]
        if right:
            yield replace(form_of(right[0].folder), precision=way.precision)
            return
        lead = lead_axis(self.capture.signature)
        padded = dict.fromkeys([(lead, *masked_axes(self.capture.signature)), (lead,), ()])
        if self.fusion.packed is not None and way.format == "cuda":
            yield Form(precision=way.precision, dropped=True, padded=next(iter(padded)))
        for axes in padded:
            yield Form(precision=way.precision, padded=axes)
        if way.format == "onnx":
            yield Form(precision=way.precision, graphs=False)

    def _tried(self, form: Form, blank: Candidate, folder: Path, prove: Callable[[Artifact], Candidate]) -> Candidate:
        from kpdeploy.export import FORMATS, cuda

        source = self.fusion.capture or self.capture
        more: dict[str, Any] = {"padding": "dropped"} if form.dropped else {}
        more |= {"graphs": True} if form.graphs and blank.format == "onnx" else {}
        blank = replace(blank, settings={**blank.settings, **more})
        write = self._write_onnx if blank.format == "onnx" else self._write_program
        try:
            with self.progress.step(f"exporting {blank.label}"):
                made = write(source, form, folder)
        except ExportFailed as error:
            return replace(blank, reason=error.in_a_line)
        artifact = Artifact(
            format=blank.format,
            folder=folder,
            filename=FORMATS[blank.format].filename,
            input_names=tuple(spec.name for spec in source.signature.inputs),
            output_names=tuple(spec.name for spec in source.signature.outputs),
            settings=blank.settings,
        )
        with self.progress.step(f"proving {blank.label} in a fresh process"):
            proven = prove(artifact)
        layers = tuple(
            LayerError(name=x.name, error=x.error, precision="bfloat16" if x.kept else "fp8") for x in made.layers
        )
        told = (cuda.told(form),) if form.graphs else ()
        return replace(proven, layers=layers, decisions=(*made.decisions, *told, *proven.decisions))

    def _write_program(self, source: Capture, form: Form, folder: Path) -> Lowered:
        from kpdeploy.export import cuda
        from kpdeploy.load.flat import Flat

        made = self._lowered(source, form, self.device, whole=True)
        module = Flat(made.module, None)
        cuda.export(source, folder, form, module=module, constant=made.constant, device=self.device)
        return made

    def _write_onnx(self, source: Capture, form: Form, folder: Path) -> Lowered:
        """The same as ONNX, whose weights are written from the host."""
        from kpdeploy.export import cuda, onnx
        from kpdeploy.export.capture import program_of, quiet
        from kpdeploy.load.flat import Flat

        made = self._lowered(source, form, "cpu")
        with quiet():
            program = program_of(replace(source.model, module=Flat(made.module, None), program=None))
        onnx.export(source, folder, program)
        if form.graphs:
            (folder / cuda.GRAPHS).write_text(json.dumps(cuda.described(source.signature, form, self.device)))
        return made

    def _lowered(self, source: Capture, form: Form, device: str, *, whole: bool = False) -> Lowered:
        from kpdeploy.export.capture import quiet, reason
        from kpdeploy.load.calibration import calibration
        from kpdeploy.optimize.lowered import lowered

        samples = self.samples
        if form.precision == "fp8" and not samples:
            samples = calibration(source.signature, None)
        try:
            with quiet():
                return lowered(
                    source.program,
                    bits=form.precision,
                    dropped=form.dropped,
                    device=device,
                    samples=samples,
                    budget=self.budget,
                    whole=whole,
                )
        except ExportFailed:
            raise
        except Exception as error:  # whatever torch raises of a graph that does not run so
            raise ExportFailed(f"{source.model.name} does not run in {form.precision}", why=reason(error)) from None


def _of_one_kind(candidate: Candidate, way: Lowering) -> bool:
    """Was it made by this module, in the format of a way?"""
    return candidate.format == way.format and (way.format == "cuda" or "device" in candidate.settings)
