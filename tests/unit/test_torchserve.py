"""Archives for TorchServe, their handler without a server, and publishing them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from kpdeploy.artifact import Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.cli import cli
from kpdeploy.compare import TOLERANCES
from kpdeploy.errors import DigestMismatch, RepositoryBroken, UnknownName
from kpdeploy.runtimes import PACKAGES
from kpdeploy.serving.repository import artifact_files, read_repository
from kpdeploy.serving.torchserve import archive
from kpdeploy.serving.torchserve.archive import handler_source, write_archive
from kpdeploy.serving.torchserve.client import answer, request
from kpdeploy.serving.torchserve.repository import UNCOMMITTED, check_publishable, publish, rollback
from kpdeploy.signature import Axis, Signature, TensorSpec, Values

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", "n"), values=Values(kind="range", low=0, high=9)),
        TensorSpec(name="k", dtype="float32", shape=("batch",)),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=("batch", "n")),
        TensorSpec(name="sum", dtype="float32", shape=("batch",)),
    ),
    axes=(Axis(name="batch", min=1, max=4), Axis(name="n", min=1, max=6)),
)
RUNTIME = '''"""A runtime of NumPy alone: y = ids * k, and its sum over n; k below 0 fails."""
from __future__ import annotations

import numpy as np

BATCHES = []


def load(path, *, inputs, outputs, settings):
    def run(arrays):
        ids, k = arrays
        BATCHES.append(len(ids))
        if (k < 0).any():
            raise ValueError("k is negative")
        y = (ids * k[:, None]).astype(np.float32)
        return [y, y.sum(1)]

    return run
'''


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "model": "tiny", "version": 1, "target": "torchserve", "format": "numpy", "filename": "model.bin",
        "signature": SIGNATURE, "max_batch_size": 4, "input_names": ("ids", "k"), "output_names": ("y", "sum"),
        "settings": {}, "files": {}, "tolerances": TOLERANCES, "decisions": (), "formats": (), "source": {},
        "environment": {"packages": {"numpy": "2.1.0"}}, "created": "2026-01-01T00:00:00Z", "padded_axes": ("n",),
    }  # fmt: skip
    return Manifest(**{**values, **changes})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a version is made of; its runtime is the one above."""
    monkeypatch.setitem(PACKAGES, "numpy", ())
    runtime = tmp_path / "numpy_runtime.py"
    runtime.write_text(RUNTIME)
    known = archive.source
    monkeypatch.setattr(archive, "source", lambda name: runtime if name == "numpy" else known(name))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"weights")
    exchange = Exchange(
        inputs={"ids": np.ones((1, 2), np.int64), "k": np.ones(1, np.float32)},
        outputs={"y": np.ones((1, 2), np.float32), "sum": np.full(1, 2, np.float32)},
    )
    Baseline(exchanges=(exchange,), latencies=(), environment={}).write(folder)
    return folder


class Context:
    """What a handler is given by TorchServe, and what it says of its answers."""

    def __init__(self, folder: Path) -> None:
        self.system_properties = {"model_dir": str(folder)}
        self.model_name, self.model_yaml_config, self.metrics = "tiny", {"maxWorkers": 1}, None
        self.requests: list[dict[str, str]] = []
        self.status: dict[int, int] = {}
        self.headers: dict[int, dict[str, str]] = {}

    def get_all_request_header(self, index: int) -> dict[str, str]:
        return self.requests[index]

    def set_response_status(self, *, code: int, phrase: str, idx: int) -> None:
        self.status[idx] = code

    def set_response_content_type(self, index: int, value: str) -> None:
        self.set_response_header(index, "content-type", value)

    def set_response_header(self, index: int, key: str, value: str) -> None:
        self.headers.setdefault(index, {})[key] = value


def unpacked(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as mar:
        mar.extractall(folder)
    return folder


def load_handler(folder: Path) -> Any:
    """The module of an unpacked archive, loaded as TorchServe does."""
    spec = importlib.util.spec_from_file_location("handler_under_test", folder / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Running:
    """A loaded handler: `ask(bodies)` gives status and answer of each."""

    def __init__(self, folder: Path) -> None:
        self.module = load_handler(folder)
        own = self.module.__name__
        (kind,) = [v for v in vars(self.module).values() if isinstance(v, type) and v.__module__ == own]
        self.folder, self.handler = folder, kind()
        self.handler.initialize(Context(folder))
        self.module.BATCHES.clear()

    def ask(self, *bodies: Any, headers: list[dict[str, str]] | None = None) -> list[tuple[int, Any]]:
        context = self.context = Context(self.folder)
        context.requests = headers or [{} for _ in bodies]
        answers = self.handler.handle([{"body": body} for body in bodies], context)
        return [(context.status.get(i, 200), answer) for i, answer in enumerate(answers)]

    def json(self, *bodies: Any) -> list[tuple[int, Any]]:
        return [(status, json.loads(answer)) for status, answer in self.ask(*bodies)]


@pytest.fixture
def handler(files: Path, tmp_path: Path) -> Running:
    write_archive(manifest(), files, tmp_path / "tiny.mar")
    return Running(unpacked(tmp_path / "tiny.mar", tmp_path / "unpacked"))


@pytest.mark.parametrize("format", ["onnx", "torchscript", "pt2"])
def test_a_handler_is_one_file_with_one_class_and_nothing_of_kpdeploy(format: str) -> None:
    text = handler_source(format)
    compile(text, "handler.py", "exec")
    assert text.count("\nclass ") == 1
    assert "import kpdeploy" not in text
    assert "from kpdeploy" not in text


def test_the_same_files_give_the_same_bytes_whatever_was_measured(files: Path, tmp_path: Path) -> None:
    digests = []
    for index in range(2):
        (files / "golden.npz").write_bytes(b"other" * index)
        path = tmp_path / f"{index}.mar"
        write_archive(manifest(created=f"202{index}"), files, path)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    with zipfile.ZipFile(tmp_path / "0.mar") as mar:
        assert {entry.compress_type for entry in mar.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in mar.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert "golden.npz" not in mar.namelist()
        config = mar.read("model-config.yaml").decode()
    assert [line.partition(":")[0] for line in config.splitlines()[:5]] == [
        "batchSize", "maxBatchDelay", "minWorkers", "maxWorkers", "responseTimeout",
    ]  # fmt: skip


def test_json_kserve_v1_and_v2_and_npz_are_answered_in_kind(handler: Running) -> None:
    ids, k = [[1, 2], [3, 4]], [2.0, 3.0]
    y, total = [[2, 4], [9, 12]], [6, 21]
    v2 = {
        "id": "7",
        "inputs": [
            {"name": "ids", "shape": [2, 2], "datatype": "INT64", "data": [1, 2, 3, 4]},
            {"name": "k", "shape": [2], "datatype": "FP32", "data": k},
        ],
        "outputs": [{"name": "sum"}],
    }
    instances = [{"ids": ids[0], "k": 2.0}, {"ids": ids[1], "k": 3.0}]
    found = handler.json({"ids": ids, "k": k}, {"instances": instances}, v2)
    assert [status for status, _ in found] == [200] * 3
    assert found[0][1] == {"y": y, "sum": total}
    assert found[1][1] == {"predictions": [{"y": y[0], "sum": 6}, {"y": y[1], "sum": 21}]}
    assert found[2][1]["outputs"] == [{"name": "sum", "shape": [2], "datatype": "FP32", "data": [6, 21]}]
    assert (found[2][1]["id"], found[2][1]["model_version"]) == ("7", "1")
    file = io.BytesIO()
    np.savez(file, ids=np.array(ids), k=np.array(k, np.float32))
    ((status, content),) = handler.ask(file.getvalue())
    assert status == 200
    with np.load(io.BytesIO(content)) as arrays:
        assert arrays["y"].tolist() == y


def test_binary_tensors_of_v2_come_and_go(handler: Running) -> None:
    tensors = {"ids": np.array([[1, 2]]), "k": np.array([2], np.float32)}
    body, headers = request(manifest(), tensors)
    ((status, content),) = handler.ask(body, headers=[{name.title(): value for name, value in headers.items()}])
    assert status == 200
    length = handler.context.headers[0]["Inference-Header-Content-Length"]
    found = answer(content, length)
    assert found["y"].tolist() == [[2, 4]]
    ((status, content),) = handler.ask(body[:-2], headers=[headers])
    assert status == 400
    assert b"binary data" in content


def test_requests_of_different_lengths_run_as_one_batch_and_each_equals_itself_alone(handler: Running) -> None:
    bodies = [{"ids": [[i] * n], "k": [float(i)]} for i, n in enumerate((1, 3, 2, 3), 1)]
    alone = [handler.json(body)[0] for body in bodies]
    handler.module.BATCHES.clear()
    assert handler.json(*bodies) == alone
    assert handler.module.BATCHES == [4]


def test_no_call_has_more_rows_than_were_proven(handler: Running) -> None:
    bodies = [{"ids": [[1]] * 3, "k": [1.0] * 3}] * 3
    assert [status for status, _ in handler.json(*bodies)] == [200] * 3
    assert handler.module.BATCHES == [3, 3, 3]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"ids": [[1]]}, "input k is missing"),
        ({"ids": [[1.5]], "k": [1.0]}, "ids must hold int64"),
        ({"ids": [[1], [1, 2]], "k": [1.0, 1.0]}, "different lengths"),
        ({"ids": [1], "k": [1.0]}, "the model takes ['batch', 'n']"),
        ({"ids": [[1] * 7], "k": [1.0]}, "n of ids is 7"),
        ({"ids": [[1]] * 2, "k": [1.0]}, "batch is 2 in one input and 1 in k"),
        ({"ids": [[10]], "k": [1.0]}, "the model takes 0 to 9"),
        ({"ids": [[]], "k": [1.0]}, "n of ids is 0"),
        ({"ids": [["a"]], "k": [1.0]}, "ids must hold int64"),
        ({"ids": [[2**70]], "k": [1.0]}, "ids"),
        ({"inputs": [{"name": "ids", "shape": [1, 1], "datatype": "BYTES", "data": ["x"]}]}, "BYTES"),
        ({"inputs": [{"name": "ids", "shape": [1, 9], "datatype": "INT64", "data": [1]}]}, "another number"),
        ({"instances": [1]}, "must be an object"),
        ({"instances": []}, "instances is empty"),
        (b"\xff\xfe", "neither JSON nor .npz"),
        (b"PK\x03\x04broken", ""),
        (b"", "neither JSON nor .npz"),
        (None, "JSON object"),
        ([1], "JSON object"),
    ],
)
def test_a_bad_request_gets_400_with_the_reason_and_the_others_their_answers(
    bad: Any, said: str, handler: Running
) -> None:
    good = {"ids": [[1, 2]], "k": [2.0]}
    found = handler.ask(good, bad, good)
    assert [status for status, _ in found] == [200, 400, 200]
    assert said in json.loads(found[1][1])["error"]


def test_a_request_on_which_the_model_fails_gets_500_alone(handler: Running) -> None:
    found = handler.ask({"ids": [[1]], "k": [2.0]}, {"ids": [[1]], "k": [-1.0]}, {"ids": [[1]], "k": [3.0]})
    assert [status for status, _ in found] == [200, 500, 200]
    assert "k is negative" in json.loads(found[1][1])["error"]


def test_a_model_that_does_not_batch_gets_each_request_alone(files: Path, tmp_path: Path) -> None:
    write_archive(manifest(max_batch_size=0, padded_axes=()), files, tmp_path / "tiny.mar")
    running = Running(unpacked(tmp_path / "tiny.mar", tmp_path / "unpacked"))
    good = {"ids": [[1]], "k": [1.0]}
    assert [status for status, _ in running.json(good, good)] == [200, 200]
    assert running.module.BATCHES == [1, 1]


def test_a_changed_file_is_not_loaded(files: Path, tmp_path: Path) -> None:
    write_archive(manifest(), files, tmp_path / "tiny.mar")
    folder = unpacked(tmp_path / "tiny.mar", tmp_path / "unpacked")
    (folder / "model.bin").write_bytes(b"others")
    with pytest.raises(RuntimeError, match="not the file that was proven"):
        Running(folder)


def test_a_repository_holds_the_archive_its_versions_and_what_plain_torchserve_needs(
    files: Path, tmp_path: Path
) -> None:
    repo = tmp_path / "model_store"
    assert [publish(str(repo), manifest(version=0), files).version for _ in range(2)] == [1, 2]
    (deployment,) = read_repository(str(repo))
    assert deployment.version == 2
    deployment.manifest.check_files(Path(deployment.folder))
    assert {p.name for p in repo.iterdir()} == {"tiny", "tiny.mar", "config.properties", "run.sh", "requirements.txt"}
    config = (repo / "config.properties").read_text()
    assert "load_models=tiny.mar\n" in config
    assert "disable_token_authorization=false\n" in config
    assert config.count("127.0.0.1") == 5
    assert (repo / "requirements.txt").read_text() == "torchserve==0.12.0\npyyaml\nnumpy==2.1.0\n"
    subprocess.run(["bash", "-n", str(repo / "run.sh")], check=True)


def test_an_earlier_version_comes_back(files: Path, tmp_path: Path) -> None:
    repo = str(tmp_path / "model_store")
    for _ in range(2):
        publish(repo, manifest(version=0), files)
    done = CliRunner().invoke(cli, ["rollback", repo, "--to", "1", "--json"])
    assert json.loads(done.output) == {"model": "tiny", "version": 1, "before": 2}
    assert read_repository(repo)[0].version == 1
    assert publish(repo, manifest(version=0), files).version == 3
    with pytest.raises(UnknownName, match="version 9"):
        rollback(repo, "tiny", 9)
    (Path(repo) / "tiny" / "1" / "tiny.mar").write_bytes(b"changed")
    with pytest.raises(DigestMismatch):
        rollback(repo, "tiny", 1)


def test_the_artifact_of_an_archive_is_unpacked_for_its_runtime(files: Path, tmp_path: Path) -> None:
    publish(str(tmp_path / "model_store"), manifest(version=0), files)
    (deployment,) = read_repository(str(tmp_path / "model_store"))
    with artifact_files(deployment) as folder:
        assert {file.name for file in folder.iterdir()} == {"model.bin", "golden.npz", "baseline.json"}
        assert (folder / "model.bin").read_bytes() == b"weights"
    assert not folder.exists()


def test_what_a_killed_publish_left_goes_with_the_next(files: Path, tmp_path: Path) -> None:
    repo = tmp_path / "model_store"
    publish(str(repo), manifest(version=0), files)
    (repo / "tiny" / "2").mkdir()
    (repo / "tiny" / "2" / UNCOMMITTED).touch()
    (repo / ".kpdeploy-staging").mkdir()
    assert publish(str(repo), manifest(version=0), files).version == 2
    assert read_repository(str(repo))[0].version == 2
    assert not list(repo.glob("*/*/uncommitted"))
    assert not (repo / ".kpdeploy-staging").exists()


def test_an_object_store_gets_the_same(files: Path) -> None:
    import fsspec

    publish("memory://torchserve", manifest(version=0), files)
    (deployment,) = read_repository("memory://torchserve")
    assert (deployment.version, deployment.manifest.target) == (1, "torchserve")
    assert "load_models=tiny.mar" in fsspec.filesystem("memory").cat("/torchserve/config.properties").decode()


def test_archives_of_others_are_left_alone(files: Path, tmp_path: Path) -> None:
    repo = tmp_path / "model_store"
    repo.mkdir()
    with zipfile.ZipFile(repo / "tiny.mar", "w") as mar:
        mar.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelName": "tiny", "modelVersion": "1.0"}}))
    with pytest.raises(RepositoryBroken, match="not made by kpdeploy"):
        check_publishable(str(repo), model="tiny")
    with pytest.raises(RepositoryBroken, match="not made by kpdeploy"):
        publish(str(repo), manifest(version=0), files)


def test_the_handler_runs_where_kpdeploy_is_not(files: Path, tmp_path: Path) -> None:
    write_archive(manifest(), files, tmp_path / "tiny.mar")
    folder = unpacked(tmp_path / "tiny.mar", tmp_path / "unpacked")
    program = (
        "import sys\nsys.modules['kpdeploy'] = None\nsys.path.insert(0, '.')\nimport handler\n"
        "class C:\n system_properties={'model_dir': '.'}; model_name='tiny'; model_yaml_config={}; metrics=None\n"
        "h = handler.Handler(); h.initialize(C)\nprint(handler.BATCHES)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 4]\n"  # the warm-up: one row, and a whole batch


def test_key_files_are_read_and_never_shown(tmp_path: Path) -> None:
    from kpdeploy.serving.torchserve.management import Management, read_tokens

    path = tmp_path / "key_file.json"
    path.write_text(json.dumps({"inference": {"key": "s3cret", "expiration time": "x"}, "API": {"key": "other"}}))
    assert read_tokens(path) == {"inference": "s3cret", "API": "other"}
    assert "s3cret" not in repr(Management(address="127.0.0.1:1", key_file=path))
    path.write_text("s3cret\n")
    assert read_tokens(path) == {"inference": "s3cret"}
    with pytest.raises(UnknownName):
        read_tokens(tmp_path / "missing")


def test_a_killed_parent_takes_the_whole_group_with_it(tmp_path: Path) -> None:
    launcher = Path(archive.__file__).with_name("launcher.py")
    program = (
        "import os, subprocess, sys, time\n"
        f"command = [sys.executable, {str(launcher)!r}, str(os.getpid()), 'sh', '-c', 'sleep 60 & sleep 60']\n"
        "p = subprocess.Popen(command, start_new_session=True)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    wait_for(lambda: len(members(group)) >= 3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not members(group))


def members(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
