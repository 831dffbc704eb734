"""What runs an artifact: one file a runtime, each standing alone (NumPy and its runtime, nothing of kpdeploy).

The same file proves the artifact in a fresh process, measures it, and serves it inside Triton's python backend, so
that what was proven is what runs. Each has

    load(path, *, inputs, outputs, settings) -> run
    run(arrays) -> arrays

`inputs` and `outputs` are the artifact's own names, in call order; `arrays` follow that order. `settings` is
JSON: `threads` (0: the runtime's choice) for all, the rest in each file's docstring. A runtime that holds memory on
another device has `memory()` too: [{"what": "pool of CUDA graphs", "bytes": …, "device": "NVIDIA H100"}], of now; the
last entry may count what other processes hold.
"""

from __future__ import annotations

from pathlib import Path

RUNTIMES = ("onnx", "torchscript", "pt2", "openvino", "cuda")

PACKAGES = {
    "onnx": ("onnxruntime",),
    "torchscript": ("torch",),
    "pt2": ("torch",),
    "openvino": ("openvino",),
    "cuda": ("torch",),
}
"""The packages that each runtime needs beside NumPy."""


GPU_PACKAGES = {"onnx": ("onnxruntime-gpu[cuda,cudnn]", "nvidia-cublas")}
"""Those of a runtime that need others where it runs on a GPU."""


def source(runtime: str) -> Path:
    """The file of a runtime, or of what one loads from its own folder, to be run or copied."""
    return Path(__file__).with_name(f"{runtime}.py")
