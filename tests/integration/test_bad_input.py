"""Bad input of every kind: one clear message, the exit code of its kind, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kpdeploy.artifact import MANIFEST, Manifest
from kpdeploy.serving.repository import read_repository

FACTORIES = """
import torch
from torch import nn

def lin(): return nn.Linear(4, 3), torch.randn(2, 4)
def wide(): return nn.Linear(1000, 1000), torch.randn(2, 1000)
def bare(): return nn.Linear(4, 3)
def raises(): raise RuntimeError("no weights on this machine")
def integer(): return 5
def text_inputs(): return nn.Linear(4, 3), "inputs"

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)
    def forward(self, ids): return self.table(ids)
def words(): return Words()

class NoTensor(nn.Module):
    def forward(self, x): return "no tensor"
def no_tensor(): return NoTensor(), torch.randn(2, 4)

class Nan(nn.Module):
    def forward(self, x): return (-1 - x.abs()).log()
def nan(): return Nan(), torch.randn(2, 4)

class Noise(nn.Module):
    def forward(self, x): return nn.functional.dropout(x, 0.5, training=True)
def noise(): return Noise(), torch.randn(2, 4)

class One(nn.Module):
    def forward(self, x):
        if x.shape[0] != 1: raise ValueError("one request at a time")
        return x * 2
def one(): return One(), torch.randn(1, 4)

class Branch(nn.Module):
    def forward(self, x): return x if x.sum() > 0 else -x
def branch(): return Branch(), torch.randn(2, 4)
"""

LIN = ["export", "fac:lin"]
BARE = ["export", "fac:bare"]
WORDS = ["export", "fac:words"]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A command line, run in the folder of files below, and what must come of it: exit code, words of the message."""

    name: str
    run: list[str]
    code: int
    says: list[str]
    path: str | None = None
    """PATH, where it is not the usual one."""
    without: str = ""
    """A package that cannot be imported."""
    settings: dict[str, str] = field(default_factory=dict)


CASES = [
    # The command line itself
    Bad(name="no such command", run=["exprot", "minilm"], code=2, says=["exprot", "'export'"]),
    Bad(name="no such option", run=[*LIN, "--formt", "onnx"], code=2, says=["--formt", "--format"]),
    Bad(name="no MODEL", run=["export"], code=2, says=["MODEL"]),
    Bad(name="unknown target", run=[*LIN, "--target", "trition"], code=3, says=["'trition'", "'triton'"]),
    Bad(name="unknown format", run=[*LIN, "--format", "onxx"], code=3, says=["'onxx'", "'onnx'", "openvino"]),
    Bad(name="bad tolerance", run=[*LIN, "--tolerance", "float32=tiny"], code=2, says=["float32=tiny", "1e-4"]),
    Bad(name="negative tolerance", run=[*LIN, "--tolerance", "float32=-1"], code=2, says=["float32=-1", "1e-4"]),
    Bad(name="NaN as tolerance", run=[*LIN, "--tolerance", "float32=nan"], code=2, says=["float32=nan", "1e-4"]),
    Bad(name="tolerance of no dtype", run=[*LIN, "--tolerance", "f32=1e-4"], code=3, says=["'f32'", "float32"]),
    Bad(name="batch of none", run=[*LIN, "--max-batch", "0"], code=2, says=["--max-batch", "0"]),
    # MODEL
    Bad(name="no such model", run=["export", "minilmm"], code=10, says=["'minilmm'", "did you mean 'minilm'"]),
    Bad(name="endless name", run=["export", "m" * 5000], code=10, says=["there is no model"]),
    Bad(name="no such file", run=["export", "god.onnx"], code=10, says=["god.onnx", "did you mean 'good.onnx'"]),
    Bad(name="no such folder", run=["export", "gone/m.onnx"], code=10, says=["there is no folder gone"]),
    Bad(name="file of unknown kind", run=["export", "fac.py"], code=10, says=["unknown kind", ".onnx"]),
    Bad(name="broken ONNX", run=["export", "broken.onnx"], code=11, says=["broken.onnx", "ONNX model"]),
    Bad(name="empty ONNX", run=["export", "empty.onnx"], code=11, says=["empty.onnx"]),
    Bad(name="corrupt .pt2", run=["export", "corrupt.pt2"], code=11, says=["corrupt.pt2", "whole"]),
    Bad(name="corrupt .pt", run=["export", "corrupt.pt"], code=11, says=["corrupt.pt", "whole"]),
    Bad(name="text as .pt", run=["export", "text.pt"], code=11, says=["text.pt"]),
    Bad(name="compiled .pt2", run=["export", "compiled.pt2"], code=11, says=["AOTInductor", "exported program"]),
    Bad(name="state dict as .pt", run=["export", "state.pt"], code=12, says=["pickle", "factory"]),
    Bad(name="unknown transformer", run=["export", "transformers:brt"], code=3, says=["'brt'", "did you mean 'b"]),
    # A Hugging Face folder
    Bad(name="folder without config", run=["export", "no-config"], code=10, says=["config.json"]),
    Bad(name="folder without weights", run=["export", "no-weights"], code=10, says=["*.safetensors"]),
    Bad(name="folder of pickles", run=["export", "pickles"], code=12, says=["pytorch_model.bin", "pickle"]),
    Bad(name="truncated weights", run=["export", "truncated"], code=11, says=["truncated", "safetensors"]),
    Bad(name="config that is no JSON", run=["export", "broken-config"], code=11, says=["config.json"]),
    Bad(name="weights of another model", run=["export", "other-weights"], code=11, says=["weights", "belong together"]),
    Bad(name="unknown architecture", run=["export", "unknown-arch"], code=15, says=["--task", "feature-extraction"]),
    Bad(name="unknown task", run=["export", "whole", "--task", "fil-mask"], code=3, says=["'fil-mask'", "'fill-mask'"]),
    # A factory
    Bad(name="no such module", run=["export", "fca:lin"], code=10, says=["'fca'", "folder"]),
    Bad(name="no such factory", run=["export", "fac:lim"], code=10, says=["fac", "did you mean 'lin'"]),
    Bad(name="import that raises", run=["export", "raising:make"], code=13, says=["raising", "KeyError", "SECRET"]),
    Bad(name="import that exits", run=["export", "exiting:make"], code=13, says=["exiting", "SystemExit"]),
    Bad(name="syntax error", run=["export", "syntax:make"], code=13, says=["syntax", "SyntaxError"]),
    Bad(name="missing dependency", run=["export", "needy:make"], code=13, says=["needy", "nosuchpackage"]),
    Bad(name="factory that raises", run=["export", "fac:raises"], code=13, says=["RuntimeError", "no weights on this"]),
    Bad(name="factory gives an int", run=["export", "fac:integer"], code=14, says=["returned a int", "nn.Module"]),
    Bad(name="inputs are text", run=["export", "fac:text_inputs"], code=14, says=["example inputs", "tensor"]),
    Bad(name="name of nothing", run=["export", "fac:Bad"], code=10, says=["fac has no 'Bad'"]),
    # Its inputs
    Bad(name="no inputs known", run=BARE, code=20, says=["inputs", '--input "input:float32[batch=1..8', "--example"]),
    Bad(name="no inputs of TorchScript", run=["export", "good.pt"], code=20, says=["--input", "--example"]),
    Bad(name="unreadable --input", run=[*BARE, "--input", "input float32"], code=21, says=["name:dtype[dims]"]),
    Bad(name="unknown dtype", run=[*BARE, "--input", "input:float23[2,4]"], code=21, says=["'float23'", "float32"]),
    Bad(name="empty range", run=[*BARE, "--input", "input:float32[batch=8..2,4]"], code=21, says=["batch", "8..2"]),
    Bad(name="axis without range", run=[*BARE, "--input", "input:float32[batch,4]"], code=21,
        says=["'batch'", "range"]),
    Bad(name="empty values", run=[*WORDS, "--input", "ids:int64[2,4]{9..1}"], code=21, says=["{9..1}", "empty"]),
    Bad(name="one name twice", run=[*BARE, *(["--input", "input:float32[2,4]"] * 2)], code=22,
        says=["one name: input"]),
    Bad(name="wrong name", run=[*BARE, "--input", "x:float32[2,4]", "--input", "y:float32[2,4]"], code=22,
        says=["x, y", "forward() takes (input"]),
    Bad(name="floats for ids", run=[*WORDS, "--input", "ids:float32[batch=1..8,4]"], code=23,
        says=["ids:float32", "Expected tensor", "--input"]),
    Bad(name="values beyond the table", run=[*WORDS, "--input", "ids:int64[batch=1..8,4]{0..99}"], code=23,
        says=["index out of range", "--input"]),
    Bad(name="wrong rank", run=[*BARE, "--input", "input:float32[batch=1..8,3,5]"], code=23,
        says=["input:float32[", "5"]),
    Bad(name="no such example", run=[*BARE, "--example", "gone.npz"], code=22, says=["gone.npz", "numpy.savez"]),
    Bad(name="example that is no .npz", run=[*BARE, "--example", "text.npz"], code=22,
        says=["text.npz", "numpy.savez"]),
    Bad(name="example of one array", run=[*BARE, "--example", "one.npy"], code=22, says=["one.npy", "numpy.savez"]),
    Bad(name="example of wrong names", run=["export", "good.onnx", "--example", "names.npz"], code=22,
        says=["names.npz holds y", "takes x"]),
    Bad(name="example of strings", run=[*BARE, "--example", "strings.npz"], code=22, says=["strings.npz", "float32"]),
    Bad(name="wrong name for a graph", run=["export", "good.onnx", "--input", "y:float32[2,4]"], code=22,
        says=["takes x", "names y"]),
    # What the model answers
    Bad(name="no tensor", run=["export", "fac:no_tensor"], code=24, says=["no tensor", "return a tensor"]),
    Bad(name="NaN", run=["export", "fac:nan"], code=24, says=["output", "NaN"]),
    Bad(name="random answers", run=["export", "fac:noise"], code=24, says=["call to call", "deterministic"]),
    Bad(name="branches on values", run=["export", "fac:branch"], code=30, says=["branch", "control flow"]),
    # Formats
    Bad(name="format that MODEL excludes", run=["export", "good.onnx", "--format", "torchscript"], code=32,
        says=["given as onnx", "factory"]),
    Bad(name="no openvino", run=[*LIN, "--format", "openvino"], without="openvino", code=16,
        says=["pip install openvino"]),
    Bad(name="no compiler", run=[*LIN, "--format", "pt2"], path="/nowhere", code=16, says=["g++", "apt install g++"]),
    # The repository
    Bad(name="repository in a file", run=[*LIN, "--repo", "text.pt/models"], code=40, says=["text.pt", "not a folder"]),
    Bad(name="repository in /proc", run=[*LIN, "--repo", "/proc/models", "--format", "onnx"], code=40,
        says=["/proc/models", "--repo"]),
    Bad(name="URL of no kind", run=[*LIN, "--repo", "nosuch://b/m", "--format", "onnx"], code=42, says=["nosuch"]),
    Bad(name="someone else's folder", run=[*LIN, "--repo", "foreign"], code=42, says=["foreign/lin", "--name"]),
    Bad(name="serve nothing", run=["serve", "gone"], code=42, says=["gone", "kpdeploy export"]),
    Bad(name="serve an empty folder", run=["serve", "empty"], code=42, says=["empty", "kpdeploy export"]),
    Bad(name="check nothing", run=["doctor", "gone", "--container", "25.09"], code=42,
        says=["gone", "kpdeploy export"]),
    Bad(name="no such container", run=["doctor", "gone", "--container", "25.13"], code=3,
        says=["25.13", "did you mean tritonserver:26.01?"]),
    Bad(name="container of nothing", run=["doctor", "--container", "25.09"], code=2, says=["--container needs REPO"]),
    Bad(name="verify nothing", run=["verify", "gone"], code=42, says=["gone", "kpdeploy export"]),
    Bad(name="bench of no server", run=["bench", "localhost:1", "--model", "m"], code=60, says=["localhost:1"]),
    Bad(name="bench of no mode", run=["bench", "localhost:1", "--model", "m", "--mode", "opne"], code=3,
        says=["opne", "open"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for every case, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "fac.py").write_text(FACTORIES)
    (folder / "raising.py").write_text("import os\nos.environ['SECRET']\n")
    (folder / "exiting.py").write_text("raise SystemExit(3)\n")
    (folder / "syntax.py").write_text("def make(:\n")
    (folder / "needy.py").write_text("import nosuchpackage\n")
    (folder / "text.pt").write_text("not a model\n")
    (folder / "text.npz").write_text("not an array\n")
    (folder / "broken.onnx").write_bytes(b"\x08\x07garbage" * 9)
    (folder / "empty.onnx").touch()
    np.save(folder / "one.npy", np.zeros((2, 4), "float32"))
    np.savez(folder / "names.npz", y=np.zeros((2, 4), "float32"))
    np.savez(folder / "strings.npz", input=np.array(["a", "b"]))
    (folder / "empty").mkdir()
    (folder / "foreign" / "lin").mkdir(parents=True)
    (folder / "foreign" / "lin" / "config.pbtxt").write_text('name: "lin"\n')
    _write_models(folder)
    _write_huggingface(folder)
    return folder


def _write_models(folder: Path) -> None:
    import onnx
    import torch
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(folder / "good.onnx"))
    torch.save({"weight": torch.zeros(3)}, folder / "state.pt")
    torch.jit.script(torch.nn.Linear(4, 3)).save(str(folder / "good.pt"))
    (folder / "corrupt.pt").write_bytes((folder / "good.pt").read_bytes()[:-300])
    program = torch.export.export(torch.nn.Linear(4, 3), (torch.randn(2, 4),))
    torch.export.save(program, folder / "good.pt2")
    (folder / "corrupt.pt2").write_bytes((folder / "good.pt2").read_bytes()[:-300])
    with zipfile.ZipFile(folder / "compiled.pt2", "w") as archive:
        archive.writestr("c/archive_format", "pt2")
        archive.writestr("c/data/aotinductor/model/wrapper.so", b"\x7fELF")


def _write_huggingface(folder: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(folder / "whole")
    names = ("no-weights", "pickles", "truncated", "broken-config", "other-weights", "unknown-arch", "remote")
    for name in names:
        shutil.copytree(folder / "whole", folder / name)
    (folder / "no-config").mkdir()
    for name in ("no-weights", "pickles"):
        (folder / name / "model.safetensors").unlink()
    (folder / "pickles" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "broken-config" / "config.json").write_text("{")
    save_file({"w": torch.zeros(2)}, folder / "other-weights" / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "whole" / "config.json").read_text())
    (folder / "unknown-arch" / "config.json").write_text(json.dumps({**told, "architectures": ["NobodyKnowsModel"]}))
    own = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    told |= {"architectures": ["EvilModel"], "model_type": "evil", "auto_map": own}
    (folder / "remote" / "config.json").write_text(json.dumps(told))


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where a case runs: `files` as the current folder, a repository and a temporary folder of its own."""

    files: Path
    repo: Path
    temp: Path

    def start(self, *words: str, without: str = "", path: str | None = None) -> subprocess.Popen[str]:
        words = (*words, "--repo", str(self.repo)) if words[:1] == ("export",) and "--repo" not in words else words
        env = {**os.environ, "TMPDIR": str(self.temp), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        if path is not None:
            env["PATH"] = path
        start = ["-m", "kpdeploy"] if not without else ["-c", BLOCKED.format(package=without)]
        command = [sys.executable, *start, *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.files, env=env, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True
        )

    def run(self, *words: str, without: str = "", path: str | None = None) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, without=without, path=path)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def leftovers(self) -> list[Path]:
        """Whatever is in the temporary folder, or in an unpublished repository."""
        return [*in_temporary(self.temp), *self.repo.parent.glob(f"{self.repo.name}*"), *self.repo.parent.glob(".*")]


def in_temporary(folder: Path) -> list[Path]:
    """What a run left; torch's own cache, which it keeps on purpose, is not counted."""
    return [path for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{package}":
            raise ModuleNotFoundError("No module named '{package}'", name="{package}")
sys.meta_path.insert(0, Blocker())
from kpdeploy.cli import main
main()
"""


@pytest.fixture
def space(files: Path, tmp_path: Path) -> Space:
    (tmp_path / "temp").mkdir()
    (tmp_path / "where").mkdir()
    return Space(files=files, repo=tmp_path / "where" / "models", temp=tmp_path / "temp")


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


STEP = re.compile(
    r"(loading|capturing|taking|fusing|exporting|proving|measuring|planning|publishing|checking|connecting) .*"
)


def assert_one_clear_message(result: subprocess.CompletedProcess[str], code: int, says: list[str]) -> None:
    said = result.stderr
    assert result.returncode == code, said
    assert "Traceback" not in result.stdout + said
    assert result.stdout == ""
    if code == 2:  # click's own: usage, and one line
        assert said.startswith("Usage:")
        assert sum(line.startswith("Error:") for line in said.splitlines()) == 1
    else:
        lines = [line for line in said.splitlines() if not STEP.fullmatch(line)]
        # Nothing but the message: no warning of any library.
        assert lines[0].startswith("error: "), said
        assert all(line.startswith((" ", "error: ")) for line in lines), said
        assert sum(line.startswith("error:") for line in lines) == 1
        assert any(line.startswith(" next: ") for line in lines), said
    for words in says:
        assert words in said


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gives_one_message_and_leaves_nothing(case: Bad, space: Space) -> None:
    before = listing(space.files)
    result = space.run(*case.run, without=case.without, path=case.path)
    assert_one_clear_message(result, case.code, case.says)
    assert space.leftovers() == []
    assert listing(space.files) == before


def test_the_cases_show_most_exit_codes() -> None:
    assert len({case.code for case in CASES}) >= 15


def test_an_error_as_json_is_one_object_on_stdout_with_the_same_exit_code(space: Space) -> None:
    for words, code, kind in (
        (("export", "minilmm", "--json"), 10, "ModelNotFound"),
        (("verify", "gone", "--json"), 42, "RepositoryBroken"),
        (("export", "minilm", "--max-batch", "many", "--json"), 2, "UsageError"),
    ):
        result = space.run(*words)
        error = json.loads(result.stdout)["error"]
        assert (result.returncode, error["exit_code"], error["kind"]) == (code, code, kind)
        assert error["what"]
        assert error["next"]
        assert result.stderr == ""


# Files that run code when they are read carelessly


class Code:
    """Unpickling one creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.canary), "w")


def _rewritten(source: Path, target: Path, replace: dict[str, bytes]) -> None:
    """The archive with some of its files replaced, or added, by the end of their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if not any(name.endswith(end) for end in replace):
                new.writestr(name, old.read(name))
        for end, data in replace.items():
            new.writestr(f"{top}/{end}", data)


def _write_hostile_programs(folder: Path, canary: Path) -> list[str]:
    """Programs that torch.export.load(…).module() runs code from."""
    import io

    import torch

    whole = folder / "program.pt2"
    sizes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    torch.export.save(torch.export.export(torch.nn.Linear(4, 3), (torch.randn(2, 4),), dynamic_shapes=sizes), whole)
    pickled = io.BytesIO()
    torch.save(Code(canary), pickled)
    with zipfile.ZipFile(whole) as archive:
        model = archive.read("program/models/model.json").decode()
    code = f"open('{canary}', 'w')"
    size = re.sub(r'"expr_str": "[^"]*"', lambda _: f'"expr_str": "{code}"', model)
    guard = re.sub(r'"guards_code": \[[^\]]*\]', lambda _: f'"guards_code": ["{code}"]', model)
    constant = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"k": constant}}).encode()
    variants = {
        "sample.pt2": {"data/sample_inputs/model.pt": pickled.getvalue()},
        "constant.pt2": {
            "data/constants/model_constants_config.json": config,
            "data/constants/opaque_obj_0": pickle.dumps(Code(canary)),
        },
        "size.pt2": {"models/model.json": size.encode()},
        "guard.pt2": {"models/model.json": guard.encode()},
    }
    for name, replace in variants.items():
        _rewritten(whole, folder / name, replace)
    return list(variants)


def _write_hostile_pickles(folder: Path, canary: Path, files: Path) -> None:
    import torch

    torch.save(Code(canary), folder / "pickle.pt")
    torch.save(Code(canary), folder / "old.pt", _use_new_zipfile_serialization=False)
    _rewritten(
        folder / "pickle.pt", folder / "disguised.pt", {"code/__torch__.py": b"x = 1", "constants.pkl": b"\x80\x02)."}
    )
    np.savez(folder / "objects.npz", input=np.array([Code(canary)], dtype=object))
    shutil.copytree(files / "pickles", folder / "bin")
    torch.save(Code(canary), folder / "bin" / "pytorch_model.bin")
    shutil.copytree(files / "remote", folder / "remote")
    (folder / "remote" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")


def test_no_file_gets_its_code_run(space: Space, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    canary = folder / "canary"
    programs = _write_hostile_programs(folder, canary)
    _write_hostile_pickles(folder, canary, files)
    # The files are what they are meant to be: read carelessly, each runs its code.
    for name in programs:
        careless = f"import torch; torch.export.load({str(folder / name)!r}).module()(torch.zeros(2, 4))"
        subprocess.run([sys.executable, "-c", careless], capture_output=True, check=False, timeout=300)
        assert canary.exists(), name
        canary.unlink()
    expected = {
        **{name: ([name], 12) for name in programs if name != "guard.pt2"},
        "pickle.pt": (["pickle.pt"], 12),
        "old.pt": (["old.pt"], 12),
        "disguised.pt": (["disguised.pt", "--input", "x:float32[2,4]"], 11),
        "objects.npz": (["fac:bare", "--example", str(folder / "objects.npz")], 22),
        "bin": (["bin"], 12),
        "remote": (["remote"], 12),
        "remote with a task": (["remote", "--task", "feature-extraction"], 12),
    }
    for name, (words, code) in expected.items():
        first = words[0] if words[0].startswith("fac:") else str(folder / words[0])
        result = space.run("export", first, *words[1:])
        assert not canary.exists(), name
        assert_one_clear_message(result, code, [name.partition(" ")[0]])
    # Guards are left out when a program is loaded: it exports, and nothing of them runs.
    result = space.run("export", str(folder / "guard.pt2"), "--format", "torchscript")
    assert result.returncode == 0, result.stderr
    assert not canary.exists()


# Storage that refuses


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system in memory at `folder`; the test is skipped where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_repository_is_told_and_stays_as_it_was(space: Space) -> None:
    with mounted(space.repo, "size=1m"):
        result = space.run("export", "fac:wide", "--format", "torchscript", "--fuse", "never")
        assert_one_clear_message(result, 41, [str(space.repo), "No space left", "needs 4"])
        assert list(space.repo.iterdir()) == []
    assert in_temporary(space.temp) == []


def test_a_full_temporary_folder_is_told(space: Space) -> None:
    with mounted(space.temp, "size=2m"):
        result = space.run("export", "fac:wide", "--format", "torchscript")
        assert_one_clear_message(result, 41, [str(space.temp), "TMPDIR"])
        assert in_temporary(space.temp) == []
    assert not space.repo.exists()


def test_a_read_only_repository_is_told_before_the_work(space: Space) -> None:
    with mounted(space.repo, "ro"):
        result = space.run("export", "fac:lin")
        assert_one_clear_message(result, 40, [str(space.repo), "not writable"])
        assert "exporting" not in result.stderr


# A good export, and what is bad around it


@dataclass(frozen=True, kw_only=True)
class Good:
    repo: Path
    stderr: str
    stdout: str


@pytest.fixture(scope="module")
def good(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Good:
    """The repository of one export, and what it said."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "temp").mkdir()
    space = Space(files=files, repo=folder / "models", temp=folder / "temp")
    result = space.run(*LIN, "--format", "torchscript")
    assert result.returncode == 0, result.stderr
    assert in_temporary(space.temp) == []
    return Good(repo=space.repo, stderr=result.stderr, stdout=result.stdout)


def test_a_good_export_says_its_steps_and_the_next_command_and_nothing_else(good: Good) -> None:
    lines = good.stderr.splitlines()
    assert lines == [
        "loading the model",
        "capturing the graph",
        "taking the baseline of the unmodified model",
        "fusing subgraphs",
        "exporting torchscript with fused ops",
        "proving torchscript (fused ops) in a fresh process",
        "exporting torchscript",
        "proving torchscript in a fresh process",
        "measuring what passed",
        "planning its memory",
        f"publishing lin in {good.repo}",
        f"next: kpdeploy serve {good.repo}",
    ]
    assert "packaged lin version 1 as torchscript" in good.stdout


def test_a_taken_port_is_told_with_a_free_one(good: Good, space: Space) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = space.run("serve", str(good.repo), "--http-port", str(port))
    assert_one_clear_message(result, 50, [f"port {port} (http)", "--http-port"])
    assert in_temporary(space.temp) == []


def test_no_server_at_the_address_is_told(good: Good, space: Space) -> None:
    for command in (
        ["verify", str(good.repo), "--url", "localhost:1"],
        ["bench", "localhost:1", "--model", "lin", "--repo", str(good.repo)],
    ):
        assert_one_clear_message(space.run(*command), 60, ["localhost:1", "kpdeploy serve"])


def test_a_model_that_the_repository_lacks_is_told_with_the_nearest(good: Good, space: Space) -> None:
    result = space.run("verify", str(good.repo), "--model", "lim")
    assert_one_clear_message(result, 3, ["'lim'", "did you mean 'lin'"])


def test_a_model_that_takes_single_requests_only_is_exported_as_one_that_does_not_batch(space: Space) -> None:
    result = space.run("export", "fac:one", "--format", "torchscript")
    assert result.returncode == 0, result.stderr
    assert "does not batch" in result.stdout
    assert "one request at a time" in result.stdout
    assert read_repository(str(space.repo))[0].manifest.max_batch_size == 0


# Runs that are ended


def until(process: subprocess.Popen[str], step: str) -> None:
    """Read the process's lines up to the one that begins with `step`."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(step):
            return
    raise AssertionError(f"the export ended before {step!r}")


@pytest.mark.parametrize("step", ["loading", "proving", "measuring"])
def test_ctrl_c_leaves_nothing(step: str, space: Space) -> None:
    process = space.start(*LIN, "--format", "torchscript")
    until(process, step)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert space.leftovers() == []


def test_a_killed_export_leaves_the_repository_whole_and_the_next_one_sweeps(good: Good, space: Space) -> None:
    shutil.copytree(good.repo, space.repo)
    dice = random.Random(20_26)
    steps = ["loading", "capturing", "taking", "exporting", "proving", "measuring", "planning", "publishing"]
    left = 0
    for index in range(10):
        process = space.start(*LIN, "--format", "torchscript")
        # Publishing, the shortest step, thrice more.
        until(process, [*steps, *steps[-1:] * 3][index])
        time.sleep(dice.uniform(0, 0.02 if index >= 6 else 0.5))
        process.kill()
        process.communicate(timeout=60)
        left += bool(in_temporary(space.temp))
        for deployment in read_repository(str(space.repo)):
            deployment.manifest.check_files(Path(deployment.folder))
    assert left, "no kill met a run at work"
    result = space.run(*LIN, "--format", "torchscript")
    assert result.returncode == 0, result.stderr
    assert in_temporary(space.temp) == []
    assert [p.name for p in space.repo.parent.iterdir()] == [space.repo.name]
    versions = [p for p in (space.repo / "lin").iterdir() if p.name.isdecimal()]
    for version in versions:
        Manifest.read(version).check_files(version)
    assert {p.name for p in (space.repo / "lin").iterdir()} == {p.name for p in versions} | {"config.pbtxt", "warmup"}
    assert all((version / MANIFEST).is_file() and not (version / "config.pbtxt").exists() for version in versions)
