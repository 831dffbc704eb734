"""What the description of an exported program may hold where torch makes code of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kpdeploy.errors import ModelBroken, ModelUnsafe
from kpdeploy.load.untrusted import archive_names, check_program


def program(folder: Path, description: dict[str, Any]) -> Path:
    path = folder / "p.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/models/model.json", json.dumps(description))
    return path


SYMBOL = "Symbol('s27', positive=True, integer=True)"


@pytest.mark.parametrize(
    "size",
    [
        SYMBOL,
        f"Add({SYMBOL}, PythonMod(Mul(Integer(-1), {SYMBOL}), Integer(8)))",
        f"FloorDiv(Add({SYMBOL}, Integer(2)), Integer(3))",
        f"TruncToInt(Mul(Float('1.5', precision=53), ToFloat({SYMBOL})))",
        "GreaterThan(Symbol('u0', integer=True), Integer(0))",
        f"Max(Integer(1), {SYMBOL})",
        "2*s0 + 1",
        "((s53 - 1)//2)",
        "s0 >= 2",
        "ceiling(s0/2)",
        "True",
    ],
)
def test_sizes_are_let_through(size: str, tmp_path: Path) -> None:
    check_program(program(tmp_path, {"sizes": [{"as_expr": {"expr_str": size}}]}))


@pytest.mark.parametrize(
    "size",
    [
        "open('f', 'w')",
        "__import__('os')",
        "exit(3)",
        "s0.__class__",
        "Max.mro()",
        "print (1)",
        "exec(x)",
        "[s0]",
        "(lambda: 1)()",
        "s0\n.real",
        "Max(1, open(2))",
        "S('open(2)')",
        "Symbol('s0', positive=open(2))",
        "Float(f'{open(2)}')",
        "(x := 3)",
        "s0 if open(2) else 1",
    ],
)
def test_code_in_the_place_of_a_size_is_refused(size: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsafe, match="where a name or a size should be"):
        check_program(program(tmp_path, {"sizes": [{"as_expr": {"expr_str": size}}]}))


@pytest.mark.parametrize(
    "description",
    [
        {"signature": {"forward_arg_names": ["x=open('f')"]}},
        {"nodes": [{"name": "x): open('f')\ndef f("}]},
        {"range_constraints": {"exit()": {"min_val": 0}}},
        {"in_spec": '[1, {"__enum__": true, "fqn": "evil:E"}]'},
        {"in_spec": '[1, {"type": "builtins.dict", "context": "[\\"x=open()\\"]"}]'},
    ],
)
def test_code_in_the_place_of_a_name_is_refused(description: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelUnsafe):
        check_program(program(tmp_path, description))


def test_a_plain_description_is_let_through(tmp_path: Path) -> None:
    spec = '[1, {"type": "builtins.tuple", "context": "null", "children_spec": []}]'
    stack = "File \"m.py\", line 3, in forward\n  open('f')"
    plain = {
        "in_spec": spec,
        "forward_arg_names": ["x", "y_1"],
        "metadata": {"stack_trace": stack},
        "guards_code": ["f()"],
    }
    check_program(program(tmp_path, plain | {"range_constraints": {"s77": {}}, "nodes": [{"name": "linear_1"}]}))


def test_a_bare_pickle_and_a_broken_archive_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"\x80\x02.")
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelUnsafe, match="is a pickle"):
        archive_names(tmp_path / "a.pt")
    with pytest.raises(ModelBroken, match="archive"):
        archive_names(tmp_path / "b.pt")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/models/model.json", "{}")
        archive.writestr("p/models/MODEL.json", "{}")
    with pytest.raises(ModelBroken, match="two files of one name"):
        check_program(path)
