"""Archives that come from anybody (.pt, .pt2): what is in them, read so that nothing of it runs as code."""

from __future__ import annotations

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


# What torch.export.load puts into Python source or hands to sympy's eval, and the characters that each needs. None
# of them can spell a call of anything but sympy's classes and a few functions of numbers.
_NAME = re.compile(r"[\w.:$-]*")
_EXPRESSION = re.compile(
    r"(?s)(?!.*__)(?!.*\.\s*[A-Za-z_])(?!.*\b(?!(?:sqrt|ceiling|floor|exp|log)\b)[a-z_]\w*\s*\()[\w\s+\-*/%(),.<>=&|~^]*"
)
_TREE = re.compile(r'(?!.*__enum__)[\w\s\[\]{}",:.\\-]*')
_PLAIN = {"name": _NAME, "forward_arg_names": _NAME, "expr_str": _EXPRESSION, "in_spec": _TREE, "out_spec": _TREE}
_SYMBOL_KEYS = "range_constraints"


def check_program(path: Path) -> None:
    """Raise ModelUnsafe where the description of an exported program holds code in the place of a name or a size."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.endswith(".json"):
                continue
            try:
                found = json.loads(archive.read(name))
            except (ValueError, zipfile.BadZipFile):
                continue  # not readable for torch.export either
            for key, text in _strings(found):
                if not _PLAIN[key].fullmatch(text):
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
