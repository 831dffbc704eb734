"""The repositories in triton_models/, as an earlier run of the tool wrote them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import kpdeploy
from kpdeploy.artifact import Artifact
from kpdeploy.baseline import Baseline
from kpdeploy.compare import relative_error
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.triton.compatibility import newest
from kpdeploy.serving.triton.config import model_config, write_config
from kpdeploy.serving.triton.launch import LAUNCH, launch_script

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "triton_models"
DEPLOYMENTS = {d.model: d for d in read_repository(str(GOLDEN))}


def test_each_portable_format_has_a_golden_repository() -> None:
    assert {d.manifest.format for d in DEPLOYMENTS.values()} == {"onnx", "openvino", "torchscript"}


@pytest.mark.parametrize("model", DEPLOYMENTS)
def test_todays_configuration_of_a_golden_version_is_the_same_to_the_letter(model: str) -> None:
    folder = Path(DEPLOYMENTS[model].folder)
    config = model_config(DEPLOYMENTS[model].manifest, Baseline.read(folder))
    assert write_config(config) == (folder.parent / "config.pbtxt").read_text()


@pytest.mark.parametrize("model", DEPLOYMENTS)
def test_a_golden_version_has_todays_launch_sh_but_for_the_newest_container(model: str) -> None:
    folder = Path(DEPLOYMENTS[model].folder)
    image = newest(DEPLOYMENTS[model].manifest, folder).image
    written = (folder / LAUNCH).read_text()
    assert re.sub(r"tritonserver:[\d.]+-py3", image.partition("/nvidia/")[2], written) == launch_script(
        DEPLOYMENTS[model].manifest, image
    )


@pytest.mark.parametrize("model", DEPLOYMENTS)
def test_a_golden_version_still_loads_and_gives_its_golden_answers(model: str) -> None:
    manifest, folder = DEPLOYMENTS[model].manifest, Path(DEPLOYMENTS[model].folder)
    manifest.check_files(folder)
    artifact = Artifact(
        format=manifest.format,
        folder=folder,
        filename=manifest.filename,
        input_names=tuple(spec.name for spec in manifest.signature.inputs),
        output_names=tuple(spec.name for spec in manifest.signature.outputs),
        settings=manifest.settings,
    )
    with RuntimeProcess(artifact) as process:
        for exchange in Baseline.read(folder).exchanges:
            (answer,) = process.run([exchange.inputs[spec.name] for spec in manifest.signature.inputs])
            assert relative_error(answer, exchange.outputs["probabilities"]) <= manifest.tolerances["float32"]


def test_todays_export_says_the_same_of_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    stated = ("ids:int64[batch=1..8,seq=1..32]", "mask:int64[batch,seq]{mask}")
    kpdeploy.export("tiny:classifier", repo=tmp_path, format="onnx", name="tiny_onnx", input=stated, fuse="never")
    today = json.loads((tmp_path / "tiny_onnx/1/manifest.json").read_text())
    golden = json.loads((GOLDEN / "tiny_onnx/1/manifest.json").read_text())
    assert today.keys() == golden.keys()
    for key in ("schema", "signature", "format", "filename", "max_batch_size", "input_names", "output_names"):
        assert today[key] == golden[key], key
    assert today["source"].keys() == golden["source"].keys()
    assert today["files"].keys() == golden["files"].keys()
