"""Which layouts are measured, and which is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from kpdeploy.artifact import Artifact
from kpdeploy.decision import Applied, Skipped
from kpdeploy.errors import UnknownName
from kpdeploy.hardware import allocators
from kpdeploy.pipeline import tuning
from kpdeploy.pipeline.layout import Wanted
from kpdeploy.pipeline.tuning import Layout, Measured, layouts_of, settings_of, tune
from kpdeploy.progress import Progress
from kpdeploy.signature import TensorSpec, parse_inputs

SIGNATURE = parse_inputs(("x:float32[batch=1..8,3]",)).with_outputs(
    (TensorSpec(name="y", dtype="float32", shape=("batch", 3)),)
)
ARTIFACT = Artifact(format="onnx", folder=Path(), filename="m", input_names=("x",), output_names=("y",))


def pairs(cores: int, load: str, most: int = 99) -> list[tuple[int, int]]:
    return [(layout.instances, layout.threads) for layout in layouts_of(cores, load, most)]


def test_cores_are_shared_out_for_throughput_and_left_alone_for_latency() -> None:
    assert pairs(2, "throughput") == [(1, 2), (2, 1)]
    assert pairs(8, "throughput") == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert pairs(6, "throughput") == [(1, 6), (2, 3), (6, 1)]
    assert pairs(8, "latency") == [(1, 8), (1, 4), (1, 2), (1, 1)]
    assert pairs(1, "throughput") == pairs(1, "latency") == [(1, 1)]


def test_instances_that_do_not_fit_into_memory_are_not_measured() -> None:
    assert pairs(8, "throughput", most=3) == [(1, 8), (2, 4)]
    assert pairs(8, "throughput", most=0) == [(1, 8)]


def reached(monkeypatch: pytest.MonkeyPatch, figures: dict[Layout, tuple[float, float]], libraries: list[str]) -> None:
    """Each layout reaches (p50 in ms, rows a second)."""
    monkeypatch.setattr(tuning, "usable_cores", lambda: 2.0)
    monkeypatch.setattr(tuning, "installed_allocators", lambda: libraries)

    def measure(artifact: object, signature: object, point: object, layout: Layout) -> Measured:
        p50, rate = figures[layout]
        return Measured(layout=layout, p50_ms=p50, rows_per_second=rate, peak_bytes=1)

    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning, "_refusal", lambda artifact, signature, point, layout: "")


ONE, TWO = Layout(instances=1, threads=2), Layout(instances=2, threads=1)


def test_the_best_layout_is_applied_and_the_others_say_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    reached(monkeypatch, {ONE: (10, 100), TWO: (19, 130)}, [])
    found = tune(ARTIFACT, SIGNATURE, "throughput", Progress(), most_instances=2)
    assert settings_of(found) == ({"threads": 1}, {"instances": 2})
    applied, one, allocator, streams = found.decisions
    assert applied == Applied(what="2 instances of 1 thread", detail="measured for throughput: 130.0 rows/s")
    assert one == Skipped(what="1 instance of 2 threads", reason="100.0 rows/s, 0.77 x as good")
    assert isinstance(allocator, Skipped)
    assert "apt install" in allocator.reason
    assert streams.what == "streams"


def test_a_gain_within_the_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reached(monkeypatch, {ONE: (10, 100), TWO: (19, 102)}, [])
    found = tune(ARTIFACT, SIGNATURE, "throughput", Progress(), most_instances=2)
    assert found.chosen.layout == ONE


def test_an_allocator_is_taken_only_where_it_was_measured_to_help(monkeypatch: pytest.MonkeyPatch) -> None:
    library = "/usr/lib/x/libtcmalloc_minimal.so.4"
    quick = Layout(instances=1, threads=2, allocator=library)
    single = Layout(instances=1, threads=1)
    reached(monkeypatch, {ONE: (10, 1), single: (15, 1), quick: (8, 1)}, [library])
    found = tune(ARTIFACT, SIGNATURE, "latency", Progress(), most_instances=1)
    assert settings_of(found) == ({"threads": 2}, {"instances": 1, "allocator": "libtcmalloc_minimal.so.4"})
    reached(monkeypatch, {ONE: (10, 1), single: (15, 1), quick: (9.9, 1)}, [library])
    found = tune(ARTIFACT, SIGNATURE, "latency", Progress(), most_instances=1)
    assert "allocator" not in settings_of(found)[1]
    assert any("libtcmalloc_minimal.so.4" in d.what and isinstance(d, Skipped) for d in found.decisions)


def test_an_allocator_that_the_runtime_dies_of_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reached(monkeypatch, {ONE: (10, 1), Layout(instances=1, threads=1): (15, 1)}, ["/usr/lib/x/libjemalloc.so.2"])
    monkeypatch.setattr(tuning, "_refusal", lambda *_: "its process ended with code -6: free(): invalid pointer")
    found = tune(ARTIFACT, SIGNATURE, "latency", Progress(), most_instances=1)
    assert found.chosen.layout == ONE
    (refused,) = [decision for decision in found.decisions if "libjemalloc" in decision.what]
    assert isinstance(refused, Skipped)
    assert "invalid pointer" in refused.reason


def test_allocators_are_found_where_the_loader_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocators, "PLACES", ())
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path}")
    assert allocators.installed_allocators() == []
    for name in ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4", "libjemalloc.so.2"):
        (tmp_path / name).touch()
    found = [Path(path).name for path in allocators.installed_allocators()]
    assert found == ["libtcmalloc_minimal.so.4", "libjemalloc.so.2"]


@pytest.mark.parametrize(
    ("budget", "load", "target", "says"),
    [
        (None, "speed", "triton", "unknown load 'speed'"),
        ("4 apples", None, "triton", "no amount of memory"),
        (None, "latency", "torchserve", "not set for torchserve"),
    ],
)
def test_wrong_wishes_are_told_before_any_work(budget: str | None, load: str | None, target: str, says: str) -> None:
    with pytest.raises(UnknownName) as told:
        Wanted.parse(budget, load, target)
    assert says in told.value.what
