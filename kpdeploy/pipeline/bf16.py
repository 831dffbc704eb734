"""Candidates for a CPU with bf16 instructions: the fused model in bfloat16, in a format that carries fused ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kpdeploy.artifact import Artifact
from kpdeploy.backends import Lowering
from kpdeploy.errors import ExportFailed, FormatUnavailable
from kpdeploy.pipeline.candidates import Candidate, Fusion, capture_again, export_one
from kpdeploy.progress import Progress

if TYPE_CHECKING:
    from kpdeploy.export import Capture


@dataclass(frozen=True)
class FusedInBf16:
    """Makes them of the fused captures of level 1, by format."""

    fused: Mapping[str, Fusion]
    progress: Progress

    def candidate(self, way: Lowering, prove: Callable[[Artifact], Candidate]) -> Candidate:
        """Without padding before with it: the first that `prove` finds right, else the last, with the reason."""
        from kpdeploy.export import FORMATS

        format = FORMATS[way.format]
        settings: dict[str, Any] = {**way.settings, "op_libraries": (format.library,)}
        found = Candidate(format=way.format, settings=settings, level=way.level, reason="there are no fused ops in it")
        fusion = self.fused.get(way.format)
        if fusion is None or fusion.capture is None:
            return found
        for dropped in (True, False) if fusion.packed is not None else (False,):
            wanted = {**settings, "padding": "dropped"} if dropped else settings
            found = replace(found, settings=wanted)
            try:
                lowered = self._lowered(fusion.capture, way.precision, dropped=dropped)
                artifact = export_one(format, lowered, self.progress, fused=True)
            except (ExportFailed, FormatUnavailable) as error:
                found = replace(found, reason=error.in_a_line)
                continue
            with self.progress.step(f"proving {found.label} in a fresh process"):
                found = replace(prove(replace(artifact, settings=wanted)), level=way.level)
            if found.passed:
                break
        return found

    def _lowered(self, capture: Capture, precision: str, *, dropped: bool) -> Capture:
        from kpdeploy.export.capture import quiet
        from kpdeploy.optimize.lowered import lowered

        with self.progress.step(f"lowering the fused graph to {precision}"), quiet():
            module = lowered(capture.program, bits=precision, dropped=dropped, device="cpu", told=False).module
            made = capture_again(capture, module, f"{precision}{'-packed' if dropped else ''}")
        if isinstance(made, str):
            raise ExportFailed(f"{capture.model.name} cannot be captured in {precision}", why=made)
        return made
