"""Archives of anybody: hostile ones are refused with nothing written and nothing run, others read as text."""

from __future__ import annotations

import json
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kpdeploy.decision import Applied
from kpdeploy.errors import FormatUnavailable, InputsUnknown, ModelBroken, ModelNotFound, ModelUnsafe
from kpdeploy.load.archive import exportable, inputs, read_archive, told

Entries = dict[str, bytes | str]
MODEL = {"modelName": "net", "serializedFile": "model.pt", "handler": "handler.py", "modelVersion": "1.0"}


def mar(path: Path, files: Entries | None = None, **model: Any) -> Path:
    """An archive as the stock archiver makes it, with these files and these changes in its manifest."""
    manifest = {"runtime": "python", "model": {**MODEL, **model}}
    content: Entries = {"model.pt": b"x", "handler.py": "", "MAR-INF/MANIFEST.json": json.dumps(manifest)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**content, **(files or {})}.items():
            archive.writestr(name, data)
    return path


def add(path: Path, name: str, *, mode: int = stat.S_IFREG | 0o644, data: bytes = b"x") -> Path:
    entry = zipfile.ZipInfo("placeholder")
    entry.filename, entry.external_attr = name, mode << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, data)
    return path


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../outside", stat.S_IFREG),
        ("a/../../outside", stat.S_IFREG),
        ("/tmp/outside", stat.S_IFREG),
        ("..\\outside", stat.S_IFREG),
        ("C:outside", stat.S_IFREG),
        ("link", stat.S_IFLNK),
        ("device", stat.S_IFBLK),
        ("pipe", stat.S_IFIFO),
    ],
)
def test_what_leads_out_is_refused_before_anything_is_written(name: str, mode: int, tmp_path: Path) -> None:
    path = add(mar(tmp_path / "net.mar"), name, mode=mode | 0o644, data=b"/etc/passwd")
    folder = tmp_path / "folder"
    folder.mkdir()
    before = everything(tmp_path)
    with pytest.raises(ModelUnsafe):
        read_archive(path, folder)
    assert everything(tmp_path) == before


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = mar(tmp_path / "net.mar", {"zeros": bytes(64 << 20)})
    assert path.stat().st_size < 1 << 20
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ModelUnsafe, match="torch-model-archiver") as caught:
        read_archive(path, folder)
    assert "zeros" in caught.value.why
    assert not list(folder.iterdir())


def test_a_bomb_of_many_files_is_refused(tmp_path: Path) -> None:
    path = mar(tmp_path / "net.mar", {f"f{index}": b"" for index in range(10_001)})
    with pytest.raises(ModelUnsafe):
        read_archive(path, tmp_path / "folder")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelBroken, match="no model archive"):
        read_archive(add(mar(tmp_path / "net.mar"), "MODEL.PT"), tmp_path / "folder")


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        '{"model": {}}',
        '{"model": {"modelName": "../net", "handler": "h", "serializedFile": "model.pt"}}',
        '{"model": {"modelName": "net", "handler": "h", "serializedFile": "../model.pt"}}',
        '{"model": {"modelName": "net", "handler": "h", "serializedFile": "/etc/passwd"}}',
        '{"model": {"modelName": "net", "handler": "h", "serializedFile": "missing.pt"}}',
        '{"model": {"modelName": "net", "handler": "h", "modelFile": "../model.py"}}',
        '{"model": {"modelName": "net", "handler": ["h"], "serializedFile": "model.pt"}}',
        '{"model": {"modelName": "net", "handler": "h"}}',
        "[" * 100_000,
    ],
)
def test_a_wrong_manifest_is_one_clear_error(manifest: str, tmp_path: Path) -> None:
    path = mar(tmp_path / "net.mar", {"MAR-INF/MANIFEST.json": manifest})
    with pytest.raises(ModelBroken):
        read_archive(path, tmp_path / "folder")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut", b"\x1f\x8b tar.gz"])
def test_what_is_no_archive_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.mar"
    path.write_bytes(content)
    with pytest.raises(ModelBroken):
        read_archive(path, tmp_path / "folder")
    with pytest.raises(ModelNotFound):
        read_archive(tmp_path / "missing.mar", tmp_path / "folder")


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_code_in_pickles_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    evil, handler = pickle.dumps(Evil(mark)), f"open({str(mark)!r}, 'w')"
    path = mar(tmp_path / "net.mar", {"model.pt": evil, "index_to_name.json": "{}", "handler.py": handler})
    with pytest.raises(ModelBroken):
        read_archive(path, tmp_path / "a")
    path = mar(tmp_path / "net.mar", {"model.pt": evil, "handler.py": handler})
    archive = read_archive(path, tmp_path / "b")
    told(archive)
    with pytest.raises(ModelUnsafe, match="pickle"):
        exportable(archive, trust=False)
    assert not mark.exists()


def test_a_model_file_runs_only_when_it_is_trusted_and_its_weights_never_do(tmp_path: Path) -> None:
    mark, weights_mark = tmp_path / "ran", tmp_path / "weights_ran"
    code = (
        f"open({str(mark)!r}, 'w')\n"
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        " def __init__(self): super().__init__(2, 2)\n"
    )
    files: Entries = {"model.py": code, "model.pt": pickle.dumps(Evil(weights_mark))}
    archive = read_archive(mar(tmp_path / "net.mar", files, modelFile="model.py"), tmp_path / "folder")
    with pytest.raises(ModelUnsafe, match=r"model\.py") as caught:
        exportable(archive, trust=False)
    assert "--trust" in caught.value.next_step
    assert not mark.exists()
    with pytest.raises(ModelUnsafe, match="more than tensors"):
        exportable(archive, trust=True)
    assert mark.exists()
    assert not weights_mark.exists()


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"batchSize: !!python/object/apply:pathlib.Path.touch [{mark}]"
    path = mar(tmp_path / "net.mar", {"model-config.yaml": text}, configFile="model-config.yaml")
    with pytest.raises(ModelBroken, match="no model archive"):
        read_archive(path, tmp_path / "folder")
    assert not mark.exists()


HANDLER = """
from ts.torch_handler.base_handler import BaseHandler

class Mine(BaseHandler):
    def preprocess(self, data): ...
    def postprocess(self, data): ...
"""


def test_settings_and_labels_are_carried_and_the_rest_is_listed(tmp_path: Path) -> None:
    config = "batchSize: 16\nmaxBatchDelay: 5\nminWorkers: 2\nmaxWorkers: 3\nresponseTimeout: 9\n"
    labels = json.dumps({"0": "cat", "2": ["n01", "dog"]})
    files: Entries = {
        "model-config.yaml": config, "index_to_name.json": labels, "handler.py": HANDLER, "vocab.txt": "a",
    }  # fmt: skip
    archive = read_archive(mar(tmp_path / "net.mar", files, configFile="model-config.yaml"), tmp_path / "folder")
    assert archive.serving == {"queue_delay_us": 5000, "instances": 3, "labels": ["cat", "", "dog"]}
    assert archive.batch == 16
    found = told(archive)
    left = [decision.what for decision in found if not isinstance(decision, Applied)]
    assert left == [
        "preprocess() of handler.py", "postprocess() of handler.py", "responseTimeout of its configuration",
        "the extra file vocab.txt",
    ]  # fmt: skip


def test_what_cannot_be_migrated_is_refused_with_the_reason(tmp_path: Path) -> None:
    for number, (model, reason) in enumerate(
        (
            ({"handler": "object_detector"}, "boxes"),
            ({"serializedFile": "model.so"}, "machine code"),
            ({"serializedFile": "weights.bin"}, "neither TorchScript"),
        )
    ):
        files: Entries = {"model.so": b"", "weights.bin": b""}
        archive = read_archive(mar(tmp_path / "net.mar", files, **model), tmp_path / str(number))
        with pytest.raises(FormatUnavailable) as caught:
            exportable(archive, trust=True)
        assert reason in caught.value.why


def test_inputs_are_known_of_stock_handlers_only(tmp_path: Path) -> None:
    archive = read_archive(mar(tmp_path / "a.mar", handler="image_classifier"), tmp_path / "a")
    assert inputs(archive, ()) == ("data:float32[batch=1..8,3,224,224]",)
    archive = read_archive(mar(tmp_path / "b.mar"), tmp_path / "b")
    with pytest.raises(InputsUnknown):
        inputs(archive, ())
    assert inputs(archive, ("x:float32[2]",)) == ("x:float32[2]",)
