"""What each kind of hardware can do to a model beyond running it as it is, in levels: 1 changes nothing but rounding,
2 computes in half the bits, 3 in a quarter. One module a kind of hardware, one row in BACKENDS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kpdeploy.hardware import Hardware

LEVELS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """One way to compute in fewer bits: an artifact of `format`, quantized first by the scheme `quantized` where that
    is named (see kpdeploy.export.int8.SCHEMES), or of the graph with fused ops, lowered before it is exported, where it
    is `fused`; loaded with `settings`. `missing` says what this machine lacks for it; then it is not tried."""

    level: int
    precision: str
    format: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    quantized: str = ""
    fused: bool = False
    missing: str = ""

    @property
    def on_gpu(self) -> bool:
        """Is it made and proven by kpdeploy.pipeline.graphs?"""
        return self.format == "cuda" or self.settings.get("device") == "cuda"

    @property
    def what(self) -> str:
        return f"level {self.level} ({self.precision})"


class Backend(Protocol):
    """A kind of hardware."""

    def lowerings(self, hardware: Hardware) -> tuple[Lowering, ...]:
        """The ways beyond the formats of level 1, in the order in which they are tried; those that are missing, too.
        None where the hardware itself is not there."""


def lowerings(hardware: Hardware) -> tuple[Lowering, ...]:
    """The ways of all backends that this machine has."""
    from kpdeploy.backends import cpu, nvidia

    backends: tuple[Backend, ...] = (nvidia, cpu)
    return tuple(way for backend in backends for way in backend.lowerings(hardware))
