"""Any module as one that takes and returns tensors only, so that each export has the same plain form to handle."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

WIDER = {torch.bfloat16: torch.float32}
"""Dtypes that NumPy and most clients lack, and what they become at the boundary."""


class Flat(torch.nn.Module):
    """Calls `module` with tensors by position or keyword, and flattens its answer into a tuple of tensors.

    Args:
        module: any module in evaluation mode.
        keywords: the keyword of each tensor, or None to pass them by position.
        dtypes: the dtype that `module` wants for each input, where it differs from the boundary's (bfloat16).
    """

    def __init__(
        self, module: torch.nn.Module, keywords: Sequence[str] | None, dtypes: Sequence[torch.dtype | None] = ()
    ) -> None:
        super().__init__()
        self.module = module
        self.keywords = list(keywords) if keywords is not None else None
        self.dtypes = list(dtypes)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_boundary(tensor) for _, tensor in named_tensors(self.call(tensors)))

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The answer of `module` as it is."""
        if self.dtypes:
            tensors = [t if d is None else t.to(d) for t, d in zip(tensors, self.dtypes, strict=True)]
        if self.keywords is None:
            return self.module(*tensors)
        return self.module(**dict(zip(self.keywords, tensors, strict=True)))


def _boundary(tensor: torch.Tensor) -> torch.Tensor:
    wider = WIDER.get(tensor.dtype)
    return tensor if wider is None else tensor.to(wider)


def named_tensors(answer: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors inside an answer (tensor, mapping, sequence, dataclass of them) with names that follow its structure.

    What is not a tensor is passed over: caches, None, flags.
    """
    if isinstance(answer, torch.Tensor):
        yield name or "output", answer
    elif isinstance(answer, dict):
        for key, value in answer.items():
            yield from named_tensors(value, _join(name, str(key)))
    elif isinstance(answer, (tuple, list)):
        fields = getattr(answer, "_fields", None) or [str(i) for i in range(len(answer))]
        for key, value in zip(fields, answer, strict=True):
            yield from named_tensors(value, _join(name or "output", key) if len(answer) > 1 or name else name)


def _join(name: str, key: str) -> str:
    key = re.sub(r"\W", "_", key)
    return f"{name}_{key}" if name else key
