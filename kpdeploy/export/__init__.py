"""The formats a model can be exported to: one module each, one row in FORMATS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpdeploy.export import capture, cuda, onnx, openvino, pt2, torchscript
from kpdeploy.export.capture import Capture
from kpdeploy.ops import libraries


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a model down.

    `export(capture, folder)` writes `filename` (and what belongs to it) into an empty folder. `variants` are the
    runtime settings that are worth measuring (see kpdeploy.runtimes); the first is the default. `library` is the file
    of kpdeploy.ops.libraries that holds the fused ops for its runtime, empty where the format cannot carry them; then
    `fused_variants` are those of an artifact with fused ops, and `leaves` the ops that are left to the format's own
    compiler, `packed_leaves` where padding is dropped. `slow`: an export takes a minute. `by_level`: what is exported
    depends on hardware and level (kpdeploy.backends), and there is no plain form.

    Raises (export): FormatUnavailable where the model's kind rules the format out; ExportFailed, PackageMissing.
    """

    name: str
    filename: str
    export: Callable[[Capture, Path], object]
    variants: Sequence[Mapping[str, Any]] = field(default=({},))
    library: str = ""
    fused_variants: Sequence[Mapping[str, Any]] = field(default=({},))
    leaves: tuple[str, ...] = ()
    packed_leaves: tuple[str, ...] = ()
    slow: bool = False
    by_level: bool = False


FORMATS = {
    f.name: f
    for f in (
        Format(
            name="onnx",
            filename="model.onnx",
            export=onnx.export,
            # "all" includes fusions that are slower than what they replace on some models.
            variants=({"graph_level": "all"}, {"graph_level": "basic"}),
            library=libraries.ONNX,
            fused_variants=({"graph_level": "all"},),
            # What is cut from a joined product is copied here; small ones are as fast in ONNX Runtime's own.
            leaves=("parallel_linears", "small_linear"),
            packed_leaves=("parallel_linears", "small_linear"),
        ),
        Format(name="openvino", filename="model.xml", export=openvino.export, variants=({"precision": "f32"},)),
        Format(name="torchscript", filename="model.pt", export=torchscript.export, library=libraries.TORCH),
        Format(
            name="pt2",
            filename="model.pt2",
            export=pt2.export,
            library=libraries.TORCH,
            # AOTInductor lays frozen weights out for oneDNN once, and fuses the activation into the product: faster
            # than an op that is handed plain weights at each call.
            leaves=("linear_activation", "gated_linear", "linear", "small_linear"),
            packed_leaves=(),  # it cannot lay them out for an unknown number of rows
            slow=True,
        ),
        Format(name="cuda", filename=cuda.FILENAME, export=cuda.export, library=libraries.TORCH, by_level=True),
    )
}

__all__ = ["FORMATS", "Capture", "Format", "capture"]
