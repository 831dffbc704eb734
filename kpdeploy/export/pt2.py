"""A package of AOTInductor: machine code for this CPU, with the weights frozen in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kpdeploy.errors import ExportFailed, PackageMissing

if TYPE_CHECKING:
    from kpdeploy.export.capture import Capture


def export(capture: Capture, folder: Path) -> None:
    """Compile model.pt2 into `folder`. Takes about a minute, and a C++ compiler."""
    from kpdeploy.export.capture import quiet, reason

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise PackageMissing(
            "the format pt2 needs a C++ compiler", why=f"{compiler} is not on PATH", next_step="apt install g++"
        )
    program = capture.program
    try:
        with quiet():
            import torch
            import torch._inductor

            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(folder / "model.pt2"), inductor_configs={"freezing": True}
                )
    except Exception as error:
        raise ExportFailed(
            f"AOTInductor cannot compile {capture.model.name}",
            why=reason(error),
            next_step="try another format: --format onnx, openvino or torchscript",
        ) from None
