"""The measure of a proof: ‖out − ref‖ / ‖ref‖, and what is never equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpdeploy.artifact import Comparison, Verdict
from kpdeploy.compare import TOLERANCES, Budget, agreement, compare, least_cosine, relative_error, tolerance, worst_of
from kpdeploy.errors import UnknownName

INF, NAN = float("inf"), float("nan")


def floats(*values: float, dtype: str = "float32") -> np.ndarray:
    return np.array(values, dtype)


def test_equal_answers_have_no_error() -> None:
    assert relative_error(floats(1, 2), floats(1, 2)) == 0


def test_the_error_is_relative_to_the_length_of_the_reference() -> None:
    assert relative_error(floats(3, 4.5), floats(3, 4)) == pytest.approx(0.1)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), st.floats(0.5, 64))
def test_the_error_does_not_depend_on_the_scale(values: list[float], scale: float) -> None:
    ref = np.array(values, np.float64)
    out = ref + 1e-3 * np.abs(ref).max()
    if np.linalg.norm(ref):
        assert relative_error(out * scale, ref * scale) == pytest.approx(relative_error(out, ref), rel=1e-6)


def test_half_precision_does_not_overflow_while_it_is_measured() -> None:
    ref = np.full(1000, 60000, np.float16)
    assert relative_error(ref, ref) == 0
    assert 0 < relative_error(np.nextafter(ref, np.float16(0)), ref) < 1e-3


def test_a_reference_of_zeros_gives_the_absolute_error() -> None:
    assert relative_error(floats(0, 3e-6), floats(0, 0)) == pytest.approx(3e-6)
    assert relative_error(floats(0, 0), floats(0, 0)) == 0


def test_empty_answers_are_equal() -> None:
    assert relative_error(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)) == 0


@pytest.mark.parametrize(
    ("out", "ref"),
    [
        (floats(NAN, 1), floats(2, 1)),
        (floats(2, 1), floats(NAN, 1)),
        (floats(INF, 1), floats(2, 1)),
        (floats(2, 1), floats(INF, 1)),
        (floats(INF, 1), floats(-INF, 1)),
        (floats(INF, 1), floats(NAN, 1)),
        (floats(1, 2), floats(1, 2, 3)),
        (floats(1), np.float32(1).reshape(1, 1)),
        (np.array([1, 2]), floats(1, 2)),
        (floats(1, 0), np.array([True, False])),
        (np.zeros((0, 3), np.float32), np.zeros((3, 0), np.float32)),
    ],
)
def test_nan_infinities_shapes_and_kinds_that_differ_are_infinitely_far(out: np.ndarray, ref: np.ndarray) -> None:
    assert relative_error(out, ref) == INF


def test_the_same_nan_and_infinities_are_left_out() -> None:
    assert relative_error(floats(NAN, INF, -INF, 4), floats(NAN, INF, -INF, 4)) == 0
    assert relative_error(floats(-INF, 5), floats(-INF, 4)) == pytest.approx(0.25)


def test_integers_and_bools_are_measured_by_the_share_that_differs() -> None:
    assert relative_error(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4])) == 0.25
    assert relative_error(np.array([True, False]), np.array([True, True])) == 0.5


@pytest.mark.parametrize(("dtype", "kind"), [("bool", "integer"), ("uint8", "integer"), ("int64", "integer")])
def test_integers_have_no_tolerance(dtype: str, kind: str) -> None:
    assert tolerance(dtype, TOLERANCES) == TOLERANCES[kind] == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_tolerance_of_floats_is_above_their_rounding(dtype: str) -> None:
    assert np.finfo(dtype).eps < tolerance(dtype, TOLERANCES) < 4096 * math.sqrt(np.finfo(dtype).eps)


def test_outputs_are_compared_by_name() -> None:
    ref = {"a": floats(1, 2), "b": np.array([1, 2])}
    found = compare({"b": np.array([1, 2]), "a": floats(1, 2), "more": floats(1)}, ref, TOLERANCES)
    assert [(c.output, c.error, c.tolerance, c.passed) for c in found] == [("a", 0, 1e-5, True), ("b", 0, 0, True)]


def test_an_absent_output_fails() -> None:
    (found,) = compare({"wrong name": floats(1)}, {"a": floats(1)}, TOLERANCES)
    assert found.error == INF
    assert not found.passed


@pytest.mark.parametrize(("error", "passed"), [(0, True), (1e-5, True), (1.1e-5, False), (INF, False), (NAN, False)])
def test_a_comparison_passes_up_to_its_tolerance(error: float, passed: bool) -> None:
    assert Comparison(output="a", error=error, tolerance=1e-5).passed is passed


def test_a_verdict_passes_when_all_outputs_do_and_names_the_worst() -> None:
    good, near = (Comparison(output=name, error=e, tolerance=1e-5) for name, e in (("good", 1e-7), ("near", 9e-6)))
    bad = Comparison(output="bad", error=0.5, tolerance=0)
    verdict = Verdict(comparisons=(good, near), points=6, max_batch_size=8)
    assert verdict.passed
    assert verdict.worst is near
    assert not Verdict(comparisons=(good, near, bad), points=6, max_batch_size=8).passed


def test_a_verdict_on_nothing_is_no_pass() -> None:
    assert not Verdict(comparisons=(), points=0, max_batch_size=0).passed


def test_the_least_cosine_is_of_the_worst_row() -> None:
    ref = np.array([[1, 0], [1, 0], [0, 0]], np.float32)
    out = np.array([[2, 0], [1, 1], [0, 0]], np.float32)
    assert least_cosine(out, ref) == pytest.approx(2**-0.5)
    assert least_cosine(ref, ref) == 1.0
    assert least_cosine(np.full_like(ref, np.nan), ref) == 0.0
    assert least_cosine(ref[:, :1], ref) == 0.0
    assert least_cosine(np.array([1, 2]), np.array([2, 1])) == 1.0
    assert least_cosine(ref[:0], ref[:0]) == 1.0


def test_top_1_is_the_share_of_rows_with_the_same_largest_element() -> None:
    ref = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 5.0], [1.0, 0.0]], np.float32)
    out = ref.copy()
    assert agreement(out, ref) == 1
    out[2] = [6, 5]
    assert agreement(out, ref) == 0.75
    out[0] = np.nan
    assert agreement(out, ref) == 0.5
    assert agreement(out[:2], ref) == 0
    assert agreement(np.array([1, 2]), np.array([2, 1])) == 1
    assert agreement(ref[:0], ref[:0]) == 1


@pytest.mark.parametrize(
    ("text", "metric", "bound", "shown"),
    [
        ("1e-2", "error", 1e-2, "error 0.01"),
        (0.2, "error", 0.2, "error 0.2"),
        ("error=3", "error", 3, "error 3"),
        ("cosine=0.99", "cosine", 0.01, "cosine 0.99"),
        (" top1 = 0.995", "top1", 0.005, "top1 0.995"),
    ],
)
def test_a_budget_is_read_as_users_write_it(text: str | float, metric: str, bound: float, shown: str) -> None:
    budget = Budget.parse(text)
    assert (budget.metric, str(budget)) == (metric, shown)
    assert budget.bound == pytest.approx(bound)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "nan", "inf", "cosine=1", "cosine=0", "cosine=x", "f1=0.9", "top1=1.2"]
)
def test_what_is_no_budget_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UnknownName) as told:
        Budget.parse(text)
    assert "cosine=0.99" in told.value.next_step


def test_a_cosine_that_was_asked_for_judges_in_place_of_the_error() -> None:
    ref = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    scaled = {"y": 3 * ref, "n": np.array([1, 2])}
    y, n = compare(scaled, {"y": ref, "n": np.array([1, 2])}, Budget.parse("cosine=0.99").tolerances)
    assert y.passed
    assert str(y) == "cosine 1.0000 / 0.99"
    assert (n.metric, n.passed) == ("error", True)
    turned = {"y": ref[:, ::-1].copy(), "n": np.array([1, 3])}
    found = compare(turned, {"y": ref, "n": np.array([1, 2])}, Budget.parse("cosine=0.99").tolerances)
    assert not any(c.passed for c in found)
    (absent,) = compare({}, {"y": ref}, Budget.parse("top1=0.9").tolerances)
    assert not absent.passed


def test_a_budget_measures_several_tensors_by_the_worst() -> None:
    ref = [np.array([[1.0, 0.0]], np.float32), np.array([1, 2, 3, 4])]
    out = [np.array([[1.0, 0.1]], np.float32), np.array([1, 2, 3, 5])]
    assert Budget.parse("cosine=0.9").distance(out, ref) == 0.25
    assert Budget.parse("cosine=0.9").distance(out[:1], ref[:1]) == pytest.approx(1 - 1 / np.sqrt(1.01))


def test_top_1_is_a_share_of_all_answers_and_the_others_are_of_the_worst() -> None:
    ref = {"y": np.array([[1.0, 0.0]], np.float32)}
    right, wrong = {"y": np.array([[0.9, 0.1]], np.float32)}, {"y": np.array([[0.0, 1.0]], np.float32)}
    tolerances = Budget.parse("top1=0.7").tolerances
    found = [c for answer in (right, right, right, wrong) for c in compare(answer, ref, tolerances)]
    (pooled,) = worst_of(found)
    assert (pooled.error, pooled.top1, pooled.passed, str(pooled)) == (0.25, 0.75, True, "top1 0.7500 / 0.7")
    assert not worst_of([*found, *compare({}, ref, tolerances)])[0].passed
    assert Budget.parse("top1=0.7").of_all([0, 0, 0, 1]) == 0.25
    assert Budget.parse("cosine=0.7").of_all([0, 0, 0, 1]) == 1
