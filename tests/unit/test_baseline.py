"""The baseline of a version: what is written is read, and what earlier releases wrote, too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kpdeploy.artifact import BASELINE, Latency
from kpdeploy.baseline import BUCKETS_SECONDS, WINDOWS, Baseline, Exchange, Windows
from kpdeploy.errors import RepositoryBroken


def baseline() -> Baseline:
    x = np.ones((1, 3), np.float32)
    taken = np.linspace(10, 12, 100)
    return Baseline(
        exchanges=(Exchange(inputs={"x": x}, outputs={"y": 2 * x}),),
        latencies=(Latency(point={"batch": 1}, p50_ms=20.0, p99_ms=21.0, calls=5),),
        environment={"cpu": "a"},
        windows=(Windows.of(taken.tolist(), point={"batch": 1}, rows=1, memory_bytes=5),),
    )


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    baseline().write(tmp_path)
    read = Baseline.read(tmp_path)
    assert read.windows == baseline().windows
    assert read.latencies == baseline().latencies


def test_a_baseline_without_windows_is_read(tmp_path: Path) -> None:
    baseline().write(tmp_path)
    data = json.loads((tmp_path / BASELINE).read_text())
    del data["windows"]
    (tmp_path / BASELINE).write_text(json.dumps(data))
    assert Baseline.read(tmp_path).windows == ()


def test_broken_windows_are_one_clear_error(tmp_path: Path) -> None:
    baseline().write(tmp_path)
    data = json.loads((tmp_path / BASELINE).read_text())
    del data["windows"][0]["histogram"]
    (tmp_path / BASELINE).write_text(json.dumps(data))
    with pytest.raises(RepositoryBroken, match="cannot be read"):
        Baseline.read(tmp_path)


def test_windows_hold_consecutive_calls() -> None:
    windows = Windows.of([1.0] * 50 + [3.0] * 50, point={}, rows=8, memory_bytes=0)
    assert len(windows.p50_ms) == WINDOWS
    assert windows.p50_ms == (1.0,) * 10 + (3.0,) * 10
    assert windows.calls == 5
    assert windows.rows_per_second == 4000


def test_the_histogram_counts_every_call_in_its_bucket() -> None:
    longest = BUCKETS_SECONDS[-1] * 1e3
    windows = Windows.of([0.1, 0.5, 0.51, longest, longest * 2], point={}, rows=1, memory_bytes=0, count=5)
    assert windows.histogram[:2] == (2, 1)  # a bound belongs to its bucket, as in Prometheus
    assert windows.histogram[-2:] == (1, 1)
    assert sum(windows.histogram) == 5
