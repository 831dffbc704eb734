"""Artifacts with fused ops where they will live: in processes that have the kernels' library and no kpdeploy."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import kpdeploy
from kpdeploy.artifact import Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import relative_error
from kpdeploy.decision import Applied, Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.export import FORMATS as EXPORTED
from kpdeploy.ops import libraries
from kpdeploy.runtimes import source
from kpdeploy.serving.triton.config import read_config

if any(isinstance(libraries.find(name), Skipped) for name in (libraries.ONNX, libraries.TORCH)):
    pytest.skip("the kernels are not built here: fused artifacts were not run", allow_module_level=True)

CPP = Path(__file__).with_name("cpp")
FORMATS = ("onnx", "torchscript", "pt2")
INPUTS = ("input_ids:int64[batch=1..4,seq=1..48]{0..98}", "attention_mask:int64[batch,seq]{mask}")
FUSED = {"attention": 2, "linear_activation": 2, "add_layer_norm": 4, "linear": 6}


class Encoder(torch.nn.Module):
    """A small BERT's last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
        self.bert = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def fused(format: str) -> dict[str, int]:
    """The ops in a format's artifact: AOTInductor keeps the linears for itself, ONNX Runtime the small ones, as all of
    this model's are that have no activation."""
    left = {name.removeprefix("small_") for name in EXPORTED[format].leaves}
    return {name: count for name, count in FUSED.items() if name not in left}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("models")
    for format in FORMATS:
        report = kpdeploy.export(
            Encoder(), repo=repo, format=format, name=format, input=INPUTS, fuse="always", mount="/srv/models"
        )
        assert report.chosen.fused
    return repo


def golden(folder: Path) -> Exchange:
    return max(Baseline.read(folder).exchanges, key=lambda e: e.inputs["input_ids"].size)


@pytest.mark.parametrize("format", FORMATS)
def test_the_version_holds_its_library_and_says_what_that_needs(format: str, repo: Path) -> None:
    manifest = Manifest.read(repo / format / "1")
    name = libraries.ONNX if format == "onnx" else libraries.TORCH
    assert manifest.settings["op_libraries"] == [name]
    assert name in manifest.files
    manifest.check_files(repo / format / "1")
    assert {"glibc", "glibcxx", "onnxruntime" if format == "onnx" else "torch"} == set(manifest.contract[name])
    assert {d.what for d in manifest.decisions if isinstance(d, Applied)} >= {
        f"fused {n} {op}" for op, n in fused(format).items()
    }
    config = read_config((repo / format / "config.pbtxt").read_text(), where=format)
    named = [f"/srv/models/onnx/1/{name}"] if format == "onnx" else []
    assert list(config.model_operations.op_library_filename) == named


def test_the_pt2_calls_exactly_these_ops(repo: Path) -> None:
    with zipfile.ZipFile(repo / "pt2" / "1" / "model.pt2") as package:
        (calls,) = [package.read(n).decode() for n in package.namelist() if n.endswith(".wrapper.json")]
    targets = [node["node"]["target"] for node in json.loads(calls)["nodes"]]
    found = [re.sub(r"^.*kpdeploy[.:]+(\w+).*$", r"\1", target) for target in targets if "kpdeploy" in target]
    assert {name: found.count(name) for name in set(found)} == fused("pt2")


ALONE = """
import importlib.util, json, sys
import numpy as np

class NoKpdeploy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kpdeploy":
            raise ImportError("kpdeploy is not here")

sys.meta_path.insert(0, NoKpdeploy())
runtime, model, inputs, libraries = sys.argv[1:]
spec = importlib.util.spec_from_file_location("runtime", runtime)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
arrays = np.load(inputs)
names = ["input_ids", "attention_mask"]
run = module.load(model, inputs=names, outputs=["output"], settings={"op_libraries": json.loads(libraries)})
np.save("out.npy", run([arrays[n] for n in names])[0])
assert "kpdeploy" not in sys.modules
"""


def run_alone(folder: Path, format: str, where: Path, library: bool) -> subprocess.CompletedProcess[str]:
    """The artifact, copied elsewhere, in a process that can import nothing of kpdeploy."""
    manifest = Manifest.read(folder)
    for name in (manifest.filename, *(manifest.settings["op_libraries"] if library else ())):
        shutil.copyfile(folder / name, where / name)
    shutil.copyfile(source(format), where / "runtime.py")
    np.savez(where / "in.npz", **golden(folder).inputs)
    names = [str(where / name) for name in manifest.settings["op_libraries"]] if library else []
    words = [sys.executable, "-c", ALONE, "runtime.py", manifest.filename, "in.npz", json.dumps(names)]
    return subprocess.run(words, cwd=where, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("format", FORMATS)
def test_it_gives_the_models_answers_where_only_its_library_is(format: str, repo: Path, tmp_path: Path) -> None:
    done = run_alone(repo / format / "1", format, tmp_path, library=True)
    assert done.returncode == 0, done.stderr
    (expected,) = golden(repo / format / "1").outputs.values()
    assert relative_error(np.load(tmp_path / "out.npy"), expected) <= 1e-5


def test_without_its_library_an_onnx_file_gives_the_same_answers(repo: Path, tmp_path: Path) -> None:
    done = run_alone(repo / "onnx" / "1", "onnx", tmp_path, library=False)
    assert done.returncode == 0, done.stderr
    (expected,) = golden(repo / "onnx" / "1").outputs.values()
    assert relative_error(np.load(tmp_path / "out.npy"), expected) <= 1e-5


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_without_their_library_the_others_name_the_file_to_load(format: str, repo: Path, tmp_path: Path) -> None:
    done = run_alone(repo / format / "1", format, tmp_path, library=False)
    assert done.returncode == 1
    assert "are in libkpdeploy_torch.so: load that first" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles a C++ program against an installed runtime, once."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the C++ programs were not run")
    folder = tmp_path_factory.mktemp("cpp")

    def compiled(name: str) -> Path:
        if not (folder / name).exists():
            subprocess.run(
                ["g++", "-std=c++17", str(CPP / f"{name}.cpp"), "-o", name, *flags(name, folder)],
                cwd=folder,
                check=True,
            )
        return folder / name

    return compiled


def flags(name: str, folder: Path) -> list[str]:
    if name == "onnx_run":
        spec = importlib.util.find_spec("onnxruntime")
        assert spec is not None
        assert spec.origin is not None
        capi = Path(spec.origin).parent / "capi"
        (library,) = capi.glob("libonnxruntime.so.*")
        # The wheel holds it without the name that it asks to be found by.
        (folder / "libonnxruntime.so.1").symlink_to(library)
        headers = CPP.parents[2] / "csrc" / "third_party" / "onnxruntime"
        return [f"-I{headers}", str(library), f"-Wl,-rpath,{folder}"]
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    linked = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return [*include, f"-L{root / 'lib'}", *linked, f"-Wl,-rpath,{root / 'lib'}", "-ldl"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_cpp_program_with_the_runtime_and_the_library_gives_the_models_answers(
    format: str, repo: Path, tmp_path: Path, program: Callable[[str], Path]
) -> None:
    folder = repo / format / "1"
    manifest, exchange = Manifest.read(folder), golden(folder)
    for name in ("input_ids", "attention_mask"):
        (tmp_path / name).write_bytes(exchange.inputs[name].tobytes())
    (expected,) = exchange.outputs.values()
    rows, length = exchange.inputs["input_ids"].shape
    run = program("onnx_run" if format == "onnx" else "torch_run")
    tail = [str(folder / manifest.filename), "out", str(rows), str(length), "input_ids", "attention_mask"]
    library = str(folder / manifest.settings["op_libraries"][0])
    subprocess.run([str(run), library, *tail], cwd=tmp_path, check=True, timeout=120)
    answer = np.fromfile(tmp_path / "out", np.float32).reshape(expected.shape)
    assert relative_error(answer, expected) <= 1e-5
    bare = subprocess.run(
        [str(run), "-", *tail], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert bare.returncode == (0 if format == "onnx" else 1)
    assert format == "onnx" or "kpdeploy::" in bare.stderr


def test_never_leaves_the_model_as_it_is_and_always_must_find_something(tmp_path: Path) -> None:
    report = kpdeploy.export(Encoder(), repo=tmp_path, format="torchscript", name="plain", input=INPUTS, fuse="never")
    assert not any(c.fused for c in report.candidates)
    assert not (tmp_path / "plain" / "1" / libraries.TORCH).exists()
    with pytest.raises(ExportFailed, match="nothing of linear can be fused"):
        kpdeploy.export(
            torch.nn.Linear(4, 4), repo=tmp_path, format="onnx", input=("x:float32[batch=1..4,4]",), fuse="always"
        )
    assert not (tmp_path / "linear").exists()
