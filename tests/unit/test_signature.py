"""Signatures: reading `--input`, axes, and the way through JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpdeploy.errors import InputMismatch, InputSyntax
from kpdeploy.signature import DTYPES, Axis, Signature, TensorSpec, Values, parse_inputs

ENCODER = ("input_ids:int64[batch=1..32,seq=1..512]{0..30521}", "attention_mask:int64[batch,seq]{mask}")


def test_inputs_are_read_as_written() -> None:
    signature = parse_inputs(ENCODER)
    assert signature.axes == (Axis(name="batch", min=1, max=32), Axis(name="seq", min=1, max=512))
    assert signature.inputs == (
        TensorSpec(
            name="input_ids", dtype="int64", shape=("batch", "seq"), values=Values(kind="range", low=0, high=30521)
        ),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "seq"), values=Values(kind="prefix_mask")),
    )


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("x:float32[]", ()),
        ("x:float32[3]", (3,)),
        ("x:float32[n=1..8,3,224,224]", ("n", 3, 224, 224)),
        (" x : float32 [ n = 1 .. 8 , 4 ] ", ("n", 4)),
        ("x:float32[n=4..4]", ("n",)),
        ("x:float32[n=1..8,n]", ("n", "n")),
        ("model.x_1:float32[2]", (2,)),
    ],
)
def test_dims_are_numbers_or_axes(text: str, shape: tuple[int | str, ...]) -> None:
    assert parse_inputs([text]).inputs[0].shape == shape


def test_an_axis_may_get_its_range_at_a_later_use() -> None:
    assert parse_inputs(["a:int8[n]", "b:int8[n=1..4]"]).axes == (Axis(name="n", min=1, max=4),)


@pytest.mark.parametrize("values", ["{-1.5..2.5}", "{0..0}", "{-3..-1}"])
def test_values_may_be_negative_or_one_point(values: str) -> None:
    spec = parse_inputs([f"x:float32[2]{values}"]).inputs[0]
    assert spec.values is not None
    assert spec.values.low <= spec.values.high


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([""], "cannot read"),
        (["x"], "cannot read"),
        (["x:float32"], "cannot read"),
        (["x:float32[2"], "cannot read"),
        (["1x:float32[2]"], "cannot read"),
        (["x:float32[2]{0..1} y"], "cannot read"),
        (["x:float33[2]"], "unknown dtype 'float33'"),
        (["x:bfloat16[2]"], "unknown dtype 'bfloat16'"),
        (["x:float32[-1]"], "cannot read the dim '-1'"),
        (["x:float32[2.5]"], "cannot read the dim '2.5'"),
        (["x:float32[n=1..]"], "cannot read the dim"),
        (["x:float32[2,,3]"], "cannot read the dim ''"),
        (["x:float32[0]"], "cannot read the dim '0'"),
        (["x:float32[²]"], "cannot read the dim"),
        (["x:float32[n]"], "the axis 'n' of input x has no range"),
        (["x:float32[n=0..4]"], "the range of axis 'n' is empty: 0..4"),
        (["x:float32[n=5..4]"], "the range of axis 'n' is empty: 5..4"),
        (["x:float32[n=1..4]", "y:float32[n=1..5]"], "two ranges"),
        (["x:float32[2]{a..b}"], "cannot read the values"),
        (["x:float32[2]{1}"], "cannot read the values"),
        (["x:float32[2]{}"], "cannot read the values"),
        (["x:float32[2]{2..1}"], "empty range"),
        (["x:float32[2]{nan..1}"], "not a finite range"),
        (["x:float32[2]{0..inf}"], "not a finite range"),
        (["x:uint8[2]{0..256}"], "uint8 does not hold the values {0..256}"),
        (["x:bool[2]{0..2}"], "bool does not hold"),
        (["x:int64[2]{0..9223372036854775807}"], "int64 does not hold"),
        (["x:float16[2]{0..70000}"], "float16 does not hold"),
        (["x:int64[2]{0.5..2}"], "whole numbers"),
        (["x:bool[2]{mask..}"], "cannot read the values"),
        (["x:int64[]{mask}"], "is a number and cannot be a mask"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(texts: list[str], complaint: str) -> None:
    with pytest.raises(InputSyntax) as refused:
        parse_inputs(texts)
    assert complaint in refused.value.what
    assert refused.value.next_step


def test_two_inputs_of_one_name_are_refused() -> None:
    with pytest.raises(InputMismatch, match="two tensors have one name: x"):
        parse_inputs(["x:int8[1]", "x:int8[2]"])


def test_an_axis_without_a_range_is_refused() -> None:
    with pytest.raises(InputMismatch, match="names the axis 'n'"):
        Signature(inputs=(TensorSpec(name="x", dtype="int8", shape=("n",)),))


def test_the_batch_axis_leads_every_tensor() -> None:
    signature = parse_inputs(ENCODER)
    assert signature.batch_axis == Axis(name="batch", min=1, max=32)
    batched = TensorSpec(name="out", dtype="float32", shape=("batch", 384))
    assert signature.with_outputs([batched]).batch_axis == Axis(name="batch", min=1, max=32)


@pytest.mark.parametrize("shape", [(), (384,), ("seq", 384), (-1, 384)])
def test_there_is_no_batch_axis_where_an_output_does_not_have_it(shape: tuple[int | str, ...]) -> None:
    signature = parse_inputs(ENCODER).with_outputs([TensorSpec(name="out", dtype="float32", shape=shape)])
    assert signature.batch_axis is None


def test_there_is_no_batch_axis_where_shapes_are_fixed() -> None:
    assert parse_inputs(["x:float32[1,3]"]).batch_axis is None
    assert Signature(inputs=()).batch_axis is None


def test_a_frozen_axis_is_a_number_everywhere() -> None:
    out = TensorSpec(name="out", dtype="float32", shape=("batch", 384))
    frozen = parse_inputs(ENCODER).with_outputs([out]).freeze_axis("batch", 4)
    assert [spec.shape for spec in (*frozen.inputs, *frozen.outputs)] == [(4, "seq"), (4, "seq"), (4, 384)]
    assert [axis.name for axis in frozen.axes] == ["seq"]
    assert frozen.inputs[0].values == Values(kind="range", low=0, high=30521)


def test_dims_at_a_point_are_concrete() -> None:
    spec = parse_inputs(["x:float32[n=1..8,3,m=1..2]"]).inputs[0]
    assert spec.dims({"n": 5, "m": 2}) == (5, 3, 2)
    assert str(spec) == "x:float32[n,3,m]"


names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    axes = [
        Axis(name=name, min=low, max=low + more)
        for name, low, more in draw(
            st.lists(st.tuples(names, st.integers(1, 9), st.integers(0, 500)), max_size=3, unique_by=lambda t: t[0])
        )
    ]
    dim = st.integers(1, 9) | st.sampled_from([a.name for a in axes]) if axes else st.integers(1, 9)
    values = st.none() | st.builds(
        lambda low, more: Values(kind="range", low=low, high=low + more), st.integers(-100, 0), st.integers(0, 100)
    )
    specs = [
        TensorSpec(
            name=name, dtype=draw(st.sampled_from(DTYPES)), shape=tuple(draw(st.lists(dim, max_size=4))),
            values=draw(values),
        )
        for name in draw(st.lists(names, min_size=1, max_size=4, unique=True))
    ]  # fmt: skip
    cut = draw(st.integers(1, len(specs)))
    return Signature(inputs=tuple(specs[:cut]), outputs=tuple(specs[cut:]), axes=tuple(axes))


@given(signatures())
def test_a_signature_survives_json(signature: Signature) -> None:
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


@given(signatures())
def test_what_a_signature_prints_can_be_read_again(signature: Signature) -> None:
    ranges = {a.name: f"{a.name}={a.min}..{a.max}" for a in signature.axes}
    texts = [
        f"{s.name}:{s.dtype}[{','.join(ranges.get(d, '') if isinstance(d, str) else str(d) for d in s.shape)}]"
        for s in signature.inputs
    ]
    again = parse_inputs(texts)
    assert [(s.name, s.dtype, s.shape) for s in again.inputs] == [(s.name, s.dtype, s.shape) for s in signature.inputs]
    assert set(again.axes) <= set(signature.axes)
