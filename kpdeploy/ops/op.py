"""The Op value: what is known of a fused op apart from its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMESPACE = "kpdeploy"
"""Of the ops in torch: torch.ops.kpdeploy."""

ONNX_DOMAIN = "com.kpdeploy"
"""Of the ops in ONNX, version 1."""

OPSET = 20
"""Of ONNX, that of the ops' functions and of the models that carry them: the newest that ONNX Runtime 1.17 and later
load. Gelu is an operator in it."""

SHIFT = """\
    zero = Constant <value_float = 0.0> ()
    zero_like = CastLike (zero, weight)
    width = Shape <start = 0, end = 1> (weight)
    zeros = Expand (zero_like, width)
    padded = Concat <axis = 0> (bias, zeros)
    first = Constant <value_ints = [0]> ()
    shift = Slice (padded, first, width)
"""
"""Lines of a function of ONNX: `shift` is `bias`, or zeros as wide as `weight` where the bias is an empty tensor."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One fused op.

    `schema` is torch's, from the name on. `reference` is plain torch, works in float64 and returns the inputs' dtype.
    `fake` gives outputs of the right shape, dtype and strides without computing them. ONNX: inputs are the schema's
    tensors in their order (an empty one stands for an optional one that is not given), attributes its other arguments
    under the same names. `onnx_body` is the op in standard operators of opset 20, as ONNX text: the function that an
    artifact carries, so that it runs where the library is not. Float16 and bfloat16 need a runtime that has them.
    `wide` are the tensors that are float32 in calls of every dtype.
    """

    name: str
    schema: str
    onnx: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    onnx_body: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    wide: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ("libkpdeploy_torch.so", "libkpdeploy_onnx.so")

    @property
    def qualified(self) -> str:
        """Its name in torch, such as "kpdeploy::attention"."""
        return f"{NAMESPACE}::{self.name}"

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Type and name of each parameter of the schema, such as ("Tensor?", "bias")."""
        inner = self.schema.partition("(")[2].partition(")")[0]
        return [(kind, name.partition("=")[0]) for kind, name in (part.split() for part in inner.split(", "))]

    @property
    def results(self) -> int:
        """How many tensors it gives."""
        return self.schema.partition("->")[2].count("Tensor")


def gpu_op(
    *,
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16"),
) -> Op:
    """An op of programs for GPUs alone: torch runs them, and ONNX has no form of it."""
    library = ("libkpdeploy_torch.so",)
    return Op(
        name=name,
        schema=schema,
        onnx="",
        reference=reference,
        fake=fake,
        onnx_body="",
        dtypes=dtypes,
        libraries=library,
    )
