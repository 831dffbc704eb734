"""Merging requests of different sizes: padding, grouping, cutting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpdeploy.runtimes import ragged

SHAPES = (("batch", "seq"), ("batch", "seq", 2))


def test_what_is_merged_is_padded_by_zeros_and_cut_to_itself() -> None:
    parts = [np.full((rows, seq, 2), seq, np.int64) for rows, seq in ((1, 3), (2, 1), (1, 4))]
    whole = ragged.merge(parts)
    assert (whole.shape, whole.dtype) == ((4, 4, 2), np.int64)
    first = 0
    for part in parts:
        rows, seq = part.shape[:2]
        np.testing.assert_array_equal(ragged.cut(whole, SHAPES[1], first, rows, {"seq": seq}), part)
        assert not whole[first : first + rows, seq:].any()
        first += rows


def test_an_output_without_the_axis_is_cut_to_its_rows_only() -> None:
    embedding = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(ragged.cut(embedding, ("batch", 3), 1, 2, {"seq": 1}), embedding[1:3])


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ((1, 5), (1, 5, 2), {"seq": 5}),
        # Inputs that disagree must not become right by padding, nor is anything proven beyond the range.
        ((1, 5), (1, 6, 2), None),
        ((1, 9), (1, 9, 2), None),
    ],
)
def test_a_request_has_one_size_along_an_axis_and_within_its_range(
    first: tuple[int, ...], second: tuple[int, ...], wanted: dict[str, int] | None
) -> None:
    assert ragged.sizes([np.zeros(first), np.zeros(second)], SHAPES, {"seq": 8}) == wanted


def test_near_lengths_share_a_call_and_far_ones_do_not() -> None:
    assert ragged.groups([1, 1, 1], [10, 12, 11]) == [[1, 2, 0]]
    assert ragged.groups([1, 1, 1], [10, 500, 11]) == [[1], [2, 0]]
    # Rows count: what one row may waste eight may not.
    assert ragged.groups([1, 8], [20, 16]) == [[0], [1]]


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 512)), min_size=1, max_size=40))
def test_every_request_runs_once_and_no_call_is_padded_by_more_than_a_call_costs(
    requests: list[tuple[int, int]],
) -> None:
    rows, lengths = zip(*requests, strict=True)
    groups = ragged.groups(rows, lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(requests)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert sum((longest - lengths[i]) * rows[i] for i in group) <= ragged.CALL
