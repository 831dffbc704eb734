"""A program for an NVIDIA GPU, run in CUDA graphs (kpdeploy.runtimes.cuda): fused ops in 32, 16 or 8 bits."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.decision import Applied, Decision
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import lead_axis
from kpdeploy.ops.packed_attention import PLACES
from kpdeploy.signature import Axis, Point, Signature, TensorSpec, Values

if TYPE_CHECKING:
    import torch

    from kpdeploy.export.capture import Capture

FILENAME = "model.pt2"
GRAPHS = "graphs.json"

LENGTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Sizes of a bucket along an axis that is no batch."""

STEPS = ((4096, 16), (1024, 8), (0, 2))
"""Batches of so many places have buckets for each of so many parts of them, of a quarter at least, where padding is
dropped: what a bucket holds more than a request is computed for nothing."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a program is made: `precision` is float32, float16, bfloat16 or fp8; `dropped`: without padding; `padded`:
    the axes along which a request may be filled up with zeros to fit a bucket; `graphs`: False: none are captured."""

    precision: str = "float32"
    dropped: bool = False
    padded: tuple[str, ...] = ()
    graphs: bool = True


def export(
    capture: Capture,
    folder: Path,
    form: Form = Form(),
    *,
    module: torch.nn.Module | None = None,
    constant: bool = False,
    device: str = "cuda",
) -> None:
    """Write model.pt2 and graphs.json into `folder`: of `module`, a rewritten form of a capture that takes and gives a
    tuple of tensors, or of the capture as it is. `constant`: all its weights are held, none computed. `device` "cpu" is
    for tests.

    Raises:
        ExportFailed: it cannot be captured, or written.
    """
    import torch

    from kpdeploy.export.capture import program_of, quiet, reason

    signature = _with_places(capture.signature) if form.dropped else capture.signature
    try:
        with quiet(), torch.no_grad():
            program = capture.program
            if module is not None:
                program = program_of(replace(capture.model, module=module, program=None, signature=signature))
            torch.export.save(program, folder / FILENAME)
    except ExportFailed:
        raise
    except Exception as error:
        why = reason(error)
        raise ExportFailed(f"{capture.model.name} cannot be written in {form.precision}", why=why) from None
    (folder / GRAPHS).write_text(json.dumps({**described(capture.signature, form, device), "constant": constant}))


def _with_places(signature: Signature) -> Signature:
    """The signature of a program that is told where tokens are (kpdeploy.optimize.pack)."""
    largest = {axis.name: axis.max for axis in signature.axes}
    rows, columns = _batch(signature, largest)
    places = rows * columns
    axes = (*signature.axes, Axis(name="tokens", min=1, max=places), Axis(name="bounds", min=2, max=rows + 1))
    zeros = Values(kind="range", low=0, high=0)
    shapes = (("tokens",), ("tokens",), ("bounds",))
    added = [
        TensorSpec(name=n, dtype="int64", shape=shape, values=zeros) for n, shape in zip(PLACES, shapes, strict=True)
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
        "output_dtypes": [spec.dtype for spec in signature.outputs],
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
    return [{**point, "tokens": tokens} for point in points for tokens in _token_counts(*_batch(signature, point))]


def _batch(signature: Signature, point: Point) -> tuple[int, int]:
    """The rows and columns of a batch at a point: of the mask that tells tokens from padding."""
    masks = (spec for spec in signature.inputs if spec.values is not None and spec.values.kind == "prefix_mask")
    rows, columns = (point[d] if isinstance(d, str) else d for d in next(masks).shape)
    return rows, columns


def _token_counts(rows: int, columns: int) -> list[int]:
    places = rows * columns
    if rows == 1:
        # One row is as long as its bucket, or fits a shorter one.
        return [places]
    parts = next(parts for least, parts in STEPS if places >= least)
    return sorted({max(1, math.ceil(places * part / parts)) for part in range(max(1, parts // 4), parts + 1)})


def form_of(folder: Path) -> Form:
    """The form of what is in a folder, but for its precision."""
    if not (folder / GRAPHS).is_file():
        return Form(graphs=False)
    described = json.loads((folder / GRAPHS).read_text())
    return Form(dropped=described["mask"] is not None, padded=tuple(described["padded"]))


def told(form: Form) -> Decision:
    """What a form means to whoever serves it."""
    axes = " and ".join(form.padded) or "no axis"
    detail = f"requests are filled up along {axes} to the next bucket; others run without a graph"
    return Applied(what="CUDA graphs", detail=detail)
