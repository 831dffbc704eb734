"""How many CUDA graphs fit into a budget: plans from made-up costs, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kpdeploy.artifact import Artifact, Comparison, Latency, Verdict
from kpdeploy.decision import Applied, Skipped
from kpdeploy.errors import MemoryExceeded
from kpdeploy.export.cuda import Form, described
from kpdeploy.memory import MemoryPlan
from kpdeploy.pipeline import graph_memory
from kpdeploy.pipeline.candidates import Candidate
from kpdeploy.pipeline.graph_memory import GraphCosts, choices
from kpdeploy.pipeline.ladders import ladders, places_of, some_of
from kpdeploy.pipeline.memory import check_fits, plan_memory
from kpdeploy.runtimes.buckets import holding
from kpdeploy.signature import parse_inputs

MB = 10**6
GPU = "NVIDIA H100"
TEXT = parse_inputs(("ids:int64[batch=1..8,seq=1..128]", "mask:int64[batch,seq]{mask}"))
DROPPED = described(TEXT, Form(dropped=True, padded=("batch", "seq")), "cuda")
FILLED = described(TEXT, Form(padded=("batch", "seq")), "cuda")


@pytest.mark.parametrize("graphs", [DROPPED, FILLED], ids=["dropped", "filled"])
def test_each_ladder_is_shorter_and_holds_what_the_first_held(graphs: dict[str, Any]) -> None:
    found = list(ladders(graphs["buckets"], graphs["padded"]))
    assert [len(ladder) for ladder in found] == sorted({len(ladder) for ladder in found}, reverse=True)
    assert len(found[-1]) == 1
    for ladder in found:
        for bucket in graphs["buckets"]:
            sizes = {axis: size for axis, size in bucket.items() if axis != "tokens"}
            held = [ladder[i] for i in holding(ladder, sizes, graphs["padded"])]
            assert any(b.get("tokens", 0) >= bucket.get("tokens", 0) for b in held), bucket


def test_what_zeros_must_not_fill_up_keeps_all_its_sizes() -> None:
    assert len(list(ladders(FILLED["buckets"], ()))) == 1
    fewest = list(ladders(FILLED["buckets"], ("batch",)))[-1]
    assert sorted(b["seq"] for b in fewest) == [1, 16, 32, 64, 128]
    assert {b["batch"] for b in fewest} == {8}


def test_a_few_graphs_of_half_the_size_stand_for_all() -> None:
    few = some_of(DROPPED["buckets"])
    assert 2 <= len(few) <= 8
    assert max(map(places_of, few)) == 512
    assert some_of([{}]) == [{}]


def told(buckets: int, places: int) -> list[dict[str, Any]]:
    """What a runtime says that takes 500 MB, 2 MB a graph, and 100 kB a place."""
    parts = {
        "weights": 200 * MB,
        "inputs": 0,
        "workspaces": 50 * MB,
        "activations and outputs": places * 100_000,
        "CUDA graphs": buckets * 2 * MB,
        "CUDA and kernels": 250 * MB,
    }
    return [{"what": what, "bytes": count, "device": GPU} for what, count in parts.items()]


def costs_of(graphs: dict[str, Any]) -> GraphCosts:
    nothing = {**graphs, "outputs": [], "output_dtypes": []}
    few = {**nothing, "buckets": some_of(graphs["buckets"])}
    found = GraphCosts.of(few, told(len(few["buckets"]), 512), 3000 * MB)
    return GraphCosts(**{**vars(found), "graphs": nothing})


def test_a_plan_grows_with_the_largest_bucket_and_the_number_of_graphs() -> None:
    whole = next(choices(costs_of(DROPPED), TEXT, batches=[1, 8], instances=1)).plan
    count = len(DROPPED["buckets"])
    assert whole.total_bytes(GPU) == pytest.approx((500 + 102.4 + 2 * count) * MB, rel=1e-6)
    assert whole.largest_bytes == whole.total_bytes(GPU)
    assert (f"{count} CUDA graphs", GPU, f"{2 * count} MB") in whole.rows_of_table()
    assert whole.point == {"batch": 8, "seq": 128}


def test_outputs_are_kept_by_each_graph() -> None:
    costs = costs_of(DROPPED)
    graphs = {**costs.graphs, "outputs": [("batch", 1000)], "output_dtypes": ["float32"]}
    few = {**graphs, "buckets": some_of(DROPPED["buckets"])}
    found = GraphCosts.of(few, told(len(few["buckets"]), 512), 0)
    parts = {part.what: part for part in found.plan(DROPPED["buckets"], {}, rows=8).parts}
    assert parts["outputs"].bytes == sum(b["batch"] for b in DROPPED["buckets"]) * 4000


@pytest.fixture
def candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """One in CUDA graphs, whose process takes what `told` says of the buckets in its folder."""
    (tmp_path / "graphs.json").write_text(json.dumps(DROPPED))
    (tmp_path / "model.pt2").write_bytes(b"a program")

    def loaded(artifact: Artifact, inputs: Any = None) -> tuple[list[dict[str, Any]], int]:
        assert artifact.path.read_bytes() == b"a program"
        buckets = left(artifact.folder)
        return told(len(buckets), max(map(places_of, buckets))), 3000 * MB

    monkeypatch.setattr(graph_memory, "_loaded", loaded)
    artifact = Artifact(
        format="cuda", folder=tmp_path, filename="model.pt2", input_names=("ids", "mask"), output_names=("y",)
    )
    right = Comparison(output="y", error=0.0, tolerance=1.0, cosine=1.0, top1=1.0)
    return Candidate(
        format="cuda",
        settings={"precision": "float16"},
        artifact=artifact,
        verdict=Verdict(comparisons=(right,), points=1, max_batch_size=8),
        latencies=(Latency(point={}, p50_ms=1.0, p99_ms=1.0, calls=1),),
    )


def left(folder: Path) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads((folder / "graphs.json").read_text())["buckets"]
    return found


ALL = len(DROPPED["buckets"])


def test_without_a_budget_all_graphs_are_planned_and_measured(candidate: Candidate) -> None:
    assert candidate.artifact is not None
    plan = plan_memory(candidate.artifact, TEXT, rows=8)
    assert plan.measured_on == {GPU: (500 + 2 * ALL) * MB + 102_400_000}
    assert plan.total_bytes(GPU) == pytest.approx(plan.measured_on[GPU], rel=0.01)
    assert MemoryPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert len(left(candidate.artifact.folder)) == ALL


def test_instances_go_before_graphs_and_graphs_before_batches(candidate: Candidate) -> None:
    assert candidate.artifact is not None
    each = 602.4 + 2 * ALL
    two = check_fits([candidate], TEXT, round(2 * each + 9) * MB, 1, 2)
    assert (two.plan.instances, two.thinned) == (2, False)
    one = check_fits([candidate], TEXT, round(2 * each - 9) * MB, 1, 2)
    assert (one.plan.instances, one.thinned) == (1, False)
    assert [type(decision) for decision in one.decisions] == [Applied]
    fewer = check_fits([candidate], TEXT, round(each - 9) * MB, 1, 2)
    assert (fewer.plan.instances, fewer.plan.rows, fewer.thinned) == (1, 8, True)
    assert 0 < len(left(candidate.artifact.folder)) < ALL
    (skipped,) = [decision for decision in fewer.decisions if isinstance(decision, Skipped)]
    assert skipped.what == f"{ALL} CUDA graphs"
    assert f"{len(left(candidate.artifact.folder))} fit" in skipped.reason


def test_the_largest_batch_goes_last(candidate: Candidate) -> None:
    assert candidate.artifact is not None
    found = check_fits([candidate], TEXT, 560 * MB, 1)
    assert found.plan.rows == 4
    assert max(bucket["batch"] for bucket in left(candidate.artifact.folder)) == 4
    assert "batches of more than 4 rows" in [decision.what for decision in found.decisions]
    assert found.plan.largest_bytes <= 560 * MB


def test_what_does_not_fit_at_all_is_told_with_what_each_layout_takes(candidate: Candidate) -> None:
    assert candidate.artifact is not None
    with pytest.raises(MemoryExceeded) as found:
        check_fits([candidate], TEXT, 400 * MB, 1)
    assert f"{ALL} CUDA graphs" in found.value.why
    assert "1 CUDA graph " in found.value.why
    assert "at 1 row:" in found.value.why
    assert "allow 515 MB or more with --memory-budget" in found.value.next_step
    assert len(left(candidate.artifact.folder)) == ALL


@pytest.mark.parametrize(("before", "after", "last"), [(5000, 5800, 250), (None, 5800, 400), (5000, 5300, 0)])
def test_what_others_hold_of_the_gpu_is_not_the_process_own(
    monkeypatch: pytest.MonkeyPatch, before: int | None, after: int, last: int
) -> None:
    parts = [{"what": "weights", "bytes": 550}, {"what": "CUDA and kernels", "bytes": 400}]
    monkeypatch.setattr(graph_memory, "taken_bytes", lambda: after)
    found = graph_memory.own(parts, before)
    assert [part["bytes"] for part in found] == [550, last]
    assert graph_memory.own([], before) == []
