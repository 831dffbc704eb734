"""The Model value: what `load` makes of the MODEL argument, and all that later steps know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.decision import Decision
from kpdeploy.signature import Signature

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and its signature, before anything was changed.

    `module` takes the tensors of `signature.inputs` by position and returns a tuple of tensors, in the order of
    `signature.outputs`. `kind` says what it is: "module" (eager PyTorch), "program" (an exported program, `module`
    is its runnable form), "torchscript" or "onnx" (then `path` is the file, and an ONNX model has no module).
    `tokenizer` is the folder of its tokenizer, where it brings one.
    """

    name: str
    kind: str
    signature: Signature
    source: Mapping[str, Any]
    module: torch.nn.Module | None = None
    path: Path | None = None
    program: Any = None
    tokenizer: Path | None = None
    decisions: tuple[Decision, ...] = field(default=())
