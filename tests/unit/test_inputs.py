"""Random inputs are valid, and proof points cover the range."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpdeploy.inputs import PROOF_POINTS, default_values, lead_axis, middle_point, proof_points, sample
from kpdeploy.signature import DTYPES, Axis, Signature, TensorSpec, parse_inputs

ENCODER = parse_inputs(("input_ids:int64[batch=1..32,seq=1..512]{0..30521}", "attention_mask:int64[batch,seq]{mask}"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def ranges(draw: st.DrawFn) -> Signature:
    """Signatures of one input with one to three dynamic axes, narrow ones included."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 300)), min_size=1, max_size=3))
    axes = tuple(Axis(name=f"axis{i}", min=low, max=low + more) for i, (low, more) in enumerate(sizes))
    return Signature(inputs=(TensorSpec(name="x", dtype="float32", shape=tuple(a.name for a in axes)),), axes=axes)


@given(ranges(), st.integers(0, 2**32 - 1))
def test_proof_points_are_distinct_in_range_and_six_where_there_are_six(signature: Signature, seed: int) -> None:
    points = proof_points(signature, rng(seed))
    possible = prod(a.max - a.min + 1 for a in signature.axes)
    assert len({tuple(p.items()) for p in points}) == len(points)
    assert len(points) >= min(possible, PROOF_POINTS)
    assert all(a.min <= p[a.name] <= a.max for p in points for a in signature.axes)
    assert points[0] == {a.name: a.min for a in signature.axes}
    assert possible == 1 or points[1] == {a.name: a.max for a in signature.axes}


def test_proof_points_of_an_encoder_hold_the_corners_batch_1_and_odd_sizes() -> None:
    points = proof_points(ENCODER, rng())
    assert points[:3] == [{"batch": 1, "seq": 1}, {"batch": 32, "seq": 512}, {"batch": 1, "seq": 512}]
    assert any(p["batch"] % 2 and p["seq"] % 2 and p["seq"] > 1 for p in points)


def test_a_model_of_fixed_shapes_has_one_point() -> None:
    assert proof_points(parse_inputs(["x:float32[1,3]"]), rng()) == [{}]


@given(ranges(), st.integers(1, 64))
def test_the_middle_point_is_in_range(signature: Signature, batch: int) -> None:
    point = middle_point(signature, batch=batch)
    assert all(a.min <= point[a.name] <= a.max for a in signature.axes)


def test_the_middle_point_of_an_encoder_is_a_usual_request() -> None:
    assert middle_point(ENCODER, batch=8) == {"batch": 8, "seq": 128}


def test_the_lead_axis_is_the_first_where_none_leads_every_tensor() -> None:
    assert lead_axis(ENCODER) == "batch"
    assert lead_axis(parse_inputs(["x:int8[3,n=1..4]", "y:int8[m=1..4]"])) == "n"
    assert lead_axis(parse_inputs(["x:int8[3]"])) == ""


@given(st.integers(0, 2**32 - 1))
def test_token_ids_stay_below_the_vocabulary_and_masks_are_prefixes(seed: int) -> None:
    tensors = sample(ENCODER, {"batch": 5, "seq": 9}, rng(seed))
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    assert ids.shape == mask.shape == (5, 9)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() <= 30521
    assert set(np.unique(mask)) <= {0, 1}
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (mask[:, 0] == 1).all()
    assert mask[0].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_every_dtype_is_sampled_as_itself(dtype: str, shape: tuple[int, ...]) -> None:
    signature = Signature(inputs=(TensorSpec(name="x", dtype=dtype, shape=shape),))
    array = sample(signature, {}, rng())["x"]
    assert isinstance(array, np.ndarray)
    assert (array.dtype, array.shape) == (np.dtype(dtype), shape)
    assert np.isfinite(array.astype(np.float64)).all()


def test_a_range_is_reached_at_both_ends_and_not_left() -> None:
    array = sample(parse_inputs(["x:int8[1000]{-2..2}"]), {}, rng())["x"]
    assert set(np.unique(array)) == {-2, -1, 0, 1, 2}
    floats = sample(parse_inputs(["x:float32[1000]{-2..2}"]), {}, rng())["x"].astype(np.float64)
    assert -2 <= floats.min() < -1.9
    assert 1.9 < floats.max() <= 2


def test_the_same_seed_gives_the_same_inputs_and_another_others() -> None:
    point = {"batch": 4, "seq": 16}
    first, again, other = (sample(ENCODER, point, rng(seed))["input_ids"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unknown_values_are_normal_or_zero_and_one() -> None:
    assert default_values("float16").kind == "normal"
    assert (default_values("int64").low, default_values("int64").high) == (0, 1)
