"""Export from end to end on small models: proven, packaged, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_models import CLASSIFIER_INPUTS, Classifier, MixesRows, OneRow

import kpdeploy
from kpdeploy.artifact import Artifact, Manifest
from kpdeploy.baseline import Baseline
from kpdeploy.compare import TOLERANCES, relative_error
from kpdeploy.decision import Skipped
from kpdeploy.errors import ModelRejectsInputs, ProofFailed, UnknownName
from kpdeploy.export import FORMATS, Format
from kpdeploy.inputs import sample
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.serving.repository import find_version, read_repository
from kpdeploy.serving.target import TARGETS

EVERYWHERE = [name for name in TARGETS["triton"].formats if not FORMATS[name].by_level]
"""Formats that need no accelerator."""


@pytest.mark.parametrize("format", EVERYWHERE)
def test_an_exported_version_holds_what_is_needed_to_serve_and_check_it(format: str, tmp_path: Path) -> None:
    report = kpdeploy.export(Classifier(), repo=tmp_path, format=format, input=CLASSIFIER_INPUTS, name="small")
    folder = tmp_path / "small" / "1"
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    assert report.chosen.verdict is not None
    assert report.chosen.verdict.max_batch_size == 6
    assert report.chosen.verdict.points >= 6
    assert [c.output for c in report.chosen.verdict.comparisons] == ["logits", "mean"]
    assert all(c.error <= 1e-5 for c in report.chosen.verdict.comparisons)
    assert manifest.max_batch_size == (0 if format == "pt2" else 6)
    assert {spec.name: spec.shape for spec in manifest.signature.outputs} == {
        "logits": ("batch", "seq", 3),
        "mean": ("batch", 32),
    }
    for exchange in Baseline.read(folder).exchanges:
        with torch.inference_mode():
            expected = Classifier()(*(torch.from_numpy(exchange.inputs[name]) for name in ("ids", "scale")))
        assert relative_error(exchange.outputs["logits"], expected["logits"].numpy()) == 0
        assert exchange.inputs["ids"].max() < 50


def test_a_version_waits_where_it_is_not_to_be_served_yet(tmp_path: Path) -> None:
    def again(**more: Any) -> Any:
        return kpdeploy.export(
            Classifier(),
            repo=tmp_path,
            format="torchscript",
            fuse="never",
            input=CLASSIFIER_INPUTS,
            name="small",
            **more,
        )

    with pytest.raises(UnknownName, match="cannot wait") as error:
        again(activate=False)
    assert "the first version" in error.value.why
    assert again().active
    waiting = again(activate=False)
    assert (waiting.active, waiting.deployment.version) == (False, 2)
    (served,) = read_repository(str(tmp_path))
    assert served.version == 1
    assert find_version(str(tmp_path), "small", 2).manifest.digest == waiting.deployment.manifest.digest
    with pytest.raises(UnknownName, match="cannot wait"):
        kpdeploy.export(Classifier(), repo=tmp_path, target="torchserve", input=CLASSIFIER_INPUTS, activate=False)


def test_auto_packages_the_fastest_that_passed_and_keeps_the_table_of_all(tmp_path: Path) -> None:
    report = kpdeploy.export(Classifier(), repo=tmp_path, input=CLASSIFIER_INPUTS, name="small")
    assert {c.format for c in report.candidates} >= set(EVERYWHERE)
    passed = [c for c in report.candidates if c.passed]
    assert report.chosen.score == min(c.score for c in passed)
    kept = json.loads((tmp_path / "small" / "1" / "manifest.json").read_text())
    assert [c["format"] for c in kept["formats"]] == [c.format for c in report.candidates]
    assert all(c["latencies"] for c in kept["formats"] if c["passed"])
    refused = {d.what for d in report.decisions if isinstance(d, Skipped)}
    assert len(refused) >= len(passed) - 1


def test_exporting_again_makes_the_next_version_and_keeps_the_first(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 2)
    for version in (1, 2):
        report = kpdeploy.export(module, torch.randn(2, 4), repo=tmp_path, format="onnx", name="linear")
        assert report.deployment.version == version
    assert [(d.model, d.version) for d in read_repository(str(tmp_path))] == [("linear", 2)]
    assert (tmp_path / "linear" / "1" / "model.onnx").is_file()


def _one_weight_changed(path: Path) -> None:
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[array.size // 2] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)


def test_one_wrong_weight_stops_the_export_and_nothing_is_packaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = FORMATS["onnx"]

    def export(capture: object, folder: Path) -> None:
        good.export(capture, folder)  # type: ignore[arg-type]
        _one_weight_changed(folder / "model.onnx")

    monkeypatch.setitem(FORMATS, "onnx", Format(name="onnx", filename="model.onnx", export=export))
    with pytest.raises(ProofFailed, match="relative error"):
        kpdeploy.export(Classifier(), repo=tmp_path / "models", format="onnx", input=CLASSIFIER_INPUTS)
    assert not (tmp_path / "models").exists() or not any((tmp_path / "models").iterdir())


def test_an_artifact_that_kills_its_process_fails_its_proof_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"no archive")
    artifact = Artifact(
        format="torchscript", folder=tmp_path, filename="model.pt", input_names=("x",), output_names=("y",)
    )
    with pytest.raises(ProofFailed, match="cannot be loaded"), RuntimeProcess(artifact):
        pass


def test_a_model_that_mixes_rows_is_packaged_without_batching_and_told_so(tmp_path: Path) -> None:
    report = kpdeploy.export(MixesRows(), torch.randn(2, 5), repo=tmp_path, format="onnx")
    assert report.deployment.manifest.max_batch_size == 0
    told = [d.reason for d in report.decisions if isinstance(d, Skipped) and d.what == "dynamic batching"]
    assert "differs from the row alone" in told[0]


def test_a_model_of_one_row_has_its_batch_axis_fixed_and_is_told_so(tmp_path: Path) -> None:
    report = kpdeploy.export(OneRow(), torch.randn(1, 3, 4), repo=tmp_path, format="onnx")
    assert report.deployment.manifest.max_batch_size == 0
    assert report.deployment.manifest.signature.axes == ()


def test_an_axis_that_the_user_states_and_the_model_refuses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelRejectsInputs, match="x:float32"):
        kpdeploy.export(OneRow(), repo=tmp_path, format="onnx", input=("x:float32[batch=1..4,3,4]",))


def test_bfloat16_weights_are_served_with_float32_at_the_boundary(tmp_path: Path) -> None:
    module = torch.nn.Linear(8, 4).bfloat16()
    report = kpdeploy.export(module, torch.randn(2, 8), repo=tmp_path, format="torchscript")
    specs = (*report.deployment.manifest.signature.inputs, *report.deployment.manifest.signature.outputs)
    assert {spec.dtype for spec in specs} == {"float32"}


@pytest.mark.parametrize("kind", ["model.onnx", "model.pt2", "model.pt"])
def test_a_file_is_exported_to_each_format_that_it_allows(kind: str, tmp_path: Path) -> None:
    module, batch = torch.nn.Linear(4, 2), torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(module, (torch.randn(2, 4),), dynamic_shapes=({0: batch},))
    path = tmp_path / kind
    if kind == "model.onnx":
        torch.onnx.export(program, f=str(path), dynamo=True)
    elif kind == "model.pt2":
        torch.export.save(program, path)
    else:
        torch.jit.script(module).save(str(path))
    stated = ("x:float32[batch=1..8,4]",) if kind == "model.pt" else ()
    formats = {"model.onnx": ["onnx", "openvino"], "model.pt2": ["onnx", "torchscript"], "model.pt": ["torchscript"]}
    for format in formats[kind]:
        report = kpdeploy.export(str(path), repo=tmp_path / "models", format=format, input=stated)
        assert report.deployment.manifest.max_batch_size == 8
        point = {axis.name: 5 for axis in report.deployment.manifest.signature.axes}
        arrays = sample(report.deployment.manifest.signature, point, np.random.default_rng(1))
        artifact = Artifact(
            format=format,
            folder=Path(report.deployment.folder),
            filename=report.deployment.manifest.filename,
            input_names=tuple(s.name for s in report.deployment.manifest.signature.inputs),
            output_names=tuple(s.name for s in report.deployment.manifest.signature.outputs),
        )
        with RuntimeProcess(artifact) as process, torch.inference_mode():
            (answer,) = process.run(list(arrays.values()))
            expected = module(*(torch.from_numpy(a) for a in arrays.values())).numpy()
        assert relative_error(answer, expected) <= TOLERANCES["float32"]
