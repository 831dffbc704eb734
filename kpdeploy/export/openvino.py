"""OpenVINO's IR, converted from the ONNX graph: model.xml and model.bin, with float32 weights kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kpdeploy.errors import ExportFailed, PackageMissing

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
    source = capture.onnx_file
    try:
        with quiet():
            model = openvino.convert_model(str(source))
            for port, spec in zip(model.outputs, capture.signature.outputs, strict=True):
                port.get_tensor().set_names({spec.name})
            openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
    except Exception as error:
        raise ExportFailed(
            f"{capture.model.name} cannot be written as OpenVINO IR",
            why=reason(error),
            next_step="try another format: --format onnx, torchscript or pt2",
        ) from None
