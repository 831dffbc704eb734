"""Memory planned and measured, and instances and threads chosen by measurement, in what is published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kpdeploy import export, serve, verify
from kpdeploy.artifact import Manifest
from kpdeploy.decision import Applied, Skipped
from kpdeploy.deployment import Deployment
from kpdeploy.errors import MemoryExceeded
from kpdeploy.memory import MemoryPlan
from kpdeploy.pipeline import ExportReport
from kpdeploy.serving.triton.compatibility import HERE, check, here
from kpdeploy.serving.triton.repository import read_model_config


class Wide(nn.Module):
    """8 MB of activations a row at the largest length."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 4096), nn.Linear(4096, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide: torch.Tensor = self.up(x).sin()
        out: torch.Tensor = self.down(wide)
        return out


INPUT = ("x:float32[batch=1..32,seq=1..512,16]",)


def exported(repo: Path, **options: object) -> ExportReport:
    torch.manual_seed(0)
    return export(Wide().eval(), torch.randn(2, 8, 16), repo=repo, input=INPUT, fuse="never", name="wide", **options)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    repo = tmp_path_factory.mktemp("layout") / "models"
    return exported(repo, format="onnx", tune="throughput", memory_budget="4GiB")


def test_what_was_planned_from_small_batches_is_what_the_largest_takes(tuned: ExportReport) -> None:
    plan = MemoryPlan.from_json(tuned.deployment.manifest.memory)
    assert plan.point == {"batch": 32, "seq": 512}
    assert plan.measured_bytes > 300e6
    activations = next(part for part in plan.parts if part.what == "activations")
    assert 6e6 < activations.bytes_per_row < 30e6
    assert plan.instance_bytes() == pytest.approx(plan.measured_bytes, rel=0.15)


def test_instances_and_threads_are_those_that_were_measured_best(tuned: ExportReport) -> None:
    manifest = tuned.deployment.manifest
    layout = manifest.tuning["chosen"]["layout"]
    assert manifest.serving["instances"] == layout["instances"]
    assert manifest.settings["threads"] == layout["threads"]
    assert manifest.tuning["load"] == "throughput"
    assert MemoryPlan.from_json(manifest.memory).instances == layout["instances"]
    config = read_model_config(tuned.deployment)
    assert config.instance_group[0].count == layout["instances"]
    assert config.parameters["intra_op_thread_count"].string_value == str(layout["threads"])
    assert any(isinstance(d, Applied) and "measured for throughput" in d.detail for d in manifest.decisions)
    assert Manifest.read(Path(tuned.deployment.folder)).tuning["measured"]


def test_it_is_served_so_and_answers_right(tuned: ExportReport) -> None:
    with serve(tuned.deployment.repository) as server:
        (served,) = server.served.values()
        assert served.instances == tuned.deployment.manifest.serving["instances"]
        assert verify(tuned.deployment.repository, url=server.grpc)


def test_the_doctor_tells_the_memory(tuned: ExportReport) -> None:
    deployment: Deployment = tuned.deployment
    found = check(deployment.manifest, Path(deployment.folder), here())
    assert here().tag == HERE
    (memory,) = [decision for decision in found.decisions if decision.what == "memory"]
    assert isinstance(memory, Applied)
    assert "planned at 32 rows, seq 512" in memory.detail


def test_a_small_budget_lowers_the_batch_and_says_so(tmp_path: Path) -> None:
    report = exported(tmp_path / "models", format="onnx", memory_budget="300MB")
    manifest = report.deployment.manifest
    plan = MemoryPlan.from_json(manifest.memory)
    assert plan.total_bytes() <= 300e6
    assert 0 < manifest.max_batch_size == plan.rows < 32
    assert any(
        isinstance(d, Skipped) and d.what == f"batches of more than {plan.rows} rows" for d in manifest.decisions
    )


def test_a_budget_that_nothing_fits_ends_with_what_each_takes_and_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(MemoryExceeded) as told:
        exported(tmp_path / "models", format="onnx", memory_budget="1MB")
    assert "not even one row" in told.value.what
    assert "activations" in told.value.why
    assert "onnx (graph_level all)" in told.value.why
    assert not (tmp_path / "models").exists()
