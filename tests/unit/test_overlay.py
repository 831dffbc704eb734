"""The overlay of a native repository, and its model.py run without a server."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup as ModelInstance

from kpdeploy.artifact import Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import TOLERANCES
from kpdeploy.deployment import Deployment
from kpdeploy.errors import DigestMismatch, LibraryMissing, PortInUse, ServerUnavailable, UnknownName
from kpdeploy.progress import Progress
from kpdeploy.runtimes import source
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.triton import control, environment, overlay, scratch
from kpdeploy.serving.triton.config import read_config
from kpdeploy.serving.triton.overlay import link_backends, overlay_config, write_overlay
from kpdeploy.serving.triton.ports import Ports, claim
from kpdeploy.serving.triton.repository import publish
from kpdeploy.serving.triton.server import serve
from kpdeploy.signature import Axis, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", "n")),
        TensorSpec(name="k", dtype="float32", shape=("batch", 1)),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", "n")),),
    axes=(Axis(name="batch", min=1, max=8), Axis(name="n", min=1, max=9)),
)

# A runtime for tests: y = x * k, refusing a negative k, and telling the size of each batch it ran.
RUNTIME = """
BATCHES = []

def load(path, *, inputs, outputs, settings):
    assert (inputs, outputs) == (["INPUT__0", "INPUT__1"], ["OUTPUT__0"])

    def run(arrays):
        x, k = arrays
        BATCHES.append(len(x))
        if (k < 0).any():
            raise ValueError("k is negative")
        return [x * k]

    return run
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    files = tmp_path / "files"
    files.mkdir()
    (files / "model.pt2").write_bytes(b"an artifact")
    x = np.ones((2, 3), np.float32)
    exchange = Exchange(inputs={"x": x, "k": x[:, :1]}, outputs={"y": x})
    Baseline(exchanges=(exchange,), latencies=(), environment={}).write(files)
    manifest = Manifest(
        model="scale",
        version=0,
        target="triton",
        format="pt2",
        filename="model.pt2",
        signature=SIGNATURE,
        max_batch_size=8,
        input_names=("INPUT__0", "INPUT__1"),
        output_names=("OUTPUT__0",),
        settings={},
        files={},
        tolerances=TOLERANCES,
        decisions=(),
        formats=(),
        source={},
        environment={"packages": {"torch": "2.9.1+cpu"}},
        created="2026-01-01T00:00:00Z",
    )
    publish(str(tmp_path / "models"), manifest, files)
    return tmp_path / "models"


def deployment(repo: Path) -> Deployment:
    return read_repository(str(repo))[0]


# What is written


def test_an_overlay_keeps_the_configuration_and_changes_what_runs_it(repo: Path, tmp_path: Path) -> None:
    served = write_overlay(deployment(repo), tmp_path / "o", backends_dir=None, versions={"torch": "2.13.0"})
    native = read_config((repo / "scale/config.pbtxt").read_text(), where="")
    written = read_config((tmp_path / "o/scale/config.pbtxt").read_text(), where="")
    assert (native.platform, written.backend, written.platform) == ("torch_aoti", "python", "")
    for kept in ("name", "input", "output", "max_batch_size", "version_policy", "model_warmup", "dynamic_batching"):
        assert getattr(written, kept) == getattr(native, kept)
    assert (tmp_path / "o/scale/warmup").resolve() == repo / "scale/warmup"
    assert (served.native, served.runtime, served.instances) == (False, "torch 2.13.0", 1)
    assert str(served).startswith("scale v1: model.pt2 run by torch 2.13.0 inside Triton's python backend; ")


def test_only_where_padding_was_proven_the_overlay_takes_ragged_batches_and_says_so(repo: Path, tmp_path: Path) -> None:
    native = deployment(repo)
    plain = write_overlay(native, tmp_path / "plain", backends_dir=None, versions={})
    proven = replace(native, manifest=replace(native.manifest, padded_axes=("n",)))
    served = write_overlay(proven, tmp_path / "o", backends_dir=None, versions={})
    flags = {
        folder: [e.allow_ragged_batch for e in read_config((folder / "scale/config.pbtxt").read_text(), where="").input]
        for folder in (tmp_path / "plain", tmp_path / "o", repo)
    }
    # Only x has the axis; the native configuration stays as it is.
    assert list(flags.values()) == [[False, False], [True, False], [False, False]]
    assert json.loads((tmp_path / "o/scale/1/artifact.json").read_text())["padded_axes"] == {"n": 9}
    assert plain.padding == ""
    assert served.padding.startswith("scale: requests of different n are padded and merged here; NVIDIA's container")


def test_the_artifact_is_not_copied(repo: Path, tmp_path: Path) -> None:
    write_overlay(deployment(repo), tmp_path / "o", backends_dir=None, versions={})
    described = json.loads((tmp_path / "o/scale/1/artifact.json").read_text())
    assert described["path"] == str(repo / "scale/1/model.pt2")
    assert (described["inputs"], described["outputs"]) == (["INPUT__0", "INPUT__1"], ["OUTPUT__0"])
    assert not (tmp_path / "o/scale/1/model.pt2").exists()


def test_a_changed_artifact_is_refused_before_anything_is_written(repo: Path, tmp_path: Path) -> None:
    (repo / "scale/1/model.pt2").write_bytes(b"another one")
    with pytest.raises(DigestMismatch):
        write_overlay(deployment(repo), tmp_path / "o", backends_dir=None, versions={})
    assert not (tmp_path / "o").exists()


def test_a_native_backend_serves_the_repository_itself(repo: Path, tmp_path: Path) -> None:
    backends = tmp_path / "backends"
    (backends / "pytorch").mkdir(parents=True)
    served = write_overlay(deployment(repo), tmp_path / "o", backends_dir=backends, versions={})
    assert (tmp_path / "o/scale").resolve() == repo / "scale"
    assert str(served) == "scale v1: model.pt2 run by Triton's pytorch backend"


def test_a_backend_that_the_folder_does_not_hold_is_overlaid_and_the_repository_stays(
    repo: Path, tmp_path: Path
) -> None:
    backends = tmp_path / "backends"
    (backends / "pytorch").mkdir(parents=True)
    write_overlay(deployment(repo), tmp_path / "o", backends_dir=backends, versions={})
    before = sorted(path.name for path in repo.rglob("*"))
    assert not write_overlay(deployment(repo), tmp_path / "o", backends_dir=None, versions={}).native
    assert sorted(path.name for path in repo.rglob("*")) == before
    assert not (tmp_path / "o/scale").is_symlink()


def test_several_instances_share_the_cores(monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    config = overlay_config(ModelConfig(instance_group=[{"count": 3, "kind": "KIND_GPU", "gpus": [0]}]))
    assert (config.instance_group[0].kind, list(config.instance_group[0].gpus)) == (ModelInstance.KIND_CPU, [])
    assert overlay.artifact(deployment(repo).manifest, repo, config)["settings"] == {"threads": 2}
    one = overlay_config(ModelConfig())
    assert overlay.artifact(deployment(repo).manifest, repo, one)["settings"] == {}


def test_the_backend_folder_holds_the_users_backends_and_the_bundled_python_one(tmp_path: Path) -> None:
    for name in ("onnxruntime", "python"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
    stub = tmp_path / "stub"
    stub.touch()
    link_backends(tmp_path / "ours", [stub], backends_dir=tmp_path / "theirs")
    assert (tmp_path / "ours/onnxruntime").resolve() == tmp_path / "theirs/onnxruntime"
    assert (tmp_path / "ours/python/stub").resolve() == stub
    assert list((tmp_path / "theirs/python").iterdir()) == []


# model.py


class Request:
    def __init__(self, x: Any, k: float) -> None:
        self.tensors = {"INPUT__0": np.asarray(x, np.float32), "INPUT__1": np.full((len(x), 1), k, np.float32)}
        self.sent: list[Any] = []

    def get_response_sender(self) -> Any:
        return types.SimpleNamespace(send=lambda response, flags: self.sent.append(response))


def execute(running: Any, requests: list[Request]) -> list[Any]:
    """What each request was answered, whether it was returned or sent before; one answer each."""
    returned = running.execute(requests)
    answers = [[*request.sent, *([] if returned is None else [returned[i]])] for i, request in enumerate(requests)]
    assert all(len(found) == 1 for found in answers)
    return [found[0] for found in answers]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loaded model.py with the test's runtime, in a process where Triton's module is its plainest form."""
    module = types.SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: types.SimpleNamespace(
            as_numpy=lambda: request.tensors[name], is_cpu=lambda: True
        ),
        Tensor=lambda name, array: (name, array),
        TritonError=str,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        InferenceResponse=lambda tensors=None, error=None: error or dict(tensors),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    (tmp_path / "model.py").write_text(Path(overlay.__file__).with_name("overlay_model.py").read_text())
    (tmp_path / "runtime.py").write_text(RUNTIME)
    (tmp_path / "ragged.py").write_text(source("ragged").read_text())
    spec = importlib.util.spec_from_file_location("overlay_under_test", tmp_path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)

    def make(max_batch_size: int = 8, padded_axes: dict[str, int] | None = None) -> Any:
        artifact = {
            "path": "",
            "inputs": ["INPUT__0", "INPUT__1"],
            "outputs": ["OUTPUT__0"],
            "settings": {},
            "input_shapes": [spec.shape for spec in SIGNATURE.inputs],
            "output_shapes": [spec.shape for spec in SIGNATURE.outputs],
            "padded_axes": padded_axes or {},
        }
        (tmp_path / "artifact.json").write_text(json.dumps(artifact))
        made = loaded.TritonPythonModel()
        made.initialize({"model_config": json.dumps({"max_batch_size": max_batch_size})})
        return made

    return make


def batches(model: Any) -> list[int]:
    found: list[int] = model.run.__globals__["BATCHES"]
    return found


def test_requests_of_one_shape_run_as_one_batch_and_get_their_own_rows(model: Any) -> None:
    running = model()
    answers = execute(running, [Request([[1, 2]], 2), Request([[3, 4], [5, 6]], 3)])
    np.testing.assert_array_equal(answers[0]["OUTPUT__0"], [[2, 4]])
    np.testing.assert_array_equal(answers[1]["OUTPUT__0"], [[9, 12], [15, 18]])
    assert batches(running) == [3]
    assert all(answer["OUTPUT__0"].flags.c_contiguous for answer in answers)


def test_requests_of_other_shapes_run_apart_and_answers_keep_their_order(model: Any) -> None:
    running = model()
    answers = execute(running, [Request([[1]], 2), Request([[1, 1]], 3), Request([[5]], 4)])
    assert [answer["OUTPUT__0"].tolist() for answer in answers] == [[[2]], [[3, 3]], [[20]]]
    assert sorted(batches(running)) == [1, 2]


def test_where_padding_is_neutral_other_sizes_run_as_one_batch_and_answers_have_their_own(model: Any) -> None:
    running = model(padded_axes={"n": 9})
    answers = execute(running, [Request([[1]], 2), Request([[1, 1, 1], [2, 2, 2]], 3), Request([[5, 6]], 4)])
    assert [answer["OUTPUT__0"].tolist() for answer in answers] == [[[2]], [[3, 3, 3], [6, 6, 6]], [[20, 24]]]
    assert batches(running) == [4]
    assert all(answer["OUTPUT__0"].flags.c_contiguous for answer in answers)


def test_a_request_beyond_the_proven_range_is_not_padded_with_others(model: Any) -> None:
    running = model(padded_axes={"n": 2})
    answers = execute(running, [Request([[1]], 2), Request([[1, 1, 1]], 3), Request([[5, 6]], 4)])
    assert [answer["OUTPUT__0"].tolist() for answer in answers] == [[[2]], [[3, 3, 3]], [[20, 24]]]
    assert sorted(batches(running)) == [1, 2]


def test_a_bad_request_fails_alone_among_padded_ones_too(model: Any) -> None:
    answers = execute(model(padded_axes={"n": 9}), [Request([[1]], 2), Request([[1, 1]], -1), Request([[5]], 4)])
    assert answers[1] == "ValueError: k is negative"
    assert [answers[i]["OUTPUT__0"].tolist() for i in (0, 2)] == [[[2]], [[20]]]


def test_a_bad_request_fails_alone(model: Any) -> None:
    answers = execute(model(), [Request([[1]], 2), Request([[1]], -1), Request([[5]], 4)])
    assert answers[1] == "ValueError: k is negative"
    assert [answers[i]["OUTPUT__0"].tolist() for i in (0, 2)] == [[[2]], [[20]]]


def test_a_model_that_does_not_batch_gets_each_request_alone(model: Any) -> None:
    running = model(max_batch_size=0)
    execute(running, [Request([[1]], 2), Request([[5]], 4)])
    assert batches(running) == [1, 1]


# The server's surroundings


def test_a_port_given_twice_is_refused() -> None:
    free = claim(Ports(http=0, grpc=0, metrics=0))
    with pytest.raises(PortInUse, match=r"\(grpc\)"):
        claim(Ports(http=free.http, grpc=free.http, metrics=0))


def test_a_url_cannot_be_polled() -> None:
    with pytest.raises(UnknownName, match="polled"), serve("memory://models", poll=True):
        pass


def test_a_host_that_is_not_this_machine_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"192\.0\.2\.1"):
        claim(Ports(host="192.0.2.1"))


@pytest.mark.parametrize(
    ("host", "is_open"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True)]
)
def test_only_loopback_is_closed_to_the_network(host: str, is_open: bool) -> None:
    assert Ports(host=host).open_to_network is is_open


LDD = """\tlibpython3.11.so.1.0 => not found
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f0)
/x/tritonserver: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by /x/tritonserver)
"""


def test_missing_libraries_are_read_from_ldd() -> None:
    assert environment.missing_libraries(LDD) == ["libpython3.11.so.1.0", "GLIBC_2.34"]


def test_a_missing_libpython_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ldd").write_text("#!/bin/sh\necho 'libpython3.11.so.1.0 => not found'\n")
    (tmp_path / "ldd").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(LibraryMissing) as error:
        environment.check_libraries(environment.ServerEnvironment(prefix=tmp_path))
    assert "libpython3.11.so.1.0" in error.value.why
    assert f"apt install libpython{environment.PYTHON}" in error.value.next_step


def test_an_unsupported_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PYTHON", "3.99")
    with pytest.raises(ServerUnavailable, match=r"Python 3\.99"):
        environment.ensure_environment(Progress())


def test_a_failed_install_gives_pips_reason_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ServerUnavailable, match="nvidia-pytriton") as error:
        environment.ensure_environment(Progress())
    assert "No matching distribution found for nvidia-pytriton" in error.value.why
    assert not [path for path in (tmp_path / "kpdeploy").iterdir() if path.is_dir()]


def test_offline_the_broken_connection_is_the_reason() -> None:
    output = (
        "WARNING: Retrying after connection broken by 'NewConnectionError: Connection refused': /simple/x/\n"
        "ERROR: No matching distribution found for x\n"
    )
    assert "Connection refused" in environment.pip_reason(output)
    assert environment.pip_reason("") == ""


def test_a_runtime_that_is_here_is_not_installed_again_and_another_is_pinned(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = deployment(repo).manifest
    monkeypatch.setattr(environment, "installed", lambda package: "2.13.0")
    assert environment.runtime_pins([manifest]) == ()
    monkeypatch.setattr(environment, "installed", lambda package: None)
    assert environment.runtime_pins([manifest, manifest]) == ("torch==2.9.1",)


def test_the_environment_differs_by_pins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.environment_folder().parent == tmp_path / "kpdeploy"
    assert environment.environment_folder() != environment.environment_folder(("torch==2.9.1",))


def test_the_servers_reason_is_told_without_its_stack() -> None:
    reason = "Internal: Fail: cannot read it\n\nAt:\n  /tmp/x/runtime.py(3): load\n"
    assert control.load_failed("m", reason).why == "Fail: cannot read it"


def test_what_a_killed_server_left_is_swept_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "SHARED_MEMORY", tmp_path / "shm")
    dead = tmp_path / f"{scratch.PREFIX}dead"
    for file in (dead / "lock", tmp_path / "shm" / f"{dead.name}-1"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    with scratch.scratch() as living:
        (tmp_path / "shm" / f"{living.folder.name}-1").touch()
        scratch.sweep()
        assert not dead.exists()
        assert [path.name for path in (tmp_path / "shm").iterdir()] == [f"{living.folder.name}-1"]
    assert list((tmp_path / "shm").iterdir()) == []
    assert not living.folder.exists()
