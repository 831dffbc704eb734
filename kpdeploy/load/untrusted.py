"""Archives that come from anybody (.pt, .pt2): what is in them, read so that nothing of it runs as code."""

from __future__ import annotations

import ast
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from kpdeploy.errors import ModelBroken, ModelUnsafe


def archive_names(path: Path) -> list[str]:
    """The names of an archive's files.

    Raises:
        ModelUnsafe: it is a bare pickle. ModelBroken: it is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"
        if pickled:
            raise ModelUnsafe(
                f"{path} is a pickle",
                why="unpickling can run code from the file",
                next_step="write a factory: MODEL = package.module:factory",
            ) from None
        raise ModelBroken(
            f"{path} cannot be read as a {path.suffix} archive",
            why=str(error),
            next_step="check that the file is whole, or export it again",
        ) from None


_SIZE_SYNTAX = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.operator, ast.UnaryOp,
    ast.unaryop, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop,
)  # fmt: skip
_SIZE_FUNCTIONS = ("sqrt", "ceiling", "floor", "exp", "log")
_TEXT = re.compile(r"[\w.+-]*")


def _is_size(text: str) -> bool:
    """Whether an expression only calculates: names, numbers, operators, and calls of sympy's own classes and functions.

    sympy.sympify, which torch.export.load gives it to, evaluates any Python.
    """
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return (
        all(isinstance(node, _SIZE_SYNTAX) for node in nodes)
        # Python's own functions begin in lower case.
        and all(isinstance(f, ast.Name) and (f.id[:1].isupper() or f.id in _SIZE_FUNCTIONS) for f in called)
        and all("__" not in name for name in (*names, *texts))
        and all(_TEXT.fullmatch(entry) for entry in texts)
    )


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


# What torch.export.load evaluates, or writes into Python source: none of it may spell a call.
_name = _matches(r"[\w.:$-]*")
_tree = _matches(r'(?!.*__enum__)[\w\s\[\]{}",:.\\-]*')
_PLAIN = {"name": _name, "forward_arg_names": _name, "expr_str": _is_size, "in_spec": _tree, "out_spec": _tree}
_SYMBOL_KEYS = "range_constraints"


def check_program(path: Path) -> None:
    """Raise ModelUnsafe where the description of an exported program holds code in the place of a name or a size."""
    with zipfile.ZipFile(path) as archive:
        names = [name.lower() for name in archive.namelist()]
        if len(set(names)) != len(names):
            # torch could read another one than what is checked here.
            raise ModelBroken(
                f"{path} holds two files of one name",
                next_step="do not use this file; export the program again from its source",
            )
        for name in archive.namelist():
            if not name.lower().endswith(".json"):
                continue
            try:
                found = json.loads(archive.read(name))
            except (ValueError, zipfile.BadZipFile):
                continue  # not readable for torch.export either
            for key, text in _strings(found):
                if not _PLAIN[key](text):
                    raise ModelUnsafe(
                        f"{path} holds code where a name or a size should be",
                        why=f"{key} in {name} is {text[:80]!r}",
                        next_step="do not use this file; export the program again from its source",
                    )


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string that has a rule, with the key that it stands under."""
    if isinstance(node, str) and key in _PLAIN:
        yield key, node
    elif isinstance(node, list):
        for entry in node:
            yield from _strings(entry, key)
    elif isinstance(node, dict):
        if key == _SYMBOL_KEYS:
            yield from (("name", symbol) for symbol in node)
        for inner, value in node.items():
            yield from _strings(value, inner)


@contextmanager
def no_pickles(path: Path) -> Iterator[None]:
    """Inside, torch loads tensors but no other pickled objects.

    torch.export.load falls back to plain unpickling of sample inputs and constants, which a hostile file can use.
    """
    import torch

    load = torch.load

    def tensors_only(file: Any, *args: Any, **options: Any) -> Any:
        try:
            return load(file, *args, **{**options, "weights_only": True})
        except Exception:
            raise _pickled(path) from None

    def refuse(*args: Any, **options: Any) -> Any:
        raise _pickled(path)

    refused: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("pickle.loads", refuse),
        ("pickle.load", refuse),
        ("torch._C._pickle_load_obj", refuse),
    )
    # torch.export.load logs tracebacks of what it tries next.
    logging.disable(logging.WARNING)
    with mock.patch.object(torch, "load", tensors_only):
        patches = [mock.patch(name, function, create=True) for name, function in refused]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
            logging.disable(logging.NOTSET)


def _pickled(path: Path) -> ModelUnsafe:
    return ModelUnsafe(
        f"{path} holds pickled objects that are not tensors",
        why="unpickling them can run code from the file",
        next_step="export the program again without custom objects, or give the module by package.module:factory",
    )
