"""The first step: the MODEL argument, whatever it is, becomes a Model with a known signature."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kpdeploy.errors import ModelNotFound, UnknownName, did_you_mean
from kpdeploy.model import Model

DEFAULT_MAX_BATCH = 8

FILE_KINDS = (".onnx", ".pt2", ".pt", ".pth", ".ts")
"""The files that can be a MODEL, by the end of their names; kpdeploy.load.files has a loader for each."""

KINDS = """\
a shipped example (minilm); package.module:factory; a Hugging Face folder; a .pt2 exported program;
       a TorchScript .pt; an .onnx file; timm:NAME; transformers:ARCH"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user said about the model beside its name.

    `inputs`: texts as `kpdeploy.signature.parse_inputs` reads. `example`: an .npz with one array per input.
    `max_batch`: the largest batch of models whose inputs do not say it themselves.
    """

    inputs: Sequence[str] = ()
    example: Path | None = None
    task: str | None = None
    name: str | None = None
    max_batch: int = DEFAULT_MAX_BATCH


def load_model(argument: str, request: Request | None = None) -> Model:
    """Load MODEL.

    Raises:
        ModelNotFound, ModelBroken, ModelUnsafe, FactoryFailed, FactoryReturned, TaskUnknown, PackageMissing: the
            model itself.
        InputsUnknown, InputSyntax, InputMismatch, ModelRejectsInputs, OutputUnusable: its inputs and outputs.
    """
    request = request or Request()
    return _loader(argument)(argument, request)


def _loader(argument: str) -> Callable[[str, Request], Model]:
    """What loads MODEL. It is imported only once MODEL is known to exist: torch takes seconds."""
    from kpdeploy.load import examples

    if argument in examples.EXAMPLES:
        return examples.load
    scheme = argument.partition(":")[0]
    # os.path and not Path: it takes any text, however long.
    if scheme in ("timm", "transformers") or os.path.isdir(argument):
        from kpdeploy.load import huggingface

        kinds = {"timm": huggingface.load_timm, "transformers": huggingface.load_architecture}
        return kinds.get(scheme, huggingface.load_folder)
    path = Path(argument)
    if path.suffix in FILE_KINDS:
        if not os.path.isfile(path):
            raise ModelNotFound(
                f"there is no file {argument}", why=_near_file(path), next_step="check the path and its spelling"
            )
        from kpdeploy.load import files

        return files.LOADERS[path.suffix]
    if os.path.isfile(path):
        raise ModelNotFound(
            f"{argument} is a file of an unknown kind",
            why=f"its name ends in {path.suffix or 'nothing'}; known are {', '.join(FILE_KINDS)}",
            next_step=f"MODEL is one of: {KINDS}",
        )
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", argument):
        from kpdeploy.load import factory

        return factory.load
    near = did_you_mean(argument, examples.EXAMPLES)
    raise ModelNotFound(
        f"there is no model {argument!r}",
        why="it is no shipped example, no file and no folder" + (f"; {near}" if near else ""),
        next_step=f"MODEL is one of: {KINDS}",
    )


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = (place.name for place in folder.iterdir())
    return did_you_mean(path.name, names, otherwise=f"{folder} holds no file of that name")


def choose(kind: str, given: str, known: Sequence[str]) -> str:
    """`given` if it is known, else UnknownName with the nearest known name."""
    if given in known:
        return given
    raise UnknownName(
        f"unknown {kind} {given!r}",
        why=did_you_mean(given, known),
        next_step=f"use one of {', '.join(known)}",
    )


def model_name(text: str) -> str:
    """A name for the repository's folder: lower case letters, digits, - and _ only."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-") or "model"
