"""The memory plan: sums, what fits into a budget, and amounts as users write them."""

from __future__ import annotations

import json

import pytest

from kpdeploy.errors import UnknownName
from kpdeploy.memory import MemoryPlan, Part, fitting, parse_bytes, point_told

MB = 10**6
PLAN = MemoryPlan(
    point={"batch": 32, "seq": 256},
    rows=32,
    parts=(Part(what="weights", bytes=100 * MB), Part(what="activations", bytes_per_row=10 * MB)),
    measured_bytes=430 * MB,
)


def test_a_plan_sums_its_parts_and_counts_instances() -> None:
    assert PLAN.instance_bytes() == 420 * MB
    assert PLAN.of(rows=4, instances=3).total_bytes() == 3 * 140 * MB
    assert PLAN.of(rows=4, instances=3).measured_bytes == 0
    assert PLAN.of(rows=32, instances=2).measured_bytes == 430 * MB


def test_loading_counts_where_it_takes_more_than_any_call() -> None:
    loading = MemoryPlan(point={}, rows=1, parts=PLAN.parts, loading_bytes=300 * MB)
    assert loading.instance_bytes() == 300 * MB


def test_a_gpu_has_sums_of_its_own_and_the_fullest_device_is_held_against_the_budget() -> None:
    graphs = Part(what="pool of CUDA graphs", bytes=900 * MB, device="NVIDIA H100")
    plan = MemoryPlan(point=PLAN.point, rows=32, parts=(*PLAN.parts, graphs))
    assert plan.devices == ("host", "NVIDIA H100")
    assert (plan.total_bytes(), plan.total_bytes("NVIDIA H100")) == (420 * MB, 900 * MB)
    assert plan.largest_bytes == 900 * MB
    assert ("pool of CUDA graphs", "NVIDIA H100", "900 MB") in plan.rows_of_table()


@pytest.mark.parametrize(
    ("budget", "wanted", "rows", "instances"),
    [(2000, 4, 32, 4), (900, 2, 32, 2), (900, 4, 8, 4), (420, 4, 4, 3), (345, 4, 1, 3), (150, 2, 4, 1), (110, 8, 1, 1)],
)
def test_instances_are_kept_before_the_batch(budget: int, wanted: int, rows: int, instances: int) -> None:
    found = fitting(PLAN, budget * MB, batches=(1, 2, 4, 8, 16, 32), instances=wanted)
    assert found is not None
    assert (found.rows, found.instances) == (rows, instances)
    assert found.largest_bytes <= budget * MB


def test_what_does_not_fit_at_all_is_none() -> None:
    assert fitting(PLAN, 109 * MB, batches=(1, 32), instances=1) is None


def test_a_plan_survives_json_and_says_what_it_sums_to() -> None:
    data = json.loads(json.dumps(PLAN.to_json()))
    assert data["planned_bytes"] == {"host": 420 * MB}
    assert MemoryPlan.from_json(data) == PLAN
    assert point_told(PLAN) == "at 32 rows, seq 256"


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("500MB", 500 * MB), ("2G", 2 * 10**9), (" 1.5 kib ", 1536), ("2000", 2000), ("1e9", 10**9)],
)
def test_amounts_are_read_as_users_write_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0", "-4GB", "4 apples", "GiB", "1.2.3G", "inf"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(UnknownName) as told:
        parse_bytes(text)
    assert "4GiB" in told.value.next_step
