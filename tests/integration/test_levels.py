"""Levels 2 and 3 on this machine: proven within the budget, told with their error, or left out with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from kpdeploy import auto_optimize, export
from kpdeploy.backends import lowerings
from kpdeploy.compare import Budget, least_cosine, relative_error
from kpdeploy.errors import BudgetUnmet, InputMismatch
from kpdeploy.export.int8 import quantize
from kpdeploy.hardware import detect
from kpdeploy.pipeline import Candidate, ExportReport

MISSING = [way for way in lowerings(detect()) if way.format and way.missing]
needs_levels = pytest.mark.skipif(
    bool(MISSING), reason=f"NOT RUN: {'; '.join(f'{way.what}: {way.missing}' for way in MISSING)}"
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


def exported(repo: Path, **options: object) -> ExportReport:
    return export(net(), torch.randn(4, 64), repo=repo, format="openvino", fuse="never", **options)


def of_level(report: ExportReport, level: int) -> Candidate:
    return next(candidate for candidate in report.candidates if candidate.level == level)


@pytest.fixture(scope="module")
def generous(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    folder = tmp_path_factory.mktemp("levels")
    samples = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    np.savez(folder / "samples.npz", input=samples)
    return exported(folder / "models", level="auto", accuracy_budget=0.2, calibrate=folder / "samples.npz")


@needs_levels
def test_auto_tries_each_level_and_each_is_less_exact_than_the_one_before(generous: ExportReport) -> None:
    errors = []
    for level in (1, 2, 3):
        candidate = of_level(generous, level)
        assert candidate.passed, candidate.reason
        assert candidate.verdict is not None
        errors.append(candidate.verdict.worst.error)
        assert candidate.latencies
    float32, bf16, int8 = errors
    assert float32 <= 1e-5 < bf16 < int8 <= 0.2
    worst = of_level(generous, 3).verdict.worst
    assert 0.9 < worst.cosine < 1


@needs_levels
def test_fused_ops_compute_in_bf16_too(tmp_path: Path) -> None:
    model, example = net(), torch.randn(4, 64)
    report = export(model, example, repo=tmp_path, format="torchscript", level="2", accuracy_budget=0.05)
    (candidate,) = (c for c in report.candidates if c.level == 2 and c.format == "torchscript")
    assert candidate.passed, candidate.reason
    assert candidate.fused
    assert candidate.settings["precision"] == "bfloat16"
    assert candidate.verdict is not None
    assert 1e-5 < candidate.verdict.worst.error < 0.05


@needs_levels
def test_the_int8_file_holds_int8_weights_and_is_within_its_budget_on_samples_it_never_saw(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    model = openvino.convert_model(net(), input=[[-1, 64]], example_input=torch.randn(1, 64))
    model.inputs[0].get_tensor().set_names({"x"})
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    samples = [{"x": rng.standard_normal((1, 64)).astype(np.float32)} for _ in range(48)]
    (tmp_path / "int8").mkdir()
    told = quantize(tmp_path / "model.xml", tmp_path / "int8", samples, budget=Budget(bound=0.2))
    assert "2 of 2 layers" in told.decision.detail
    assert "on 12 samples apart from the 36" in told.decision.detail
    assert [layer.precision for layer in told.layers] == ["int8", "int8"]
    assert all(1e-4 < layer.error < 2e-2 for layer in told.layers)
    made = openvino.Core().read_model(tmp_path / "int8" / "model.xml")
    assert {"i8", "u8"} & {op.get_output_element_type(0).get_type_name() for op in made.get_ops()}
    fresh = rng.standard_normal((16, 64)).astype(np.float32)
    out = openvino.Core().compile_model(made, "CPU")(fresh)[0]
    with torch.inference_mode():
        assert 1e-5 < relative_error(out, net()(torch.from_numpy(fresh)).numpy()) < 0.03


def outlying(tmp_path: Path) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """Three products as an IR, of which the middle one is handed a channel a thousand times as large as others."""
    torch.manual_seed(0)
    first, middle, last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    with torch.no_grad():
        first.weight[3] *= 1000
        middle.weight[:, 3] /= 1000
    model = openvino.convert_model(
        nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last).eval(),
        input=[[-1, 64]],
        example_input=torch.randn(1, 64),
    )
    model.inputs[0].get_tensor().set_names({"x"})
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    (tmp_path / "int8").mkdir()
    rng = np.random.default_rng(2)
    return tmp_path / "model.xml", [{"x": rng.standard_normal((1, 64)).astype(np.float32)} for _ in range(48)]


@needs_levels
def test_the_layer_with_outliers_is_the_one_left_in_float(tmp_path: Path) -> None:
    source, samples = outlying(tmp_path)
    told = quantize(source, tmp_path / "int8", samples, budget=Budget(metric="cosine", bound=1e-3))
    first, middle, last = told.layers
    assert middle.error > 10 * max(first.error, last.error)
    assert (first.precision, middle.precision, last.precision) == ("int8", "f32", "int8")
    assert told.distance <= 1e-3
    made = openvino.Core().compile_model(tmp_path / "int8" / "model.xml", "CPU")
    exact = openvino.Core().compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    fresh = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    assert least_cosine(made(fresh)[0], exact(fresh)[0]) > 0.997


@needs_levels
def test_scales_found_at_run_time_need_no_samples_of_activations(tmp_path: Path) -> None:
    source, samples = outlying(tmp_path)
    told = quantize(source, tmp_path / "int8", samples, budget=Budget(bound=0.5), scheme="dynamic", activation_group=32)
    made = openvino.Core().read_model(tmp_path / "int8" / "model.xml")
    assert not any(op.get_type_name() == "FakeQuantize" for op in made.get_ops())
    assert {"i8", "u8"} & {op.get_output_element_type(0).get_type_name() for op in made.get_ops()}
    assert len(told.layers) == 3


@needs_levels
def test_what_is_served_is_checked_by_the_budget_and_on_real_samples(generous: ExportReport, tmp_path: Path) -> None:
    manifest = generous.deployment.manifest
    assert generous.chosen.level > 1
    assert manifest.tolerances["float32"] == pytest.approx(1.5 * 0.2)
    given = np.load(Path(generous.deployment.repository).parent / "samples.npz")["input"]
    for exchange in generous.baseline.exchanges:
        assert any(np.array_equal(exchange.inputs["input"][0], row) for row in given)


@needs_levels
def test_top_1_is_judged_over_the_samples_and_random_inputs_are_told(tmp_path: Path) -> None:
    samples = np.random.default_rng(4).standard_normal((40, 64)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", input=samples)
    report = exported(tmp_path / "models", level="2", accuracy_budget="top1=0.9", calibrate=tmp_path / "samples.npz")
    bf16 = of_level(report, 2)
    assert bf16.verdict is not None
    assert (bf16.verdict.points, bf16.verdict.worst.metric) == (40, "top1")
    assert bf16.verdict.worst.top1 >= 0.9
    assert any("not judged, for the samples are" in getattr(decision, "detail", "") for decision in bf16.decisions)
    if report.chosen.level == 2:  # a served answer is held against its error: a share says nothing of one
        assert 1e-4 < report.deployment.manifest.tolerances["float32"] < 2e-2


@needs_levels
def test_a_budget_that_lower_precision_breaks_leaves_level_1_and_says_why(tmp_path: Path) -> None:
    report = exported(tmp_path / "models", level="auto", accuracy_budget=1e-5)
    assert report.chosen.level == 1
    assert "relative error" in of_level(report, 2).reason
    assert "no layer can be int8 within error 1e-05" in of_level(report, 3).reason


@needs_levels
def test_a_latency_that_nothing_reaches_ends_with_all_that_was_reached_and_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BudgetUnmet) as told:
        exported(tmp_path / "models", level="2", latency_budget_ms=1e-4)
    assert "openvino (precision f32)" in told.value.why
    assert "openvino (precision bf16)" in told.value.why
    assert not (tmp_path / "models").exists()


@needs_levels
def test_a_latency_that_level_1_holds_ends_the_climb_there(tmp_path: Path) -> None:
    report = exported(tmp_path / "models", level="auto", latency_budget_ms=1e4)
    assert {candidate.level for candidate in report.candidates} == {1}


@needs_levels
def test_auto_optimize_gives_the_model_back_as_what_was_packaged(tmp_path: Path) -> None:
    fast = auto_optimize(
        net(), torch.randn(4, 64), repo=tmp_path / "models", format="openvino", level="2", accuracy_budget=0.05
    )
    fresh = torch.randn(3, 64)
    with torch.inference_mode():
        expected = net()(fresh).numpy()
    (out,) = fast(fresh).values()
    assert relative_error(out, expected) <= 0.05
    (named,) = fast(**{fast.report.deployment.manifest.signature.inputs[0].name: fresh.numpy()}).values()
    assert np.array_equal(named, out)
    for wrong in ((), (fresh, fresh), (fresh.double(),), (fresh[0],)):
        with pytest.raises(InputMismatch):
            fast(*wrong)
