"""NVIDIA GPUs: fused ops in CUDA graphs, in float32, float16 or bf16, and fp8 where the tensor cores take it; by torch,
and all but fp8 by ONNX Runtime."""

from __future__ import annotations

import importlib.util

from kpdeploy.backends import Lowering
from kpdeploy.hardware import Hardware

FORMAT = "cuda"

FP8 = (9, 0)
"""The compute capability whose tensor cores our 8-bit kernels are for."""


def lowerings(hardware: Hardware) -> tuple[Lowering, ...]:
    if not hardware.gpus:
        return ()
    gpu = hardware.gpus[0]
    capability = tuple(int(part) for part in gpu.capability.split(".") if part.isdigit())
    no_fp8 = (
        ""
        if capability == FP8
        else f"{gpu.name} has compute capability {gpu.capability}, the 8-bit kernels are for 9.0"
    )
    ways = ((1, "float32", ""), (2, "float16", ""), (2, "bfloat16", ""), (3, "fp8", no_fp8))
    lacks, lacks_onnx = _lacks(gpu.name, "torch with CUDA"), _lacks(gpu.name, "ONNX Runtime with CUDA")
    return (
        *(
            Lowering(
                level=level, precision=precision, format=FORMAT, settings={"precision": precision}, missing=lacks or why
            )
            for level, precision, why in ways
        ),
        *(
            Lowering(
                level=level,
                precision=precision,
                format="onnx",
                settings={"device": "cuda", "precision": precision},
                missing=lacks_onnx,
            )
            for level, precision, _ in ways
            if precision != "fp8"
        ),
    )


def _lacks(gpu: str, runtime: str) -> str:
    """What keeps a runtime and our kernels from a GPU that is there."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    from kpdeploy.decision import Skipped
    from kpdeploy.ops.providers import here

    found = [here()[name] for name in (runtime, "CUDA kernels")]
    reasons = [decision.reason for decision in found if isinstance(decision, Skipped)]
    return f"{gpu} lies idle: {'; '.join(reasons)}" if reasons else ""
