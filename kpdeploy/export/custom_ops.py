"""The fused ops in ONNX: their schemas, their translation by the exporter, and the functions that define them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kpdeploy.export import joined_attention
from kpdeploy.ops import NAMESPACE, ONNX_DOMAIN, OPS, Op
from kpdeploy.ops.attention import ATTENTION
from kpdeploy.ops.op import OPSET

VERSION = 1
"""Of the domain com.kpdeploy."""


@functools.cache
def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """torch.onnx.export's custom_translation_table: each op becomes one node of its own."""
    import torch

    from kpdeploy.ops import register

    register()
    return {getattr(getattr(torch.ops, NAMESPACE), op.name).default: _translation(op) for op in OPS.values()}


def define(model: Any) -> None:
    """Give an onnx_ir.Model the functions of the ops that it uses, so that it runs where their library is not."""
    import onnx_ir as ir
    from onnx import parser

    used = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == ONNX_DOMAIN}
    bodies = {op.onnx: ("", op.onnx_body) for op in OPS.values()}
    if joined_attention.NAME in used:
        used.add(ATTENTION.onnx)  # its function calls that one
        bodies[joined_attention.NAME] = (f', "{ONNX_DOMAIN}": {VERSION}', joined_attention.BODY)
    for name, (imported, body) in bodies.items():
        if name in used:
            head = f'<domain: "{ONNX_DOMAIN}", opset_import: ["": {OPSET}{imported}]>'
            function = ir.serde.deserialize_function(parser.parse_function(head + body))
            model.functions[function.identifier()] = function
    if used:
        model.graph.opset_imports[ONNX_DOMAIN] = VERSION


def _is_tensor(kind: str) -> bool:
    return kind.startswith("Tensor")


def schema(op: Op) -> Any:
    """The op's onnx.defs.OpSchema. It is not registered with ONNX, whose reference evaluator refuses a name in two
    domains (Attention)."""
    from onnx import defs

    kinds = {"int": "INT", "bool": "INT", "float": "FLOAT", "str": "STRING"}
    required, parameter = defs.OpSchema.AttrType, defs.OpSchema.FormalParameter
    inputs = [parameter(name, _type(op, name)) for kind, name in op.parameters if _is_tensor(kind)]
    attributes = [
        defs.OpSchema.Attribute(name, getattr(required, kinds[kind]), required=True)
        for kind, name in op.parameters
        if not _is_tensor(kind)
    ]
    outputs = [parameter(f"out{index}", "T") for index in range(op.results)]
    floats = ["tensor(float)", "tensor(bfloat16)", "tensor(float16)", "tensor(double)"]
    return defs.OpSchema(
        op.onnx,
        ONNX_DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[("T", floats, "the op's dtype")],
        attributes=attributes,
    )


def _type(op: Op, name: str) -> str:
    if name in op.wide:
        return "tensor(float)"
    return "tensor(int64)" if name in ("lengths", "offsets") else "T"


def _translation(op: Op) -> Callable[..., Any]:
    """A function of the schema's arguments that adds the op's node to the graph that is being exported."""
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset20
    from onnxscript.values import Op as Node
    from onnxscript.values import Opset

    node = Node(Opset(ONNX_DOMAIN, VERSION), op.onnx, schema(op))

    def translate(*given: Any, **named: Any) -> Any:
        values = {**dict(zip((name for _, name in op.parameters), given, strict=False)), **named}
        tensors: list[Any] = []
        attributes = {}
        for kind, name in op.parameters:
            value = values[name]
            if not _is_tensor(kind):
                attributes[name] = int(value) if isinstance(value, bool) else value
            elif value is None:
                # A function's body cannot ask whether an input is there; it can cut an empty one.
                dtype = ir.DataType.INT64 if name == "lengths" else tensors[0].dtype
                empty: Any = ir.tensor(np.empty(0, dtype.numpy()))
                tensors.append(opset20.Constant(value=empty))
            else:
                tensors.append(value)
        return node(*tensors, **attributes)

    translate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for _, name in op.parameters]
    )
    translate.__name__ = op.name
    return translate
