"""The values: an accelerator that is no NVIDIA GPU, and what is wrong with one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A device by its vendor ("AMD", "Intel", "Google"). `memory_bytes` is 0 where it cannot be told, `driver` the
    kernel's, `runtime` what programs talk to it through, "" where that is not installed."""

    vendor: str
    name: str
    memory_bytes: int = 0
    driver: str = ""
    runtime: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A device that is there and cannot be used: what is wrong, and the next step."""

    what: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.what}: {self.next_step}"
