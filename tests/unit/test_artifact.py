"""manifest.json: what is written is read again, and a changed file is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kpdeploy.artifact import MANIFEST, Artifact, Manifest, sha256
from kpdeploy.decision import Applied, Skipped
from kpdeploy.errors import DigestMismatch, RepositoryBroken
from kpdeploy.signature import TensorSpec, parse_inputs


@pytest.fixture
def version(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"weights")
    return tmp_path


def manifest(folder: Path) -> Manifest:
    signature = parse_inputs(["ids:int64[batch=1..8,seq=1..64]{0..99}"])
    return Manifest(
        model="tiny",
        version=3,
        target="triton",
        format="onnx",
        filename="model.onnx",
        signature=signature.with_outputs([TensorSpec(name="out", dtype="float32", shape=("batch", 4))]),
        max_batch_size=8,
        input_names=("ids",),
        output_names=("out",),
        settings={"threads": 2},
        files={"model.onnx": sha256(folder / "model.onnx")},
        tolerances={"float32": 1e-5},
        decisions=(Applied(what="batching", detail="up to 8"), Skipped(what="pt2", reason="no compiler")),
        formats=({"format": "onnx", "passed": True},),
        source={"kind": "test"},
        environment={"packages": {"torch": "2.13.0"}},
        created="2026-01-01T00:00:00Z",
        padded_axes=("seq",),
    )


def test_a_manifest_survives_its_file(version: Path) -> None:
    written = manifest(version)
    written.write(version)
    assert Manifest.read(version) == written


def test_a_manifest_of_before_padding_was_proven_is_read_without_it(version: Path) -> None:
    data = manifest(version).to_json()
    del data["padded_axes"]
    (version / MANIFEST).write_text(json.dumps(data))
    assert Manifest.read(version) == replace(manifest(version), padded_axes=())


def test_files_as_proven_pass(version: Path) -> None:
    manifest(version).check_files(version)


def test_one_changed_byte_is_noticed(version: Path) -> None:
    proven = manifest(version)
    (version / "model.onnx").write_bytes(b"Weights")
    with pytest.raises(DigestMismatch, match=r"model\.onnx is not the file that was proven") as found:
        proven.check_files(version)
    assert proven.files["model.onnx"] in found.value.why


def test_a_missing_file_is_noticed(version: Path) -> None:
    proven = manifest(version)
    (version / "model.onnx").unlink()
    with pytest.raises(DigestMismatch) as found:
        proven.check_files(version)
    assert "no such file" in found.value.why


def without(key: str) -> Any:
    return lambda data: {k: v for k, v in data.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [
        without("schema"),
        without("signature"),
        without("files"),
        lambda data: data | {"unknown": 1},
        lambda data: data | {"schema": 2},
        lambda data: data | {"decisions": [{"kind": "guessed"}]},
        lambda data: data | {"decisions": [{"kind": "applied", "reason": "not its field"}]},
        lambda data: data | {"signature": {"inputs": [{}], "outputs": [], "axes": []}},
        lambda data: [data],
        lambda data: None,
    ],
)
def test_a_manifest_of_another_shape_is_refused(version: Path, change: Any) -> None:
    (version / MANIFEST).write_text(json.dumps(change(manifest(version).to_json())))
    with pytest.raises(RepositoryBroken) as refused:
        Manifest.read(version)
    assert str(version) in refused.value.what
    assert refused.value.next_step


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_a_manifest_that_is_no_json_is_refused(version: Path, content: bytes) -> None:
    (version / MANIFEST).write_bytes(content)
    with pytest.raises(RepositoryBroken):
        Manifest.read(version)


def test_a_folder_without_a_manifest_is_refused(version: Path) -> None:
    with pytest.raises(RepositoryBroken, match="is not a version made by kpdeploy"):
        Manifest.read(version)


def test_an_artifact_counts_the_bytes_of_all_its_files(version: Path) -> None:
    artifact = Artifact(format="onnx", folder=version, filename="model.onnx", input_names=(), output_names=())
    (version / "model.onnx.data").write_bytes(b"123")
    assert artifact.path == version / "model.onnx"
    assert artifact.bytes == len(b"weights") + 3


def test_values_cannot_be_changed(version: Path) -> None:
    value = manifest(version)
    with pytest.raises(AttributeError):
        value.version = 4  # type: ignore[misc]
    assert replace(value, version=4).version == 4
