"""NVIDIA GPUs. What is exported today runs on the processor; a GPU that lies idle is told."""

from __future__ import annotations

from kpdeploy.backends import Lowering
from kpdeploy.hardware import Hardware

MISSING = "artifacts for a GPU are not made yet: what is exported runs on the processor"


def lowerings(hardware: Hardware) -> tuple[Lowering, ...]:
    names = ", ".join(dict.fromkeys(gpu.name for gpu in hardware.gpus))
    ways = ((2, "bf16 in CUDA graphs"), (3, "fp8"))
    return tuple(
        Lowering(level=level, precision=f"{precision} on {names}", format="", missing=MISSING)
        for level, precision in (ways if hardware.gpus else ())
    )
