"""What would load in which container: the table, the check of a model against it, `doctor REPO`, and launch.sh."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from tiny_version import manifest, write_files

from kpdeploy.artifact import Manifest
from kpdeploy.cli.doctor import command
from kpdeploy.decision import Applied, Skipped
from kpdeploy.errors import UnknownName, WouldNotLoad
from kpdeploy.serving.repository import find_deployment
from kpdeploy.serving.triton import compatibility, containers
from kpdeploy.serving.triton.compatibility import NOT_KNOWN, Compatibility, check, needs, newest
from kpdeploy.serving.triton.config import read_config
from kpdeploy.serving.triton.containers import CONTAINERS, find_container, order, settled
from kpdeploy.serving.triton.launch import launch_script
from kpdeploy.serving.triton.repository import publish

ONNX = "libkpdeploy_onnx.so"
TORCH = "libkpdeploy_torch.so"


def onnx_file(opset: int = 20, ir: int = 10, domain: str = "") -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    opsets = [helper.make_opsetid("com.kpdeploy", 1), helper.make_opsetid(domain, opset)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir).SerializeToString())


def openvino_file(*opsets: int) -> bytes:
    layers = "".join(f'<layer id="{n}" version="opset{n}"/>' for n in opsets)
    return f'<net name="x" version="11"><layers>{layers}</layers></net>'.encode()


def version(folder: Path, content: bytes, *, libraries: tuple[str, ...] = (), **changes: Any) -> Manifest:
    """A version in `folder`, with its digests."""
    given = manifest(**changes)
    folder.mkdir(exist_ok=True)
    (folder / given.filename).write_bytes(content)
    for name in libraries:
        (folder / name).write_bytes(b"\x7fELF of " + name.encode())
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    return replace(given, files=files, settings={"op_libraries": list(libraries)} if libraries else {})


def against(result: Compatibility, what: str) -> list[str]:
    return [skipped.reason for skipped in result.against if skipped.what.startswith(what)]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages of this machine, as the checks see them."""
    found = {"onnxruntime": "1.27.0", "openvino": "2025.1.0"}
    monkeypatch.setattr(compatibility, "packages", lambda: found)
    return found


# The table


def test_the_table_runs_from_old_to_new_and_no_version_goes_back() -> None:
    assert list(CONTAINERS) == sorted(CONTAINERS)
    for name in containers.VERSIONS:
        known = [getattr(c, name) for c in CONTAINERS.values() if getattr(c, name) is not None]
        assert known == sorted(known, key=order), name
        assert known, name


@pytest.mark.parametrize("name", ["25.09", "tritonserver:25.09", "nvcr.io/nvidia/tritonserver:25.09-py3", " 25.09-py3"])
def test_a_container_is_found_by_tag_and_by_image(name: str) -> None:
    container = find_container(name)
    assert (container.tag, container.image) == ("25.09", "nvcr.io/nvidia/tritonserver:25.09-py3")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("25.13", "26.01"),
        ("23.01", "24.10"),
        ("tritonserver:2509", "25.09"),
        ("pytorch:25.09", "25.09"),
        ("latest", "26.10"),
    ],
)
def test_an_unknown_container_is_answered_with_the_near_one(name: str, near: str) -> None:
    with pytest.raises(UnknownName) as raised:
        find_container(name)
    assert f"tritonserver:{near}?" in raised.value.next_step


def test_versions_compare_by_number_and_an_alpha_comes_before_its_release() -> None:
    ascending = ["2.9.0a0", "2.9", "2.10.0a0+b558c986e8.nv25.11", "2.10.0", "2.10.1", "2.13.0+cpu", "2024.5"]
    assert all(order(a) < order(b) for a, b in itertools.pairwise(ascending))
    assert order("1.21") == order("1.21.0")


def test_an_unknown_version_is_at_least_that_of_the_container_before() -> None:
    found, origins = settled(CONTAINERS["25.07"])
    assert (found.torch, origins["torch"]) == (CONTAINERS["25.06"].torch, "tritonserver:25.06")
    assert found.onnxruntime == CONTAINERS["25.07"].onnxruntime
    assert "onnxruntime" not in origins
    assert settled(CONTAINERS["24.10"])[0].openvino is None


# What a model needs


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_opset_and_ir_version_are_read_from_an_onnx_file(tmp_path: Path, domain: str) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_file(opset=23, ir=11, domain=domain))
    assert compatibility.onnx_versions(tmp_path / "model.onnx") == (23, 11)


@pytest.mark.parametrize("content", [b"", b"weights" * 50, b"\x08\x0a"])
def test_what_is_no_onnx_file_is_not_known_to_load(tmp_path: Path, content: bytes) -> None:
    result = check(version(tmp_path, content), tmp_path, CONTAINERS["26.08"])
    assert against(result, "model.onnx") == [f"{NOT_KNOWN}: which ONNX Runtime it needs"]


@pytest.mark.parametrize(
    ("opset", "ir", "oldest"),
    [(20, 10, "24.10"), (22, 10, "25.03"), (23, 11, "25.08"), (20, 11, "25.08"), (25, 13, "26.02"), (26, 13, "26.07")],
)
def test_an_onnx_file_loads_from_the_container_whose_runtime_knows_its_opset(
    tmp_path: Path, opset: int, ir: int, oldest: str
) -> None:
    given = version(tmp_path, onnx_file(opset, ir))
    assert min(tag for tag, c in CONTAINERS.items() if check(given, tmp_path, c).loads) == oldest


def test_an_opset_newer_than_all_that_was_tried_is_not_known_to_load(tmp_path: Path) -> None:
    result = check(version(tmp_path, onnx_file(opset=99)), tmp_path, CONTAINERS["26.08"])
    assert against(result, "model.onnx (opset 99")[0].startswith(NOT_KNOWN)


def test_an_openvino_file_needs_the_release_of_its_newest_operation_set(tmp_path: Path) -> None:
    given = version(tmp_path, openvino_file(1, 16, 8), format="openvino", filename="model.xml")
    assert [(need.name, need.least) for need in needs(given, tmp_path)] == [("openvino", "2025.0")]
    assert against(check(given, tmp_path, CONTAINERS["24.12"]), "model.xml") == [
        "needs OpenVINO 2025.0 or later; there is 2024.4.0"
    ]
    # 25.04's is not told, but 25.03 had enough. 25.02's may be as old as 24.12's.
    assert check(given, tmp_path, CONTAINERS["25.04"]).loads
    assert against(check(given, tmp_path, CONTAINERS["25.02"]), "model.xml")[0].startswith(NOT_KNOWN)


@pytest.mark.parametrize(("content", "tag"), [(b"<net", "26.08"), (openvino_file(77), "26.08")])
def test_an_openvino_file_of_an_unknown_kind_is_not_known_to_load(tmp_path: Path, content: bytes, tag: str) -> None:
    given = version(tmp_path, content, format="openvino", filename="model.xml")
    assert against(check(given, tmp_path, CONTAINERS[tag]), "model.xml")[0].startswith(NOT_KNOWN)


def test_a_pt2_package_needs_torch_aoti_its_torch_and_its_glibc(tmp_path: Path) -> None:
    given = version(
        tmp_path,
        b"PK\3\4 .so: GLIBC_2.34\0GLIBC_2.2.5\0GLIBCXX_3.4.30\0",
        format="pt2",
        filename="model.pt2",
        input_names=("INPUT__0", "INPUT__1"),
        environment={"packages": {"torch": "2.12.0"}},
    )
    assert {(n.name, n.least) for n in needs(given, tmp_path)} == {
        ("torch", "2.12.0"),
        ("glibc", "2.34"),
        ("glibcxx", "3.4.30"),
    }
    assert against(check(given, tmp_path, CONTAINERS["26.02"]), "backend") == [
        "torch_aoti came with tritonserver:26.03"
    ]
    assert against(check(given, tmp_path, CONTAINERS["26.05"]), "model.pt2") == [
        "needs PyTorch 2.12.0 or later; there is 2.12.0a0, a snapshot from before that release"
    ]
    assert check(given, tmp_path, CONTAINERS["26.06"]).loads
    named = replace(given, input_names=("ARGS[0]", "KWARGS[mask]"), environment={"packages": {"torch": "2.11"}})
    assert against(check(named, tmp_path, CONTAINERS["26.04"]), "backend")
    assert check(named, tmp_path, CONTAINERS["26.05"]).loads


def test_torchscript_of_a_newer_torch_is_told_and_not_refused(tmp_path: Path) -> None:
    wrote = {"packages": {"torch": "2.13.0+cpu"}}
    given = version(tmp_path, b"pt", format="torchscript", filename="model.pt", environment=wrote)
    old, new = (check(given, tmp_path, CONTAINERS[tag]) for tag in ("25.09", "26.08"))
    assert old.loads
    assert Applied(what="backend", detail="pytorch") in new.decisions
    assert "2.9.0a0 is older than 2.13.0" in next(d.detail for d in old.decisions if d.what == "backend")  # type: ignore[union-attr]


# The contract of the kernel libraries


def with_contract(folder: Path, **least: str) -> Manifest:
    return replace(version(folder, onnx_file(), libraries=(ONNX,)), contract={ONNX: least})


def test_a_kernel_library_is_held_to_its_contract(tmp_path: Path) -> None:
    given = with_contract(tmp_path, onnxruntime="1.21", glibc="2.34", glibcxx="3.4.29")
    old, new = (check(given, tmp_path, CONTAINERS[tag]) for tag in ("25.02", "25.03"))
    assert old.against == (Skipped(what=ONNX, reason="needs ONNX Runtime 1.21 or later; there is 1.20.1"),)
    assert new.loads
    assert Applied(what=ONNX, detail="glibc 2.34 or later: 2.39") in new.decisions


def test_a_library_for_torch_does_not_take_a_snapshot_for_the_release(tmp_path: Path) -> None:
    given = version(tmp_path, b"pt", format="torchscript", filename="model.pt", libraries=(TORCH,))
    given = replace(given, contract={TORCH: {"torch": "2.10"}})
    assert against(check(given, tmp_path, CONTAINERS["26.01"]), TORCH) == [
        "needs PyTorch 2.10 or later; there is 2.10.0a0, a snapshot from before that release"
    ]
    assert check(given, tmp_path, CONTAINERS["26.02"]).loads


@pytest.mark.parametrize(("name", "least"), [("glibc", "2.40"), ("glibcxx", "3.4.34"), ("cuda", "14.0")])
def test_a_system_that_is_too_old_for_a_library_is_refused(tmp_path: Path, name: str, least: str) -> None:
    result = check(with_contract(tmp_path, **{name: least}), tmp_path, CONTAINERS["26.08"])
    assert f"{least} or later; there is {getattr(CONTAINERS['26.08'], name)}" in against(result, ONNX)[0]


def test_what_only_a_gpu_has_is_told_and_not_refused(tmp_path: Path) -> None:
    result = check(with_contract(tmp_path, cuda_arch="8.0"), tmp_path, CONTAINERS["26.08"])
    assert Applied(what=ONNX, detail="asks the GPU for cuda_arch 8.0") in result.decisions
    assert result.loads


def test_a_driver_is_held_to_what_the_container_asks_of_its_host(tmp_path: Path) -> None:
    assert check(with_contract(tmp_path, driver="570"), tmp_path, CONTAINERS["26.04"]).loads
    assert against(check(with_contract(tmp_path, driver="580"), tmp_path, CONTAINERS["26.04"]), ONNX)
    unknown = against(check(with_contract(tmp_path, driver="580"), tmp_path, CONTAINERS["26.05"]), ONNX)
    assert unknown[0].startswith(NOT_KNOWN)


@pytest.mark.parametrize("break_it", ["missing", "changed", "unlisted"])
def test_a_kernel_library_must_be_the_one_of_the_manifest(tmp_path: Path, break_it: str) -> None:
    given = with_contract(tmp_path, onnxruntime="1.21")
    if break_it == "missing":
        (tmp_path / ONNX).unlink()
    elif break_it == "changed":
        (tmp_path / ONNX).write_bytes(b"another build")
    else:
        given = replace(given, files={name: digest for name, digest in given.files.items() if name != ONNX})
    assert ONNX in against(check(given, tmp_path, CONTAINERS["26.08"]), "files")[0]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("/models/tiny/7/libkpdeploy_onnx.so", None),
        ("/repo/tiny/7/libkpdeploy_onnx.so", "no file of this version"),
        ("/models/tiny/6/libkpdeploy_onnx.so", "no file of this version"),
        ("libkpdeploy_onnx.so", "no file of this version"),
        (None, "does not name /models/tiny/7/libkpdeploy_onnx.so"),
    ],
)
def test_op_library_filename_must_be_the_place_below_the_mount(
    tmp_path: Path, installed: dict[str, str], written: str | None, reason: str | None
) -> None:
    given = replace(with_contract(tmp_path, onnxruntime="1.21"), version=7)
    named = f'op_library_filename: "{written}"' if written else ""
    config = read_config(f"model_operations {{ {named} }}", where="here")
    result = check(given, tmp_path, CONTAINERS["26.08"], config)
    found = against(result, "op_library_filename")
    assert (reason is None) == (not found)
    assert all(reason in "; ".join(found) for reason in filter(None, [reason]))
    # Where kpdeploy serves the repository itself, it opens the library by its own path.
    assert check(given, tmp_path, compatibility.here(), config).loads


def test_here_a_runtime_that_is_not_installed_is_told(tmp_path: Path, installed: dict[str, str]) -> None:
    given = version(tmp_path, openvino_file(8), format="openvino", filename="model.xml")
    assert check(given, tmp_path, compatibility.here()).loads
    del installed["openvino"]
    result = check(given, tmp_path, compatibility.here())
    assert against(result, "backend") == ["OpenVINO is not installed here"]


def test_this_machine_knows_its_own_c_libraries() -> None:
    here = compatibility.here()
    assert here.glibc is not None
    assert here.glibcxx is not None
    assert order(here.glibc) > order("2.30")
    assert order("3.4.20") < order(here.glibcxx) < order("3.5")


def test_the_newest_container_that_loads_a_model_is_chosen(tmp_path: Path) -> None:
    known = [tag for tag, c in CONTAINERS.items() if c.onnxruntime and c.torch]
    assert newest(version(tmp_path, onnx_file()), tmp_path).tag == known[-1]
    unloadable = with_contract(tmp_path, onnxruntime="99.0")
    assert newest(unloadable, tmp_path).tag == known[-1]


# kpdeploy doctor REPO


def published(tmp_path: Path) -> Path:
    files = write_files(tmp_path / "files", weights=onnx_file())
    publish(str(tmp_path / "models"), manifest(), files)
    publish(str(tmp_path / "models"), manifest("newer"), write_files(files, weights=onnx_file(opset=26, ir=13)))
    return tmp_path / "models"


def test_doctor_says_of_each_model_whether_it_would_load(tmp_path: Path, installed: dict[str, str]) -> None:
    repo = str(published(tmp_path))
    done = CliRunner().invoke(command, [repo, "--container", "tritonserver:25.09", "--json"])
    assert done.exit_code == WouldNotLoad.exit_code
    told = json.loads(done.stdout)
    assert (told["loads"], told["container"]["onnxruntime"]) == (False, "1.23.0")
    assert {m["model"]: m["loads"] for m in told["models"]} == {"tiny": True, "newer": False}
    assert {c["kind"] for m in told["models"] for c in m["checks"]} == {"applied", "skipped"}
    assert CliRunner().invoke(command, [repo, "--container", "26.08", "--json"]).exit_code == 0
    assert CliRunner().invoke(command, [repo, "--json"]).exit_code == 0
    installed["onnxruntime"] = "1.26.0"
    assert CliRunner().invoke(command, [repo, "--json"]).exit_code == WouldNotLoad.exit_code


def test_doctor_shows_people_the_same_and_raises_what_it_found(tmp_path: Path) -> None:
    repo = str(published(tmp_path))
    done = CliRunner().invoke(command, [repo, "--container", "25.09"])
    assert isinstance(done.exception, WouldNotLoad)
    assert "1 of 2 models would not load in tritonserver:25.09" in str(done.exception)
    assert "ONNX Runtime 1.27 or later; there is 1.23.0" in str(done.exception)
    done = CliRunner().invoke(command, [repo, "--container", "26.08"])
    assert done.exit_code == 0
    assert done.stderr.strip().endswith(f"bash {repo}/newer/1/launch.sh")


def test_doctor_needs_a_repository_to_check_a_container() -> None:
    done = CliRunner().invoke(command, ["--container", "25.09"])
    assert done.exit_code == 2
    assert "needs REPO" in done.stderr


# launch.sh


def launch(repo: Path, model: str, number: int, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launch.sh with a `docker` that prints its arguments, a line each."""
    docker = repo.parent / "docker"
    docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    docker.chmod(0o755)
    script = repo / model / str(number) / "launch.sh"
    environment = {"PATH": "/usr/bin:/bin", "DOCKER": str(docker), **environment}
    return subprocess.run([script, *options], env=environment, cwd="/", capture_output=True, text=True)


def test_launch_sh_serves_its_model_from_the_repository_it_is_in(tmp_path: Path) -> None:
    repo = tmp_path / "with space" / "models"
    shutil.copytree(published(tmp_path), repo)
    done = launch(repo, "tiny", 1, "--log-verbose=1", HTTP_PORT="18000")
    arguments = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert arguments[0] == "run"
    assert f"type=bind,source={repo},target=/models,readonly" in arguments
    assert [a for a in arguments if a.startswith("127.")] == [
        "127.0.0.1:18000:8000",
        "127.0.0.1:8001:8001",
        "127.0.0.1:8002:8002",
    ]
    assert arguments[-6:] == [
        "nvcr.io/nvidia/tritonserver:26.08-py3",
        "tritonserver",
        "--model-repository=/models",
        "--model-control-mode=explicit",
        "--load-model=tiny",
        "--log-verbose=1",
    ]


def test_image_and_repository_can_be_others(tmp_path: Path) -> None:
    repo = published(tmp_path)
    shutil.copytree(repo, tmp_path / "other")
    done = launch(repo, "tiny", 1, TRITON_IMAGE="mine:1", REPO=str(tmp_path / "other"))
    assert "mine:1" in done.stdout.splitlines()
    assert f"type=bind,source={tmp_path / 'other'},target=/models,readonly" in done.stdout


def test_the_launch_sh_of_a_version_that_is_not_served_refuses(tmp_path: Path) -> None:
    repo = published(tmp_path)
    publish(str(repo), manifest(), tmp_path / "files")
    assert launch(repo, "tiny", 2).returncode == 0
    done = launch(repo, "tiny", 1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not name version 1" in done.stderr


def test_a_kernel_library_for_torch_is_preloaded_by_the_server_alone(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files", filename="model.pt")
    (files / TORCH).write_bytes(b"\x7fELF")
    fused = manifest(format="torchscript", filename="model.pt", settings={"op_libraries": [TORCH]}, mount="/srv/m")
    repo = tmp_path / "models"
    publish(str(repo), fused, files)
    arguments = launch(repo, "tiny", 1).stdout.splitlines()
    start = arguments.index("bash")
    # What docker was given runs here, with a `tritonserver` that prints what it was given.
    server = tmp_path / "bin" / "tritonserver"
    server.parent.mkdir()
    server.write_text('#!/usr/bin/env -S LD_PRELOAD= bash\nprintf \'%s\\n\' "$LD_LIBRARY_PATH" "$@"\n')
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$LD_PRELOAD" "$LD_LIBRARY_PATH" "$@"\n')
    server.chmod(0o755)
    environment = {"PATH": f"{server.parent}:/usr/bin:/bin", "LD_LIBRARY_PATH": "/of/the/image"}
    done = subprocess.run(arguments[start:], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "/srv/m/tiny/1/libkpdeploy_torch.so",
        "/opt/tritonserver/backends/pytorch:/of/the/image",
        "--model-repository=/srv/m",
        "--model-control-mode=explicit",
        "--load-model=tiny",
    ]


@pytest.mark.parametrize("libraries", [(), (TORCH,)])
def test_launch_sh_is_sound_bash_without_a_path_of_this_machine(tmp_path: Path, libraries: tuple[str, ...]) -> None:
    given = replace(manifest("it's a model"), version=3, mount="/a mount", settings={"op_libraries": list(libraries)})
    script = tmp_path / "launch.sh"
    script.write_text(launch_script(given, "image:1"))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert str(Path.home()) not in script.read_text()
    assert str(Path(__file__).parents[2]) not in script.read_text()
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_launch_sh_is_among_the_proven_files(tmp_path: Path) -> None:
    deployment = find_deployment(str(published(tmp_path)), "tiny")
    folder = Path(deployment.folder)
    assert "launch.sh" in deployment.manifest.files
    deployment.manifest.check_files(folder)
    assert (folder / "launch.sh").stat().st_mode & 0o111
    (folder / "launch.sh").write_text("#!/bin/sh\n")
    assert against(check(deployment.manifest, folder, CONTAINERS["26.08"]), "files")
