"""The processor: bf16 and int8 by OpenVINO, whose products in both were the fastest of all that were measured; and bf16
by fused ops, which drop padding."""

from __future__ import annotations

import importlib.util

from kpdeploy.backends import Lowering
from kpdeploy.decision import Skipped
from kpdeploy.hardware import Hardware
from kpdeploy.ops.libraries import TORCH, find

BF16 = ("amx_bf16", "avx512_bf16", "bf16")
INT8 = ("amx_int8", "avx512_vnni", "i8mm")
"""Instruction sets as /proc/cpuinfo spells them: without them the precision is emulated, and slower than float32."""

SCHEMES: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("static", "int8", {}),
    ("dynamic", "int8 dynamic", {"activation_group": 128}),
)
"""How int8 gets its scales, the precision's name, and settings. Of groups for dynamic scales, 128 lost a twentieth of
the speed of whole rows on MiniLM and a quarter of their error; 64 lose twice as much, 32 are slower than bf16."""


def lowerings(hardware: Hardware) -> tuple[Lowering, ...]:
    bf16, int8 = _lacks(hardware, BF16, "bf16"), _lacks(hardware, INT8, "int8")
    # What is not quantized computes in bf16 where the processor has it.
    rest = "f32" if bf16 else "bf16"
    packages = "" if importlib.util.find_spec("nncf") else "the package nncf is missing: pip install nncf"
    return (
        Lowering(level=2, precision="bf16", format="openvino", settings={"precision": "bf16"}, missing=bf16),
        # OpenVINO's products are a little faster; this one does not compute the padding of a batch.
        Lowering(
            level=2,
            precision="bfloat16",
            format="torchscript",
            settings={"precision": "bfloat16"},
            fused=True,
            missing=bf16 or _no_library(),
        ),
        *(
            Lowering(
                level=3,
                precision=precision,
                format="openvino",
                settings={"precision": rest, "quantized": precision, **settings},
                quantized=scheme,
                missing=int8 or packages,
            )
            for scheme, precision, settings in SCHEMES
        ),
    )


def _no_library() -> str:
    found = find(TORCH)
    return f"{found.what} is missing: {found.reason}" if isinstance(found, Skipped) else ""


def _lacks(hardware: Hardware, needed: tuple[str, ...], precision: str) -> str:
    if set(needed) & set(hardware.isa):
        return ""
    return f"{hardware.cpu} has no {precision} instructions ({', '.join(needed)})"
