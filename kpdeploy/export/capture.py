"""The graph of a model, captured once by torch.export and shared by the formats."""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx.experimental._config as _sizes

from kpdeploy.compare import relative_error
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ExportFailed, FormatUnavailable
from kpdeploy.inputs import sample
from kpdeploy.model import Model
from kpdeploy.signature import Axis, Signature

ROUNDING = 1e-6
"""Relative difference between two runs of the same operators that rounding explains."""


@dataclass(frozen=True)
class Capture:
    """A model and, made when first asked for, its exported program and its ONNX file.

    `folder` is where shared intermediate files go.
    """

    model: Model
    folder: Path
    decisions: list[Decision] = field(default_factory=list)
    """What an export had to do differently from what was asked."""

    @property
    def signature(self) -> Signature:
        return self.model.signature

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The exported program, with the signature's dynamic axes.

        Raises:
            FormatUnavailable: the model is a file that holds no PyTorch program.
            ExportFailed: torch.export refused.
        """
        if self.model.program is not None:
            program: torch.export.ExportedProgram = self.model.program
            return program
        if self.model.module is None or self.model.kind in ("onnx", "torchscript"):
            raise FormatUnavailable(
                f"a model given as {self.model.kind} holds no program that torch.export could capture",
                next_step="give the module itself: MODEL = package.module:factory",
            )
        return program_of(self.model)

    @cached_property
    def widened(self) -> torch.export.ExportedProgram:
        """The program, computing in float32 where the module computes in bfloat16: no CPU kernel of ONNX Runtime
        takes that."""
        module = self.model.module
        if module is None or self.model.kind != "module" or not _has_bfloat16(module):
            return self.program
        wide = copy.deepcopy(module).float()
        wide.dtypes = []  # type: ignore[assignment]  # of a Flat: inputs come as float32 and stay so
        program = program_of(replace(self.model, module=wide, program=None))
        self.decisions.append(
            Applied(
                what="ONNX and OpenVINO compute in float32",
                detail="the weights are bfloat16, for which ONNX Runtime has no CPU kernels",
            )
        )
        return program

    @cached_property
    def onnx_file(self) -> Path:
        """The model as ONNX, written once for all formats that start from it."""
        from kpdeploy.export import onnx

        folder = self.folder / "onnx"
        folder.mkdir()
        onnx.export(self, folder)
        return folder / "model.onnx"


def _has_bfloat16(module: torch.nn.Module) -> bool:
    return any(t.dtype is torch.bfloat16 for t in (*module.parameters(), *module.buffers()))


def settle_axes(model: Model, *, stated: bool) -> Model:
    """Capture the model once and hold its signature to what the capture allows.

    An axis that the model fixes (or ties to another) becomes a constant, with a Skipped decision; where the user
    stated the axis, that is an error instead. One of a single size is that constant.

    Raises:
        ExportFailed: torch.export refused the model, or an axis that the user stated.
    """
    if model.module is None or model.kind in ("onnx", "torchscript"):
        return model
    for axis in model.signature.axes:
        if axis.min == axis.max:
            model = replace(model, signature=model.signature.freeze_axis(axis.name, axis.min))
    try:
        return replace(model, program=program_of(model))
    except ExportFailed as first:
        if not model.signature.axes:
            raise
        kept, decisions = _axes_that_hold(model, first)
    if stated and decisions:
        lost = next(d for d in decisions if isinstance(d, Skipped))
        raise ExportFailed(
            f"the model does not allow the axis that --input states: {lost.what}",
            why=lost.reason,
            next_step="state a single size for it, such as seq=128..128 or just 128",
        )
    settled = replace(model, signature=kept, decisions=(*model.decisions, *decisions))
    return replace(settled, program=program_of(settled))


def program_of(model: Model) -> torch.export.ExportedProgram:
    """Capture with the signature's axes, sparing the model torch.export's own objections to small sizes.

    torch.export wants one graph to be right for sizes 1 and 2 too, and refuses where Python code asks about them,
    even if both answers come to the same. Its relaxed modes give a graph then, which is kept only if it gives the
    model's answers at those sizes.
    """
    signature = model.signature
    dims = {a.name: torch.export.Dim(a.name, min=a.min, max=a.max) for a in signature.axes}
    shapes = [{i: dims[d] for i, d in enumerate(s.shape) if isinstance(d, str)} for s in signature.inputs]
    try:
        return _export(model, shapes)
    except ExportFailed as error:
        if not _is_about_sizes(error):
            raise
        refused = error
    for oblivious in (True, False):
        with suppress(ExportFailed):
            program = _export(model, shapes, oblivious=oblivious, deferred=not oblivious)
            if _agrees(model, program):
                return program
    raise refused


def _is_about_sizes(error: ExportFailed) -> bool:
    return "Constraints violated" in error.why


def _agrees(model: Model, program: torch.export.ExportedProgram) -> bool:
    """Does the program give the model's answers at small, odd and largest sizes?"""
    assert model.module is not None
    run, rng = program.module(check_guards=False), np.random.default_rng(1)
    for size in (1, 2, 3, 5, 8, 17, max((a.max for a in model.signature.axes), default=1)):
        point = {a.name: min(max(size, a.min), a.max) for a in model.signature.axes}
        tensors = _sampled(model, point, rng)
        try:
            with torch.no_grad():
                pairs = zip(run(*tensors), model.module(*tensors), strict=True)
                if any(relative_error(a.numpy(force=True), b.numpy(force=True)) > ROUNDING for a, b in pairs):
                    return False
        except Exception:  # whatever it raises: the graph does not hold at this size
            return False
    return True


def _export(
    model: Model, shapes: list[dict[int, Any]], *, oblivious: bool = False, deferred: bool = False
) -> torch.export.ExportedProgram:
    """torch.export at the capture point. `oblivious`: no size is taken for 1; `deferred`: what it would ask of sizes
    becomes an assertion in the graph."""
    assert model.module is not None
    tensors = _sampled(model, _capture_point(model.signature), np.random.default_rng(0))
    try:
        with quiet(), torch.no_grad(), _sizes.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
            return torch.export.export(
                model.module,
                tensors,
                dynamic_shapes=(tuple(shapes),),
                prefer_deferred_runtime_asserts_over_guards=deferred,
            )
    except Exception as error:
        raise ExportFailed(
            f"torch.export cannot capture {model.name}",
            why=reason(error),
            next_step="avoid Python control flow on tensor values in forward(), or fix the axis that is named",
        ) from None


def _sampled(model: Model, point: dict[str, int], rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Random inputs at a point, where the module's weights are."""
    assert model.module is not None
    device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
    return tuple(torch.from_numpy(a).to(device) for a in sample(model.signature, point, rng).values())


def _capture_point(signature: Signature) -> dict[str, int]:
    """Sizes that torch.export does not take for constants (0 and 1 are special to it), all different."""
    return {a.name: min(a.max, max(a.min, 2 + 3 * index)) for index, a in enumerate(signature.axes)}


def _axes_that_hold(model: Model, refused: ExportFailed) -> tuple[Signature, list[Decision]]:
    """Let torch.export decide which axes can vary, and freeze or narrow the others."""
    signature = model.signature
    hints = {a.name: torch.export.Dim.AUTO(min=a.min, max=a.max) for a in signature.axes}
    shapes = [{i: hints[d] for i, d in enumerate(s.shape) if isinstance(d, str)} for s in signature.inputs]
    program = _export(model, shapes, deferred=True)
    lead = signature.inputs[0].shape[0] if signature.inputs[0].shape else None
    decisions: list[Decision] = []
    for axis in signature.axes:
        captured = _captured_axis(program, signature, axis, refused)
        if isinstance(captured, Axis):
            if captured != axis:
                what = f"axis {axis.name} narrowed to {captured.min}..{captured.max}"
                decisions.append(Applied(what=what, detail=refused.why))
                axes = tuple(captured if a.name == axis.name else a for a in signature.axes)
                signature = replace(signature, axes=axes)
            continue
        size = captured if captured is not None else axis.min if axis.name == lead else axis.max
        decisions.append(Skipped(what=f"dynamic axis {axis.name}, fixed at {size}", reason=refused.why))
        signature = signature.freeze_axis(axis.name, size)
    if not decisions:
        raise refused
    return signature, decisions


def _captured_axis(
    program: torch.export.ExportedProgram, signature: Signature, axis: Axis, refused: ExportFailed
) -> Axis | int | None:
    """How the capture sees an axis: still free (with its range), a constant, or None for anything else."""
    places = {
        spec_index: spec.shape.index(axis.name)
        for spec_index, spec in enumerate(signature.inputs)
        if axis.name in spec.shape
    }
    index, dim = next(iter(places.items()))
    node = next(n for n in program.graph.nodes if n.name == program.graph_signature.user_inputs[index])
    size = node.meta["val"].shape[dim]
    if isinstance(size, int):
        return None if size != axis.min else size
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is None or not size.node.expr.is_symbol:
        return None
    low, high = int(bounds.lower), min(axis.max, int(bounds.upper))
    # A lower bound of 2 is torch.export's own assumption, unless it named the axis when it refused.
    named = re.search(r"Constraints violated \(([^)]*)\)", refused.why)
    if low == 2 and (named is None or axis.name not in named[1].split(", ")):
        low = axis.min
    if low >= high:  # a constant, written as a range
        return None
    return Axis(name=axis.name, min=max(axis.min, low), max=high)


def reason(error: BaseException) -> str:
    """The first lines of an exception that say something, without a traceback."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("File ", "Traceback", "^", "%", "#", "==", "--"))]
    return f"{type(error).__name__}: {' '.join(told[:3])[:400]}" if told else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own internals: nothing that a user could act on."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    # torch.export prints the graph so far to stderr when it gives up.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
