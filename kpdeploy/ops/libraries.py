"""Where the kernel libraries are. Asking never fails: what is not there is Skipped, with the reason."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
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


LEAST = {TORCH: {"torch": "2.10"}, ONNX: {"onnxruntime": "1.21"}}
"""The oldest release of a runtime that a library loads in: csrc/BUILD.md says why."""


def contract(path: Path) -> dict[str, str]:
    """What a library needs of the machine that loads it: the least version by name (onnxruntime or torch, glibc,
    glibcxx), as its symbols say."""
    data = path.read_bytes()
    needs = dict(LEAST.get(path.name, {}))
    for name, symbol in (("glibc", rb"GLIBC_([0-9.]+)\0"), ("glibcxx", rb"GLIBCXX_([0-9.]+)\0")):
        versions = [tuple(map(int, found.decode().split("."))) for found in re.findall(symbol, data)]
        if versions:
            needs[name] = ".".join(map(str, max(versions)))
    return needs


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


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Let calls of this thread take weights, biases and weights' scales as constants, as those of a model are.

    On a GPU of compute capability 9.0 they are then read while the kernel ahead is still running; a CUDA graph that is
    captured inside keeps that. Whoever writes one waits for the GPU before its next use. Where the library is not, or
    lacks this, nothing changes.
    """
    path = find(TORCH)
    use = None if isinstance(path, Skipped) else getattr(ctypes.CDLL(str(path)), "kpdeploy_use_constant_weights", None)
    if use is None:
        yield
        return
    before = use(1)
    try:
        yield
    finally:
        use(before)
