"""Publishing into a repository and reading it back: on a file system, and in an object store."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from tiny_version import manifest, write_files

from kpdeploy.cli import cli
from kpdeploy.errors import (
    DigestMismatch,
    DiskFull,
    KpdeployError,
    RepositoryBroken,
    RepositoryBusy,
    RepositoryUnwritable,
    UnknownName,
)
from kpdeploy.serving import storage
from kpdeploy.serving.repository import find_deployment, find_version, local_files, read_repository
from kpdeploy.serving.triton import repository
from kpdeploy.serving.triton.config import read_config
from kpdeploy.serving.triton.repository import publish


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path / "files")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return tmp_path / "work" / "models"


@pytest.fixture
def bucket() -> Iterator[str]:
    yield "memory://bucket/models"
    store = fsspec.filesystem("memory")
    store.rm("/bucket", recursive=True)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, dot-files included, and every empty folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def served_version(repo: Path, model: str = "tiny") -> list[int]:
    path = repo / model / "config.pbtxt"
    return list(read_config(path.read_text(), where=str(path)).version_policy.specific.versions)


def test_a_first_export_makes_the_repository_and_version_1(repo: Path, files: Path) -> None:
    done = publish(str(repo), manifest(), files)
    assert (done.version, Path(done.folder)) == (1, repo / "tiny" / "1")
    assert set(tree(repo.parent)) == {
        "models/tiny/config.pbtxt",
        "models/tiny/warmup/v1-x",
        "models/tiny/warmup/v1-scale",
        *(f"models/tiny/1/{n}" for n in ("model.onnx", "weights.bin", "golden.npz", "baseline.json", "manifest.json")),
        "models/tiny/1/launch.sh",
    }
    assert set(done.manifest.files) == {"model.onnx", "weights.bin", "golden.npz", "baseline.json", "launch.sh"}
    done.manifest.check_files(Path(done.folder))
    assert read_repository(str(repo)) == [done]


def test_exporting_again_makes_the_next_version_and_keeps_the_earlier(repo: Path, files: Path) -> None:
    publish(str(repo), manifest(), files)
    before = tree(repo / "tiny" / "1")
    (files / "model.onnx").write_bytes(b"other weights")
    second = publish(str(repo), manifest(), files)
    assert second.version == 2
    assert served_version(repo) == [2]
    assert tree(repo / "tiny" / "1") == before
    assert {"config.pbtxt", "warmup", "1", "2"} == {p.name for p in (repo / "tiny").iterdir()}
    assert not (repo / "tiny" / "2" / "config.pbtxt").exists()
    assert [d.version for d in read_repository(str(repo))] == [2]


def test_a_version_can_lie_there_until_it_is_activated(repo: Path, files: Path) -> None:
    # The first is served whatever was asked for: a model without a version that is served is none.
    publish(str(repo), manifest(), files, activate=False)
    assert served_version(repo) == [1]
    before = tree(repo / "tiny")
    second = publish(str(repo), manifest(), files, activate=False)
    after = tree(repo / "tiny")
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {"2"}
    second.manifest.check_files(Path(second.folder))
    assert find_deployment(str(repo), "tiny").version == 1
    # Another export neither takes it for what a killed run left, nor writes over it.
    assert publish(str(repo), manifest(), files, activate=False).version == 3
    repository.activate(second)
    assert served_version(repo) == [2]
    assert (repo / "tiny" / "warmup" / "v2-x").exists()


def test_a_version_in_an_object_store_can_wait_too(bucket: str, files: Path) -> None:
    first = publish(bucket, manifest(), files)
    second = publish(bucket, manifest(), files, activate=False)
    assert read_repository(bucket) == [first]
    assert find_version(bucket, "tiny", 2) == second


def test_a_version_that_was_rolled_back_is_neither_removed_nor_overwritten(repo: Path, files: Path) -> None:
    publish(str(repo), manifest(), files)
    config = (repo / "tiny" / "config.pbtxt").read_bytes()
    publish(str(repo), manifest(), files)
    (repo / "tiny" / "config.pbtxt").write_bytes(config)
    assert find_deployment(str(repo), "tiny").version == 1
    assert publish(str(repo), manifest(), files).version == 3
    assert (repo / "tiny" / "2" / "model.onnx").exists()


def test_an_earlier_version_is_put_in_service_by_a_command(repo: Path, files: Path) -> None:
    for _ in range(2):
        publish(str(repo), manifest(), files)
    done = CliRunner().invoke(cli, ["rollback", str(repo), "--to", "1", "--json"])
    assert json.loads(done.output) == {"model": "tiny", "version": 1, "before": 2}
    assert read_repository(str(repo))[0].version == 1
    with pytest.raises(UnknownName, match="version 9"):
        CliRunner().invoke(cli, ["rollback", str(repo), "--to", "9"], catch_exceptions=False)
    (repo / "tiny" / "2" / "model.onnx").write_bytes(b"changed")
    with pytest.raises(DigestMismatch):
        CliRunner().invoke(cli, ["rollback", str(repo), "--to", "2"], catch_exceptions=False)
    with pytest.raises(UnknownName, match="no folder"):
        CliRunner().invoke(cli, ["rollback", "memory://models", "--to", "1"], catch_exceptions=False)


def test_what_a_killed_run_left_is_removed(repo: Path, files: Path) -> None:
    publish(str(repo), manifest(), files)
    clean = {"config.pbtxt", "warmup", "1", "2"}
    uncommitted = repo / "tiny" / "2"
    shutil.copytree(repo / "tiny" / "1", uncommitted)
    shutil.copy(repo / "tiny" / "config.pbtxt", uncommitted)
    (repo / "tiny" / "warmup" / "v2-left").write_bytes(b"x")
    for place in (repo.parent / ".models.kpdeploy-staging", repo / "tiny" / ".kpdeploy-staging"):
        (place / "2").mkdir(parents=True)
    assert publish(str(repo), manifest(), files).version == 2
    assert {p.name for p in (repo / "tiny").iterdir()} == clean
    assert not (repo / "tiny" / "warmup" / "v2-left").exists()
    assert {p.name for p in repo.parent.iterdir()} == {"models"}


@pytest.mark.parametrize("with_another_model", [True, False])
def test_a_repository_that_is_a_mount_point_is_staged_in_itself(
    repo: Path, files: Path, monkeypatch: pytest.MonkeyPatch, with_another_model: bool
) -> None:
    if with_another_model:
        publish(str(repo), manifest("other"), files)
    monkeypatch.setattr(repository, "_is_mount_point", lambda folder: True)
    seen = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (seen.append(Path(old).parent), rename(old, new)))
    publish(str(repo), manifest(), files)
    # Any folder of a repository is a model to Triton: with models there, one of them hides the staging.
    assert seen == [repo / "other" if with_another_model else repo]
    assert not list(repo.rglob("*staging*"))


@pytest.mark.parametrize("content", ["name: 'tiny'", "version_policy { specific { versions: [1] } }", None])
def test_a_model_of_another_maker_is_refused_and_untouched(repo: Path, files: Path, content: str | None) -> None:
    (repo / "tiny" / "1").mkdir(parents=True)
    (repo / "tiny" / "1" / "model.onnx").write_bytes(b"theirs")
    if content is not None:
        (repo / "tiny" / "config.pbtxt").write_text(content)
    before = tree(repo.parent)
    with pytest.raises(RepositoryBroken, match="not made by kpdeploy"):
        publish(str(repo), manifest(), files)
    assert tree(repo.parent) == before


def fail_at(step: int, patched: pytest.MonkeyPatch) -> None:
    """Let the step-th write, sync or rename fail as on a full disk; all others are real."""
    count = itertools.count(1)

    def failing(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == step:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    for module, name in ((shutil, "copyfile"), (os, "fsync"), (os, "rename"), (os, "replace")):
        patched.setattr(module, name, failing(getattr(module, name)))
    for name in ("write_bytes", "write_text", "mkdir"):
        patched.setattr(Path, name, failing(getattr(Path, name)))


@pytest.mark.parametrize("first", [True, False])
def test_an_error_at_any_step_leaves_the_repository_as_it_was(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    for step in itertools.count(1):
        repo = tmp_path / str(step) / "models"
        if not first:
            publish(str(repo), manifest(), files)
        before = tree(repo.parent) if repo.parent.exists() else {}
        with monkeypatch.context() as patched:
            fail_at(step, patched)
            try:
                publish(str(repo), manifest(), files)
                break
            except DiskFull:
                pass
        after = tree(repo.parent) if repo.parent.exists() else {}
        if after != before:
            # Only a sync after the commit may fail and leave the new version: a whole one.
            deployment = find_deployment(str(repo), "tiny")
            assert deployment.version == (1 if first else 2), step
            deployment.manifest.check_files(Path(deployment.folder))
            assert not [name for name in after if "staging" in name]
    assert step > 20


def test_a_full_disk_is_told_and_leaves_nothing(repo: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DiskFull, match="no space is left") as raised:
        publish(str(repo), manifest(), files)
    assert raised.value.exit_code == 41
    assert not repo.parent.exists()


def test_a_file_in_the_repositorys_place_is_unwritable(tmp_path: Path, files: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(RepositoryUnwritable):
        publish(str(tmp_path / "models"), manifest(), files)
    with pytest.raises(RepositoryUnwritable):
        publish(str(tmp_path / "models" / "below"), manifest(), files)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to root")
def test_a_folder_without_permission_is_unwritable(tmp_path: Path, files: Path) -> None:
    repo = tmp_path / "models"
    repo.mkdir(mode=0o500)
    with pytest.raises(RepositoryUnwritable):
        publish(str(repo), manifest(), files)


def test_a_second_writer_waits_and_then_gives_up(repo: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.mkdir(parents=True)
    monkeypatch.setattr(storage, "LOCK_WAIT_S", 0.2)
    held = os.open(repo, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(RepositoryBusy):
        publish(str(repo), manifest(), files)
    assert not list(repo.iterdir())
    monkeypatch.setattr(storage, "LOCK_WAIT_S", 30)
    release = threading.Timer(0.2, os.close, (held,))
    release.start()
    assert publish(str(repo), manifest(), files).version == 1
    release.join()


def test_writers_at_once_get_versions_of_their_own(repo: Path, files: Path) -> None:
    versions = []
    threads = [
        threading.Thread(target=lambda: versions.append(publish(str(repo), manifest(), files).version))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == [1, 2, 3, 4]
    assert served_version(repo) == [4]


def test_files_that_are_not_whole_are_refused(repo: Path, files: Path) -> None:
    (files / "golden.npz").unlink()
    with pytest.raises(RepositoryBroken, match="golden"):
        publish(str(repo), manifest(), files)
    assert not repo.exists()


def test_a_missing_or_empty_repository_is_told(tmp_path: Path) -> None:
    with pytest.raises(RepositoryBroken, match="there is no repository"):
        read_repository(str(tmp_path / "none"))
    with pytest.raises(RepositoryBroken, match="holds no model"):
        read_repository(str(tmp_path))


def test_models_of_other_makers_are_passed_over(repo: Path, files: Path) -> None:
    publish(str(repo), manifest(), files)
    (repo / "theirs" / "1").mkdir(parents=True)
    (repo / "theirs" / "config.pbtxt").write_text("name: 'theirs'")
    (repo / "README.md").write_text("a file")
    assert [d.model for d in read_repository(str(repo))] == ["tiny"]


def test_a_model_without_its_committed_version_is_broken(repo: Path, files: Path) -> None:
    publish(str(repo), manifest(), files)
    publish(str(repo), manifest(), files)
    shutil.rmtree(repo / "tiny" / "2")
    with pytest.raises(RepositoryBroken, match="names version 2"):
        read_repository(str(repo))


def test_a_model_is_found_by_name_or_because_it_is_alone(repo: Path, files: Path) -> None:
    publish(str(repo), manifest("encoder"), files)
    assert find_deployment(str(repo), None).model == "encoder"
    publish(str(repo), manifest("decoder"), files)
    assert find_deployment(f"file://{repo}", "decoder").model == "decoder"
    with pytest.raises(UnknownName, match="several models: decoder, encoder"):
        find_deployment(str(repo), None)
    with pytest.raises(UnknownName) as raised:
        find_deployment(str(repo), "encodr")
    assert "encoder" in raised.value.next_step


def test_an_object_store_gets_the_same_repository(bucket: str, files: Path) -> None:
    publish(bucket, manifest(), files)
    second = publish(bucket, manifest(), files)
    assert (second.version, second.folder) == (2, f"{bucket}/tiny/2")
    assert read_repository(bucket) == [second]
    with local_files(second) as folder:
        second.manifest.check_files(folder)
        assert "--load-model=$model" in (folder / "launch.sh").read_text()
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/models/tiny/2/model.onnx", b"changed")
    with local_files(second) as folder, pytest.raises(DigestMismatch):
        second.manifest.check_files(folder)


def test_an_object_store_commits_last(bucket: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(bucket, manifest(), files)
    store = fsspec.filesystem("memory")
    written = []
    for name in ("put_file", "pipe_file"):
        real = getattr(type(store), name)

        def recording(self: Any, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            written.append(next(a for a in args if isinstance(a, str) and "/bucket/" in a))
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(type(store), name, recording)
    publish(bucket, manifest(), files)
    assert written[-1] == "/bucket/models/tiny/config.pbtxt"
    assert "/bucket/models/tiny/2/manifest.json" in written


def test_each_version_has_a_launch_sh_of_its_own(repo: Path, files: Path) -> None:
    first = publish(str(repo), manifest(), files)
    # A folder that was a version once holds one already: it is written anew, not copied.
    (files / "launch.sh").write_text("rm -rf /")
    second = publish(str(repo), manifest(mount="/srv/models"), files)
    scripts = [(Path(d.folder) / "launch.sh").read_text() for d in (first, second)]
    assert "does not name version 1" in scripts[0]
    assert "does not name version 2" in scripts[1]
    assert ["mount=/models\n" in scripts[0], "mount=/srv/models\n" in scripts[1]] == [True, True]
    assert first.manifest.files["launch.sh"] != second.manifest.files["launch.sh"]


LAUNCHED = """\
# On the machine's GPUs{lacks}.
options+=(--gpus all)
{server}"""


def test_onnx_for_a_gpu_is_launched_on_it_and_in_graphs_brings_its_own_model_py(repo: Path, files: Path) -> None:
    settings = {"device": "cuda", "precision": "float16", "op_libraries": ("weights.bin",)}
    environment = {"packages": {"onnxruntime-gpu": "1.31.1"}}
    native = publish(str(repo), manifest(settings=settings, environment=environment), files)
    script = (Path(native.folder) / "launch.sh").read_text()
    assert LAUNCHED.format(lacks="", server="server=(tritonserver)\n") in script
    captured = {**settings, "graphs": True}
    own = publish(str(repo), manifest(settings=captured, environment=environment), files)
    script = (Path(own.folder) / "launch.sh").read_text()
    begun = LAUNCHED.format(lacks="; the container's Python lacks onnxruntime", server="# shellcheck disable=SC2016\n")
    assert begun in script
    assert {"model.py", "runtime.py", "ragged.py", "buckets.py", "onnx_graphs.py", "artifact.json"} <= set(
        own.manifest.files
    )
    wanted = (Path(own.folder) / "requirements.txt").read_text().split()
    assert wanted == ["numpy", "onnxruntime-gpu[cuda,cudnn]==1.31.1", "nvidia-cublas"]


def test_a_failed_upload_leaves_the_earlier_version(bucket: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = publish(bucket, manifest(), files)
    store = fsspec.filesystem("memory")
    real = type(store).put_file

    def failing(self: Any, local: str, remote: str, **kwargs: Any) -> None:
        if remote.endswith("manifest.json"):
            raise ConnectionError("the network went away")
        real(self, local, remote, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", failing)
        with pytest.raises(RepositoryUnwritable, match="cannot be written"):
            publish(bucket, manifest(), files)
    assert read_repository(bucket) == [first]
    assert not store.exists("/bucket/models/tiny/2")
    assert publish(bucket, manifest(), files).version == 2


def test_an_unknown_kind_of_address_is_told(files: Path) -> None:
    for use in (lambda: publish("nosuch://x", manifest(), files), lambda: read_repository("nosuch://x")):
        with pytest.raises(KpdeployError, match="not an address"):
            use()
