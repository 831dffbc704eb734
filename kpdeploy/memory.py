"""How much memory a packaged model takes: planned before its largest request is run, and measured after."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from kpdeploy.errors import UnknownName

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that takes memory in each instance: `bytes` whatever the batch, and `bytes_per_row` for each of its
    rows at the largest sizes of all other axes. `device`: "host", or a GPU's name; there a pool of CUDA graphs is a
    part like any other."""

    what: str
    bytes: int = 0
    bytes_per_row: float = 0.0
    device: str = "host"

    def at(self, rows: int) -> int:
        return round(self.bytes + self.bytes_per_row * rows)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What `instances` of a model take at most when each answers a batch of `rows` at the largest sizes of all other
    axes (`point`). `loading_bytes`: what one takes while it is loaded, if that is more. `measured_bytes`: what one
    took of the host when it was asked exactly that, and `measured_on` of each other device; 0 and nothing where it was
    not."""

    point: Mapping[str, int]
    rows: int
    parts: tuple[Part, ...]
    instances: int = 1
    loading_bytes: int = 0
    measured_bytes: int = 0
    measured_on: Mapping[str, int] = field(default_factory=dict)

    def instance_bytes(self, device: str = "host") -> int:
        """What one instance is planned to take on a device."""
        planned = sum(part.at(self.rows) for part in self.parts if part.device == device)
        return max(planned, self.loading_bytes) if device == "host" else planned

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.device for part in self.parts))

    def total_bytes(self, device: str = "host") -> int:
        return self.instances * self.instance_bytes(device)

    @property
    def largest_bytes(self) -> int:
        """What a budget is held against: the host's memory, or the GPU's of a model that runs there."""
        elsewhere = [self.total_bytes(device) for device in self.devices if device != "host"]
        return max(elsewhere, default=self.total_bytes())

    def of(self, *, rows: int, instances: int) -> MemoryPlan:
        """The same for another batch and count. What was measured is of the whole batch, and is not known then."""
        known = (self.measured_bytes, self.measured_on) if rows == self.rows else (0, {})
        return replace(self, rows=rows, instances=instances, measured_bytes=known[0], measured_on=known[1])

    def rows_of_table(self) -> list[tuple[str, str, str]]:
        """What, where and how much, as texts: the parts, and their sums."""
        lines = [(part.what, part.device, size(part.at(self.rows))) for part in self.parts]
        for device in self.devices:
            each = f"{self.instances} x {size(self.instance_bytes(device))}" if self.instances > 1 else "planned"
            lines.append((each, device, size(self.total_bytes(device))))
        if self.measured_bytes:
            lines.append(("measured, an instance", "host", size(self.measured_bytes)))
        lines += [("measured, an instance", device, size(count)) for device, count in self.measured_on.items()]
        return lines

    def to_json(self) -> dict[str, Any]:
        told = asdict(self)
        if not self.measured_on:
            del told["measured_on"]
        return {**told, "planned_bytes": {device: self.total_bytes(device) for device in self.devices}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{**known, "parts": tuple(Part(**part) for part in data["parts"])})


def fitting(plan: MemoryPlan, budget_bytes: int, *, batches: Sequence[int], instances: int) -> MemoryPlan | None:
    """The plan with the most instances, up to `instances`, and then the largest of `batches` that fit; None where not
    even one instance with the smallest batch does. Instances first: they were measured to help, a batch is a limit."""
    for count in range(max(1, instances), 0, -1):
        for rows in sorted(batches, reverse=True):
            found = plan.of(rows=rows, instances=count)
            if found.largest_bytes <= budget_bytes:
                return found
    return None


def parse_bytes(text: str) -> int:
    """4GiB, 500MB, 2G, 1.5e9: a number of bytes, in powers of 1024 with an i, else of 1000.

    Raises:
        UnknownName: it is none.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.strip(), re.IGNORECASE)
    unit = {**UNITS, **BINARY}.get(match[2].upper()) if match else None
    try:
        count = int(float(match[1]) * unit) if match and unit else 0
    except ValueError:
        count = 0
    if count <= 0:
        raise UnknownName(f"{text!r} is no amount of memory", next_step="write it as 4GiB, 500MB or 2000000000")
    return count


def point_told(plan: MemoryPlan) -> str:
    """Where on the dynamic range a plan stands: at 32 rows, seq 256."""
    others = [f"{name} {length}" for name, length in plan.point.items()][1:] if plan.rows > 1 else []
    return ", ".join([f"at {plan.rows} row{'s' * (plan.rows > 1)}", *others])


def size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 10e9 else f"{count / 1e9:.1f} GB"
