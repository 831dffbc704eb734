"""OpenVINO's IR, converted from the ONNX graph: model.xml and model.bin, with float32 weights kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.decision import Applied
from kpdeploy.errors import ExportFailed, FormatUnavailable, PackageMissing

if TYPE_CHECKING:
    from kpdeploy.export.capture import Capture


def export(capture: Capture, folder: Path) -> None:
    """Write model.xml and model.bin into `folder`."""
    from kpdeploy.export.capture import quiet, reason

    try:
        import openvino
    except ImportError:
        raise PackageMissing(
            "the format openvino needs the package openvino", next_step="pip install openvino"
        ) from None
    doubles = [s.name for s in (*capture.signature.inputs, *capture.signature.outputs) if s.dtype == "float64"]
    if doubles:
        raise FormatUnavailable(
            f"OpenVINO computes float64 in float32, and {doubles[0]} is float64",
            next_step="try another format: --format onnx, torchscript or pt2; or convert the module with .float()",
        )
    source = _source(capture)
    try:
        with quiet():
            # read_model reads ONNX too, and unlike convert_model sends no news of it to its maker.
            model = openvino.Core().read_model(source) if isinstance(source, str) else openvino.convert_model(source)
            for port, spec in zip(model.inputs, capture.signature.inputs, strict=True):
                port.get_tensor().add_names({spec.name})
            for port, spec in zip(model.outputs, capture.signature.outputs, strict=True):
                port.get_tensor().set_names({spec.name})
            openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
    except Exception as error:
        raise ExportFailed(
            f"{capture.model.name} cannot be written as OpenVINO IR",
            why=reason(error),
            next_step="try another format: --format onnx, torchscript or pt2",
        ) from None


def _source(capture: Capture) -> Any:
    """What OpenVINO converts: the ONNX file, or the exported program where there can be no ONNX file."""
    try:
        return str(capture.onnx_file)
    except ExportFailed as error:
        if capture.model.kind == "onnx":
            raise
        capture.decisions.append(
            Applied(what="OpenVINO converts the exported program", detail=f"there is no ONNX graph: {error.why}")
        )
        return capture.program
