"""What a load test found: one Row for each level, and the BenchReport of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hdrh.histogram import HdrHistogram

LONGEST_US = 3_600_000_000
DIGITS = 3
CURVE = (0, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 92.5, 95, 97.5, 98, 99, 99.5, 99.9, 99.95, 99.99, 100)
"""Percentiles kept of each level, for a curve of latency against percentile."""


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Milliseconds of the requests that succeeded, to three significant digits (an HDR histogram); 0 where none did."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    curve: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latencies:
        histogram = HdrHistogram(1, LONGEST_US, DIGITS)
        for value in seconds:
            histogram.record_value(max(1, min(LONGEST_US, round(value * 1e6))))

        def at(percentile: float) -> float:
            return float(histogram.get_value_at_percentile(percentile)) / 1e3

        return cls(
            p50_ms=at(50),
            p90_ms=at(90),
            p99_ms=at(99),
            p999_ms=at(99.9),
            max_ms=max(seconds, default=0.0) * 1e3,
            curve=tuple((p, at(p)) for p in CURVE),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One level of load.

    `level` is the number of clients (closed loop) or the asked rate in requests/s (open loop). `seconds` runs from
    the first send to the last answer. `late_p99_ms` says how late the generator sent (open loop; the latencies
    include it), `generator_cores` how much of a CPU core the generator itself used.
    """

    mode: str
    level: float
    seconds: float
    succeeded: int
    errors: Mapping[str, int]
    latencies: Latencies
    late_p99_ms: float
    generator_cores: float

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def throughput(self) -> float:
        """Requests that succeeded, a second."""
        return self.succeeded / self.seconds if self.seconds else 0.0

    @property
    def label(self) -> str:
        return f"{self.level:g} client{'s' * (self.level != 1)}" if self.mode == "closed" else f"{self.level:g}/s"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why these figures may say more about the generator, or the sample, than about the server."""
        found = []
        answered = (self.succeeded + self.failed) / self.seconds
        if self.mode == "open" and answered < 0.95 * self.level:
            found.append(f"{self.label} asked, {answered:.4g}/s achieved")
        if self.late_p99_ms > max(2.0, 0.1 * self.latencies.p99_ms):
            found.append(
                f"at {self.label} the generator fell behind: 1 % of requests left > {self.late_p99_ms:.1f} ms late"
            )
        if self.generator_cores > 0.9:
            found.append(f"at {self.label} the generator itself was busy ({self.generator_cores:.0%} of a core)")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["errors"] = dict(self.errors)
        return {**data, "throughput_per_second": self.throughput, "failed": self.failed, "warnings": self.warnings}


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """A load test: what was asked of which server, with what, and a Row a level."""

    url: str
    protocol: str
    server: str
    model: str
    version: str
    mode: str
    point: Mapping[str, int]
    inputs: tuple[str, ...]
    distinct_requests: int
    warmup_seconds: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(warning for row in self.rows for warning in row.warnings)

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**data, "point": dict(self.point), "rows": [row.to_json() for row in self.rows]}
