"""CONTRIBUTING.md is true: its example is followed to the letter, and every op has all the rows that it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kpdeploy.ops import NAMESPACE, ONNX_DOMAIN, OPS
from kpdeploy.ops.cases import CASES
from kpdeploy.ops.providers import PROVIDERS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
NEW = "squared_relu"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One step of the example: a new file, or lines below or above the one line that holds `anchor`."""

    path: str
    where: str
    anchor: str
    text: str

    def apply(self, root: Path) -> None:
        path = root / self.path
        if self.where == "new":
            assert not path.exists(), f"{self.path} is no new file"
            path.write_text(self.text)
            return
        lines = path.read_text().splitlines(keepends=True)
        found = [number for number, line in enumerate(lines) if self.anchor in line]
        assert len(found) == 1, f"{self.path} has {len(found)} lines with {self.anchor!r}"
        at = found[0] + (self.where == "below")
        lines.insert(at, self.text)
        path.write_text("".join(lines))


STEP = re.compile(r"^\*\*`([^`]+)`\*\*(.*?):\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"(below|above) `([^`]+)`")


def edits() -> list[Edit]:
    found = []
    for path, how, text in STEP.findall(TEXT):
        place = PLACE.search(how)
        where, anchor = place.groups() if place else ("new", "")
        assert place or "a new file" in how, path
        found.append(Edit(path=path, where=where, anchor=anchor, text=text))
    return found


EDITS = edits()


def test_every_step_of_the_example_is_read() -> None:
    assert len(EDITS) == TEXT.count("\n```\n") == len(re.findall(r"^\*\*`", TEXT, re.MULTILINE))
    assert len([edit for edit in EDITS if edit.where == "new"]) == 3


def test_the_example_is_still_an_example() -> None:
    assert NEW not in OPS


def test_every_file_and_command_that_is_named_exists() -> None:
    named = {*re.findall(r"`((?:kpdeploy|csrc|tests|scripts|benchmarks)/[\w./]*)`", TEXT)} - {e.path for e in EDITS}
    assert len(named) > 8
    assert not [path for path in named if not (ROOT / path).exists()]
    for script in re.findall(r"^    \./(\S+)", TEXT, re.MULTILINE):
        assert os.access(ROOT / script, os.X_OK), script
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests/kernels").glob("*.py")), name


TABLES = {
    "kpdeploy/ops/__init__.py": lambda op: rf"^\s+{op.name.upper()},$",
    "kpdeploy/ops/providers.py": lambda op: rf'^    "{op.name}": Row\(',
    "kpdeploy/ops/cases.py": lambda op: rf'^    "{op.name}": _{op.name},$',
    "csrc/core/kpdeploy.h": lambda op: rf"^int kpdeploy_{op.name}\(const kpdeploy_context\* context",
    "csrc/torch/ops.cpp": lambda op: rf"TORCH_BOX\(&{op.name}\)",
    "csrc/onnx/ops.cpp": lambda op: rf"^    add<{op.onnx}>\(d\);",
    "csrc/python/core.cpp": lambda op: rf'^  module\.def\("{op.name}", {op.name},',
}


@pytest.mark.parametrize("table", TABLES)
def test_every_op_has_its_row_in_each_table_and_the_example_adds_one(table: str) -> None:
    text = (ROOT / table).read_text()
    for op in OPS.values():
        assert len(re.findall(TABLES[table](op), text, re.MULTILINE)) == 1, op.name
    assert any(edit.path == table for edit in EDITS)


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_one_name_everywhere(name: str) -> None:
    op = OPS[name]
    assert (ROOT / f"kpdeploy/ops/{name}.py").is_file()
    assert op.schema.startswith(f"{name}(")
    assert op.onnx == "".join(part.capitalize() for part in name.split("_"))
    assert name in CASES
    assert name in PROVIDERS


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_an_onnx_function_of_its_schema(name: str) -> None:
    parser = pytest.importorskip("onnx.parser")
    op = OPS[name]
    function = parser.parse_function(f'<domain: "{ONNX_DOMAIN}", opset_import: ["": 20]>{op.onnx_body}')
    schema = torch._C.parse_schema(f"{NAMESPACE}::{op.schema}")
    assert function.name == op.onnx
    assert list(function.input) == [a.name for a in schema.arguments if "Tensor" in str(a.type)]
    assert sorted(function.attribute) == sorted(a.name for a in schema.arguments if "Tensor" not in str(a.type))
    assert len(function.output) == len(schema.returns)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which the example was followed, built."""
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    pytest.importorskip("pybind11")
    root = tmp_path_factory.mktemp("followed")
    built = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for folder in ("kpdeploy", "csrc"):
        shutil.copytree(ROOT / folder, root / folder, ignore=built)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, root)
    for edit in EDITS:
        edit.apply(root)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "KPDEPLOY_CUDA": "0"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return root


def kpdeploy(root: Path, *arguments: str) -> str:
    """Run the copy's command line."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "kpdeploy", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_who_follows_the_example_has_an_op_that_validates_in_every_runtime(followed: Path) -> None:
    report = json.loads(kpdeploy(followed, "ops", "validate", NEW, "--json"))
    rows = {(row["runtime"], row["dtype"]) for row in report["checked"] if row["device"] == "cpu"}
    assert rows == {(r, d) for r in ("torch", "onnxruntime", "numpy") for d in ("float32", "bfloat16")}
    assert all(row["passed"] and row["error"] > 0 for row in report["checked"])


def test_who_follows_the_example_has_an_op_that_is_explained(followed: Path) -> None:
    told = json.loads(kpdeploy(followed, "ops", "explain", NEW, "--shape", "8x16", "--json"))
    assert told["runs"] == dict.fromkeys(("torch", "onnxruntime", "numpy"), "kpdeploy")


def test_what_the_example_writes_passes_the_linters(followed: Path) -> None:
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ruff is None:
        pytest.skip("no ruff here")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, "kpdeploy/ops"], cwd=followed, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
