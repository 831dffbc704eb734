"""A program for an NVIDIA GPU, run in CUDA graphs (kpdeploy.runtimes.cuda): fused ops in 32, 16 or 8 bits."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import Tensors, lead_axis
from kpdeploy.signature import Axis, Point, Signature, TensorSpec, Values

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

    from kpdeploy.export.capture import Capture

FILENAME = "model.pt2"
GRAPHS = "graphs.json"
FP8 = "fp8.json"
"""What each product of a program in 8 bits costs alone, and the scale of its input."""

LENGTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Sizes of a bucket along an axis that is no batch."""

SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
"""Of a batch's places that are tokens, in buckets of a program that drops padding."""

MANY = 1024
"""A batch of fewer places has one bucket for half of them, and one for all."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a program is made: `precision` is float32, float16, bfloat16 or fp8; `dropped`: without padding; `padded`:
    the axes along which a request may be filled up with zeros to fit a bucket."""

    precision: str = "float32"
    dropped: bool = False
    padded: tuple[str, ...] = ()


def export(
    capture: Capture,
    folder: Path,
    form: Form = Form(),
    *,
    device: str = "cuda",
    samples: Sequence[Tensors] = (),
    budget: float = 0,
) -> tuple[Decision, ...]:
    """Write model.pt2 and graphs.json of a capture of fused ops into `folder`.

    `samples` are inputs that fp8 takes its scales from, `budget` the error that it may have. `device` "cpu" is for
    tests.

    Raises:
        ExportFailed: the program cannot be made in this form.
    """
    import torch

    from kpdeploy.export.capture import quiet, reason
    from kpdeploy.optimize import pack, precision, products

    # A copy: it shares its weights with the model that the proof asks.
    module: GraphModule = copy.deepcopy(capture.program.module(check_guards=False))
    decisions: list[Decision] = []
    try:
        with quiet(), torch.no_grad():
            products.through_op(module)
            # With its index: torch.export tells "cuda" from "cuda:0".
            precision.place(module, torch.empty(0, device=device).device)
            if form.precision != "float32":
                half = torch.bfloat16 if form.precision == "fp8" else getattr(torch, form.precision)
                precision.lower(module, half)
            if form.precision == "fp8":
                from kpdeploy.optimize import fp8

                told, layers = fp8.lower(module, samples, budget)
                decisions += told
                (folder / FP8).write_text(json.dumps(fp8.report(layers), indent=2))
            if form.dropped:
                decisions.append(pack.pack(module, given=True))
                if isinstance(decisions[-1], Skipped):
                    raise ExportFailed(f"padding cannot be dropped from {capture.model.name}", why=decisions[-1].reason)
            program = _program(capture, module, dropped=form.dropped)
            torch.export.save(program, folder / FILENAME)
    except ExportFailed:
        raise
    except Exception as error:
        raise ExportFailed(f"{capture.model.name} cannot be made in {form.precision}", why=reason(error)) from None
    (folder / GRAPHS).write_text(json.dumps(described(capture.signature, form, device)))
    return tuple(decisions)


def _program(capture: Capture, module: GraphModule, *, dropped: bool) -> torch.export.ExportedProgram:
    from kpdeploy.export.capture import program_of
    from kpdeploy.load.flat import Flat

    signature = capture.signature
    if dropped:
        # An exported module takes a pytree, which it checks, and which knows nothing of the inputs that were added.
        import torch

        module.graph.set_codegen(torch.fx.graph.CodeGen())
        module._forward_pre_hooks.clear()
        module.recompile()
        signature = _with_places(signature)
    return program_of(replace(capture.model, module=Flat(module, None), program=None, signature=signature))


def _with_places(signature: Signature) -> Signature:
    """The signature of a program that is told where tokens are (kpdeploy.optimize.pack)."""
    from kpdeploy.optimize.pack import INPUTS

    rows = signature.axis(lead_axis(signature)).max
    places = rows * math.prod(a.max for a in signature.axes if a.name != lead_axis(signature))
    axes = (*signature.axes, Axis(name="tokens", min=1, max=places), Axis(name="bounds", min=2, max=rows + 1))
    zeros = Values(kind="range", low=0, high=0)
    shapes = (("tokens",), ("tokens",), ("bounds",))
    added = [
        TensorSpec(name=n, dtype="int64", shape=shape, values=zeros) for n, shape in zip(INPUTS, shapes, strict=True)
    ]
    return replace(signature, inputs=(*signature.inputs, *added), axes=axes)


def described(signature: Signature, form: Form, device: str) -> dict[str, Any]:
    """The contents of graphs.json."""
    kinds = [spec.values.kind if spec.values is not None else "" for spec in signature.inputs]
    return {
        "device": device,
        "inputs": [spec.shape for spec in signature.inputs],
        "outputs": [spec.shape for spec in signature.outputs],
        "dtypes": [spec.dtype for spec in signature.inputs] + ["int64"] * (3 if form.dropped else 0),
        "padded": form.padded,
        "mask": kinds.index("prefix_mask") if form.dropped else None,
        "buckets": buckets(signature, dropped=form.dropped),
    }


def buckets(signature: Signature, *, dropped: bool) -> list[dict[str, int]]:
    """Batches in powers of two, other axes in LENGTHS, and the ends of each. Where padding is dropped, each with
    several numbers of tokens."""
    lead = lead_axis(signature)
    points: list[Point] = [{}]
    for axis in signature.axes:
        steps = tuple(1 << n for n in range(24)) if axis.name == lead else LENGTHS
        sizes = sorted({axis.min, axis.max, *(n for n in steps if axis.min <= n <= axis.max)})
        points = [{**point, axis.name: size} for point in points for size in sizes]
    if not dropped:
        return [dict(point) for point in points]
    return [{**point, "tokens": tokens} for point in points for tokens in _token_counts(point, lead)]


def _token_counts(point: Point, lead: str) -> list[int]:
    places = math.prod(point.values())
    if point[lead] == 1:
        # One row is as long as its bucket, or fits a shorter one.
        return [places]
    shares = SHARES if places >= MANY else (1 / 2, 1)
    return sorted({max(1, math.ceil(places * share)) for share in shares})


def told(form: Form) -> Decision:
    """What a form means to whoever serves it."""
    axes = " and ".join(form.padded) or "no axis"
    detail = f"requests are filled up along {axes} to the next bucket; others run without a graph"
    return Applied(what="CUDA graphs", detail=detail)
