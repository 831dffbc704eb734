"""The Op value: what is known of a fused op apart from its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMESPACE = "kpdeploy"
"""Of the ops in torch: torch.ops.kpdeploy."""

ONNX_DOMAIN = "com.kpdeploy"
"""Of the ops in ONNX, version 1."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One fused op.

    `schema` is torch's, from the name on. `reference` is plain torch, works in float64 and returns the inputs' dtype.
    `fake` gives outputs of the right shape, dtype and strides without computing them. ONNX: inputs are the schema's
    tensors in their order (an empty one stands for an optional one that is not given), attributes its other arguments
    under the same names. `onnx_body` is the op in standard operators of opset 20, as ONNX text: the function that an
    artifact carries, so that it runs where the library is not. Float16 and bfloat16 need a runtime that has them.
    """

    name: str
    schema: str
    onnx: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    onnx_body: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    libraries: tuple[str, ...] = ("libkpdeploy_torch.so", "libkpdeploy_onnx.so")

    @property
    def qualified(self) -> str:
        """Its name in torch, such as "kpdeploy::attention"."""
        return f"{NAMESPACE}::{self.name}"
