"""Attention to one tensor that holds queries, keys and values side by side: ONNX's own form of the op `attention`."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from kpdeploy.export import custom_ops, joined_attention
from kpdeploy.ops import ONNX_DOMAIN, OPS
from kpdeploy.ops.calls import array_of
from kpdeploy.ops.cases import error
from kpdeploy.ops.op import OPSET

# batch, length, heads, heads of keys, size of a head
SHAPES = [(2, 37, 3, 3, 64), (1, 130, 4, 2, 64), (3, 5, 2, 1, 7), (1, 1, 2, 2, 32), (0, 4, 2, 2, 8)]
DTYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def split_graph(shape: tuple[int, ...], dtype: torch.dtype, *, causal: bool, masked: bool, shown: bool = False) -> Any:
    """A graph as the exporter writes it, Split and Attention, as an onnx_ir.Model: inputs joined, lengths."""
    from onnx import helper

    _, _, heads, kv_heads, size = shape
    sizes = helper.make_tensor("sizes", 7, [3], [heads * size, kv_heads * size, kv_heads * size])
    none = helper.make_tensor("none", 7, [0], [])
    nodes = [
        helper.make_node("Split", ["joined", "sizes"], ["query", "key", "value"], axis=2),
        helper.make_node(
            "Attention", ["query", "key", "value", "lengths" if masked else "none"], ["out"], domain=ONNX_DOMAIN,
            heads=heads, kv_heads=kv_heads, scale=size**-0.5, causal=int(causal),
        ),
    ]  # fmt: skip
    kind, info = DTYPES[dtype], helper.make_tensor_value_info
    inputs = [info("joined", kind, [None, None, None]), *([info("lengths", 7, [None])] if masked else [])]
    outputs = [info("out", kind, [None] * 3), *([info("key", kind, [None] * 3)] if shown else [])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [sizes, none])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ONNX_DOMAIN, 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def session(model: Any, library: str | None, provider: str = "CPUExecutionProvider") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    data = ir.serde.serialize_model(model).SerializeToString()
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    return onnxruntime.InferenceSession(data, options, providers=providers)


def answered(found: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    import onnxruntime

    binding = found.io_binding()
    code = {torch.int64: 7, **DTYPES}
    kept = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array_of(t), code[t.dtype])
        for name, t in tensors.items()
    }
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out", "cpu")
    found.run_with_iobinding(binding)
    value = binding.get_outputs()[0]
    if dtype is not torch.bfloat16:
        return torch.from_numpy(value.numpy())
    held = (ctypes.c_int16 * math.prod(value.shape())).from_address(value.data_ptr())
    return torch.from_numpy(np.array(held, np.int16)).view(torch.bfloat16).reshape(value.shape())


def case(shape: tuple[int, ...], dtype: torch.dtype, causal: bool, masked: bool) -> tuple[Any, torch.Tensor]:
    """The inputs by name, and the reference in float64."""
    batch, length, heads, kv_heads, size = shape
    joined = torch.randn(batch, length, (heads + 2 * kv_heads) * size).to(dtype)
    lengths = torch.randint(0, length + 1, (batch,))
    parts = joined.double().split((heads * size, kv_heads * size, kv_heads * size), dim=-1)
    wanted = OPS["attention"].reference(*parts, lengths if masked else None, heads, kv_heads, size**-0.5, causal)
    return {"joined": joined, **({"lengths": lengths} if masked else {})}, wanted


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_gives_what_attention_to_the_parts_gives(
    shape: tuple[int, ...], dtype: torch.dtype, causal: bool, masked: bool, onnx_library: str
) -> None:
    model = split_graph(shape, dtype, causal=causal, masked=masked)
    assert joined_attention.join(model.graph) == 1
    assert [node.op_type for node in model.graph] == ["JoinedAttention"]
    assert "sizes" not in model.graph.initializers
    custom_ops.define(model)
    tensors, wanted = case(shape, dtype, causal, masked)
    found = answered(session(model, onnx_library), tensors, dtype)
    assert found.shape == wanted.shape
    assert error(found, wanted) <= BOUND[dtype]
    if dtype is torch.float32 and shape[0]:  # its definition, which a file carries
        assert error(answered(session(model, None), tensors, dtype), wanted) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_it_does_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, onnx_library: str) -> None:
    import onnxruntime

    provider = "CUDAExecutionProvider"
    if not torch.cuda.is_available() or provider not in onnxruntime.get_available_providers():
        pytest.skip("NOT RUN: JoinedAttention on a GPU: this machine has none, or no onnxruntime-gpu")
    for causal, masked in ((False, True), (True, False)):
        model = split_graph(shape, dtype, causal=causal, masked=masked)
        joined_attention.join(model.graph)
        tensors, wanted = case(shape, dtype, causal, masked)
        assert error(answered(session(model, onnx_library, provider), tensors, dtype), wanted) <= BOUND[dtype]


def test_equal_parts_are_known_by_their_number() -> None:
    model = split_graph(SHAPES[0], torch.float32, causal=False, masked=False)
    split = model.graph[0]
    split.resize_inputs(1)
    split.attributes.add(ir.AttrInt64("num_outputs", 3))
    assert joined_attention.join(model.graph.clone()) == 0  # of an unknown width
    model.graph.inputs[0].shape = ir.Shape(["batch", "seq", 9 * 64])
    assert joined_attention.join(model.graph) == 1


def test_a_split_whose_parts_are_wanted_elsewhere_stays() -> None:
    model = split_graph(SHAPES[0], torch.float32, causal=False, masked=False, shown=True)
    assert joined_attention.join(model.graph) == 0
    assert [node.op_type for node in model.graph] == ["Split", "Attention"]


def test_sizes_that_do_not_fit_the_heads_stay_too() -> None:
    model = split_graph(SHAPES[0], torch.float32, causal=False, masked=False)
    model.graph.initializers["sizes"].const_value = ir.tensor(np.array([192, 128, 256]))
    assert joined_attention.join(model.graph) == 0


def test_a_width_that_the_heads_do_not_divide_is_refused(onnx_library: str) -> None:
    model = split_graph((1, 4, 2, 2, 8), torch.float32, causal=False, masked=False)
    joined_attention.join(model.graph)
    with pytest.raises(Exception, match=r"joined is not \[B, S, \(heads \+ 2 kv_heads\) \* D\]"):
        answered(session(model, onnx_library), {"joined": torch.zeros(1, 4, 47)}, torch.float32)
