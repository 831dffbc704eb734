"""Where the kernel libraries are. Asking never fails: what is not there is Skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

from kpdeploy.decision import Applied, Skipped

FOLDER = Path(__file__).parent.parent / "lib"
TORCH = "libkpdeploy_torch.so"
ONNX = "libkpdeploy_onnx.so"

_BUILD = "build it with `pip install .` where a C++ compiler is (csrc/BUILD.md)"


def find(name: str) -> Path | Skipped:
    """The path of a kernel library, by its file name."""
    path = FOLDER / name
    if path.is_file():
        return path
    return Skipped(what=name, reason=f"this installation holds no {path.parent.name}/{name}: {_BUILD}")


def load_torch() -> Applied | Skipped:
    """Load libkpdeploy_torch.so into this process's torch, which then has torch.ops.kpdeploy.*."""
    import torch

    path = find(TORCH)
    if isinstance(path, Skipped):
        return path
    try:
        torch.ops.load_library(path)
    except OSError as error:
        least = "it needs torch 2.10 or later"
        return Skipped(what=TORCH, reason=f"torch {torch.__version__} does not load it ({least}): {error}")
    return Applied(what=TORCH, detail=str(path))
