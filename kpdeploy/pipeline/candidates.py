"""Candidates: each format, with fused ops and without, exported and proven; and the choice among them."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpdeploy.artifact import Artifact, Latency, LayerError, Verdict
from kpdeploy.compare import TOLERANCES
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ExportFailed, FormatUnavailable, PackageMissing, ProofFailed
from kpdeploy.model import Model
from kpdeploy.ops.libraries import find
from kpdeploy.pipeline.room import FULL_BYTES, disk_full
from kpdeploy.progress import Progress
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.serving.target import TARGETS
from kpdeploy.verify import Question, ask, failure, prove

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from kpdeploy.export import Capture, Format


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One format with one set of runtime settings: what its proof and its measurement showed.

    `reason` says why it is out; then `artifact` and `verdict` are None where it did not get that far. `decisions` are
    those that hold if this candidate is chosen. `layers`: each layer that could be quantized, with its own error.
    """

    format: str
    settings: Mapping[str, Any]
    artifact: Artifact | None = None
    verdict: Verdict | None = None
    latencies: tuple[Latency, ...] = ()
    reason: str = ""
    decisions: tuple[Decision, ...] = ()
    level: int = 1
    layers: tuple[LayerError, ...] = ()

    @property
    def fused(self) -> bool:
        """Does it hold fused ops, whose kernels come in a library beside it?"""
        return bool(self.settings.get("op_libraries"))

    @property
    def on_gpu(self) -> bool:
        return self.format == "cuda" or self.settings.get("device") == "cuda"

    @property
    def label(self) -> str:
        said = [f"{key} {value}" for key, value in self.settings.items() if key != "op_libraries"]
        said += ["fused ops"] if self.fused else []
        return f"{self.format} ({', '.join(said)})" if said else self.format

    @property
    def passed(self) -> bool:
        return self.verdict is not None and self.verdict.passed

    @property
    def score(self) -> float:
        """The geometric mean of the median latencies in milliseconds: smaller is faster."""
        return math.exp(statistics.fmean(math.log(entry.p50_ms) for entry in self.latencies))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "settings": dict(self.settings),
            "level": self.level,
            "passed": self.passed,
            "reason": self.reason,
            "bytes": self.artifact.bytes if self.artifact is not None and self.artifact.folder.is_dir() else None,
            "verdict": asdict(self.verdict) if self.verdict is not None else None,
            "latencies": [asdict(entry) for entry in self.latencies],
            "layers": [asdict(layer) for layer in self.layers],
        }


def _check_room(model: Model, format: str, work: Path) -> None:
    """Raise DiskFull where the weights do not fit: torch ends the whole process when it cannot write TorchScript."""
    if model.module is None:
        needed = model.path.stat().st_size if model.path is not None else 0
    else:
        needed = sum(t.nbytes for t in (*model.module.parameters(), *model.module.buffers()))
    free = shutil.disk_usage(work).free
    if free < needed + FULL_BYTES:
        raise disk_full(work, f"the {format} artifact needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")


def formats_of(target: str, format: str) -> list[Format]:
    from kpdeploy.export import FORMATS

    names = TARGETS[target].formats if format == "auto" else (format,)
    return [FORMATS[name] for name in names]


@dataclass(frozen=True)
class Fusion:
    """The model with fused ops, captured again (None: there are none), and what was fused and refused. `packed` is the
    same without the padding of a batch, where that can be."""

    decisions: tuple[Decision, ...]
    capture: Capture | None = None
    packed: Capture | None = None


def fuse_for(capture: Capture, formats: Sequence[Format], progress: Progress, *, must: bool) -> dict[str, Fusion]:
    """Replace subgraphs by fused ops for each format that can carry them, by its name."""
    model = capture.model
    carry = [f for f in formats if f.library]
    missing = [found for f in carry if isinstance(found := find(f.library), Skipped)]
    fusions: dict[str, Fusion] = {}
    if model.program is None:
        skipped: list[Decision] = [Skipped(what="fused ops", reason=f"a model given as {model.kind} has no graph here")]
    elif not carry:
        skipped = [Skipped(what="fused ops", reason=f"{formats[0].name} cannot carry them")]
    elif len(missing) == len(carry):
        skipped = list(missing[:1])
    else:
        with progress.step("fusing subgraphs"):
            leaves = {f.name: (f.leaves, f.packed_leaves) for f in carry}
            made = {left: _fused(capture, *left) for left in dict.fromkeys(leaves.values())}
        fusions = {name: made[left] for name, left in leaves.items()}
        skipped = [d for fusion in fusions.values() for d in fusion.decisions]
    if must and not any(fusion.capture for fusion in fusions.values()):
        why = "; ".join(f"{d.what}: {d.reason}" for d in skipped if isinstance(d, Skipped))
        raise ExportFailed(
            f"nothing of {model.name} can be fused",
            why=why or "no subgraph matches a fused op",
            next_step="export it without: --fuse never, or --fuse auto",
        )
    return fusions or {formats[0].name: Fusion(tuple(skipped))}


def _fused(capture: Capture, left: tuple[str, ...], packed_left: tuple[str, ...]) -> Fusion:
    """The fusion of all ops but those that are left to the format's own compiler, with padding and without."""
    from kpdeploy.optimize import fuse
    from kpdeploy.optimize.pack import pack

    result = fuse(capture.model, left=left)
    if not result.counts:
        return Fusion(result.decisions)
    fused = capture_again(capture, result.module, "-".join(("fused", *left)))
    if isinstance(fused, str):
        return Fusion((Skipped(what="fused ops", reason=f"the fused graph cannot be captured: {fused}"),))
    without = result.module if packed_left == left else fuse(capture.model, left=packed_left).module
    told = pack(without)
    packed = capture_again(capture, without, "-".join(("packed", *left))) if isinstance(told, Applied) else None
    if isinstance(packed, str):
        told, packed = Skipped(what=told.what, reason=f"the packed graph cannot be captured: {packed}"), None
    return Fusion((*result.decisions, told), fused, packed)


def capture_again(capture: Capture, module: GraphModule, name: str) -> Capture | str:
    """A rewritten module, captured with the same axes, to be exported below a folder of this name; or why not."""
    from kpdeploy.export.capture import settle_axes
    from kpdeploy.load.flat import Flat

    again = replace(capture.model, kind="module", module=Flat(module, None), program=None, decisions=())
    try:
        settled = settle_axes(again, stated=True)
    except ExportFailed as error:
        return error.why
    folder = capture.folder / name
    folder.mkdir()
    return replace(capture, model=settled, folder=folder, decisions=[])


def try_formats(
    capture: Capture,
    fused: Mapping[str, Fusion],
    formats: Sequence[Format],
    asked: Sequence[Question],
    tolerances: Mapping[str, float],
    progress: Progress,
    *,
    plain: bool,
) -> list[Candidate]:
    """Export and prove each format, with fused ops and without. Where only one was asked for, its failure is the
    command's."""
    candidates: list[Candidate] = []
    for format in formats:
        if format.by_level:
            continue
        found: list[Candidate] = []
        fusion = fused.get(format.name)
        # A slow export is made once: without padding where it can be dropped; else without fused ops, for its compiler
        # has fused better wherever measured.
        once = format.slow and plain
        if fusion is not None:
            wanted = replace(fusion, capture=None) if once else fusion
            found += _try_fused(format, wanted, asked, tolerances, progress)
        if plain and not (once and any(c.passed for c in found)):
            try:
                found += _try_one(format, capture, asked, tolerances, progress, {})
            except (ExportFailed, FormatUnavailable, PackageMissing) as error:
                if len(formats) == 1 and not any(c.passed for c in found):
                    raise
                found.append(Candidate(format=format.name, settings={}, reason=error.in_a_line))
        candidates += found
    return candidates


def _try_fused(
    format: Format, fusion: Fusion, asked: Sequence[Question], tolerances: Mapping[str, float], progress: Progress
) -> list[Candidate]:
    """One format with fused ops: without padding where that is right, for it is never slower by much; else with it."""
    found: list[Candidate] = []
    libraries: dict[str, Any] = {"op_libraries": (format.library,)}
    for capture, settings in ((fusion.packed, {"padding": "dropped", **libraries}), (fusion.capture, libraries)):
        if capture is not None and not any(candidate.passed for candidate in found):
            found += _try_one(format, capture, asked, tolerances, progress, settings)
    return found


def _try_one(
    format: Format,
    capture: Capture,
    asked: Sequence[Question],
    tolerances: Mapping[str, float],
    progress: Progress,
    settings: Mapping[str, Any],
) -> list[Candidate]:
    """One format, with each of its variants and these settings. What fails of an artifact with fused ops is a candidate
    that is out.

    Raises:
        ExportFailed, FormatUnavailable, PackageMissing: the plain artifact cannot be made.
    """
    fused = bool(settings)
    try:
        artifact = export_one(format, capture, progress, fused=fused)
    except (ExportFailed, FormatUnavailable, PackageMissing) as error:
        if not fused:
            raise
        return [Candidate(format=format.name, settings=settings, reason=error.in_a_line)]
    candidates = []
    for variant in format.fused_variants if fused else format.variants:
        candidate = Candidate(format=format.name, settings={**variant, **settings})
        with progress.step(f"proving {candidate.label} in a fresh process"):
            proposed = replace(artifact, settings=candidate.settings)
            candidates.append(prove_one(proposed, capture.model, asked, tolerances))
    return candidates


def export_one(format: Format, capture: Capture, progress: Progress, *, fused: bool) -> Artifact:
    kind = f"{format.name} with fused ops" if fused else format.name
    folder = capture.folder / "artifacts" / format.name
    folder.mkdir(parents=True)
    _check_room(capture.model, format.name, capture.folder)
    minute = " (compiles for about a minute)" if format.slow else ""
    if fused:
        library = find(format.library)
        if isinstance(library, Skipped):
            raise FormatUnavailable(f"{library.what} is missing", why=library.reason)
        shutil.copyfile(library, folder / library.name)
    with progress.step(f"exporting {kind}{minute}"):
        format.export(capture, folder)
    return Artifact(
        format=format.name,
        folder=folder,
        filename=format.filename,
        input_names=tuple(spec.name for spec in capture.signature.inputs),
        output_names=tuple(spec.name for spec in capture.signature.outputs),
    )


def prove_one(
    artifact: Artifact,
    model: Model,
    asked: Sequence[Question],
    tolerances: Mapping[str, float],
    told: Sequence[Question] = (),
) -> Candidate:
    """Prove an artifact in a fresh process. `told` are asked too, and must be answered: how far off is told only."""
    candidate = Candidate(format=artifact.format, settings=artifact.settings, artifact=artifact)
    try:
        with RuntimeProcess(artifact) as process:
            verdict = prove(process, model.signature, asked, tolerances, np.random.default_rng())
            if told:
                candidate = replace(candidate, decisions=(_told_apart(process, model, told),))
        if verdict.passed and candidate.fused and artifact.format == "onnx":
            portable = _prove_portable(artifact, model, asked, tolerances)
            candidate = replace(candidate, decisions=(*candidate.decisions, portable))
    except ProofFailed as error:
        return replace(candidate, reason=error.in_a_line)
    return replace(
        candidate, verdict=verdict, reason="" if verdict.passed else failure(artifact.format, verdict, asked).in_a_line
    )


def _told_apart(process: RuntimeProcess, model: Model, told: Sequence[Question]) -> Decision:
    """How far answers to random inputs are off, which a task's measure is not meant for.

    Raises:
        ProofFailed: one is not finite, or of another shape.
    """
    found = ask(process, model.signature, told, dict.fromkeys(TOLERANCES, sys.float_info.max))
    worst = max(found, key=lambda c: c.error)
    if not all(c.passed for c in found):
        raise ProofFailed("it gives no finite answer to random inputs", why=f"output {worst.output}")
    detail = f"not judged, for the samples are: error {worst.error:.1e}, cosine {worst.cosine:.4f}"
    return Applied(what=f"random inputs at {len(told)} points are answered", detail=detail)


def _prove_portable(
    artifact: Artifact, model: Model, asked: Sequence[Question], tolerances: Mapping[str, float]
) -> Decision:
    """Ask an ONNX file with fused ops where their library is not: its own functions then define them. Half of the
    questions will do, the smaller ones: it is the definitions that are new, and they hold at any size or at none.

    Raises:
        ProofFailed: it does not run there, or gives other answers.
    """
    # Without graphs, too: standard operators may be on the CPU.
    bare = {key: value for key, value in artifact.settings.items() if key not in ("op_libraries", "graphs")}
    libraries = ", ".join(artifact.settings["op_libraries"])
    smaller = sorted(asked, key=lambda q: sum(a.size for a in q.inputs.values()))[: max(3, len(asked) // 2)]
    with RuntimeProcess(artifact, bare) as process:
        found = ask(process, model.signature, smaller, tolerances)
    worst = max(found, key=lambda c: c.error)
    if not all(c.passed for c in found):
        raise ProofFailed(f"without {libraries} the ONNX file gives other answers", why=f"error {worst.error:.1e}")
    return Applied(
        what=f"runs without {libraries} too, slower",
        detail=f"the file defines its fused ops: error {worst.error:.1e}",
    )


def fastest(candidates: Sequence[Candidate], format: str, asked: Sequence[Question]) -> Candidate:
    passed = [c for c in candidates if c.passed]
    if passed:
        return min(passed, key=lambda c: c.score)
    judged = [c for c in candidates if c.verdict is not None]
    if format != "auto" and judged and judged[0].verdict is not None:
        raise failure(format, judged[0].verdict, asked)
    kind = ProofFailed if any(c.artifact is not None for c in candidates) else ExportFailed
    raise kind(
        "no format passed; nothing was packaged" if format == "auto" else f"the {format} artifact failed its proof",
        why="\n      ".join(f"{c.label}: {c.reason}" for c in candidates),
        next_step="fix what is named, or state what you accept: --tolerance float32=1e-4",
    )


def told_of(fused: Mapping[str, Fusion], chosen: Candidate) -> tuple[Decision, ...]:
    """What the fused form of the chosen format holds; of the first format where that one has none."""
    fusion = fused.get("cuda" if chosen.on_gpu else chosen.format) or next(iter(fused.values()), None)
    return fusion.decisions if fusion is not None else ()
