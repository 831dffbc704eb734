"""Which graphs a program has, and which of them a request runs in."""

from __future__ import annotations

import numpy as np
import pytest

from kpdeploy.export.cuda import Form, buckets, described
from kpdeploy.runtimes.buckets import Ladder, pack
from kpdeploy.signature import parse_inputs

TEXT = parse_inputs(("ids:int64[batch=1..6,seq=1..100]", "mask:int64[batch,seq]{mask}"))


def test_buckets_are_powers_of_two_and_usual_lengths_with_the_ends_of_each_axis() -> None:
    found = buckets(TEXT, dropped=False)
    assert sorted({b["batch"] for b in found}) == [1, 2, 4, 6]
    assert sorted({b["seq"] for b in found}) == [1, 16, 32, 64, 100]
    assert len(found) == 20


def test_without_padding_a_row_alone_has_one_bucket_a_length_and_batches_have_shares() -> None:
    found = buckets(parse_inputs(("ids:int64[batch=1..32,seq=1..512]", "mask:int64[batch,seq]{mask}")), dropped=True)
    tokens = {(b["batch"], b["seq"]): [] for b in found}
    for b in found:
        tokens[b["batch"], b["seq"]].append(b["tokens"])
    assert tokens[1, 128] == [128]
    assert tokens[2, 64] == [64, 128]
    assert tokens[8, 128] == [256, 384, 512, 640, 768, 896, 1024]
    assert tokens[32, 512] == list(range(4096, 16385, 1024))


def test_a_length_that_is_fixed_has_places_for_tokens_too() -> None:
    found = buckets(parse_inputs(("ids:int64[batch=1..8,128]", "mask:int64[batch,128]{mask}")), dropped=True)
    assert [b["tokens"] for b in found if b["batch"] == 1] == [128]
    assert max(b["tokens"] for b in found if b["batch"] == 8) == 1024


def test_a_fixed_model_has_one_bucket() -> None:
    assert buckets(parse_inputs(("x:float32[3,4]",)), dropped=False) == [{}]


BUCKETS = [
    {"batch": 4, "seq": 32, "tokens": 128},
    {"batch": 4, "seq": 32, "tokens": 64},
    {"batch": 2, "seq": 64, "tokens": 64},
]


@pytest.mark.parametrize(
    ("sizes", "padded", "index"),
    [
        ({"batch": 3, "seq": 20, "tokens": 50}, ("batch", "seq"), 1),
        ({"batch": 3, "seq": 20, "tokens": 65}, ("batch", "seq"), 0),
        # As many tokens, fewer places.
        ({"batch": 2, "seq": 30, "tokens": 60}, ("batch", "seq"), 1),
        ({"batch": 2, "seq": 40, "tokens": 60}, ("batch", "seq"), 2),
        ({"batch": 5, "seq": 20, "tokens": 60}, ("batch", "seq"), None),
        # An axis that zeros must not fill up is met, or not.
        ({"batch": 3, "seq": 20, "tokens": 50}, ("batch",), None),
        ({"batch": 3, "seq": 32, "tokens": 50}, ("batch",), 1),
    ],
)
def test_a_request_runs_in_the_bucket_with_the_least_to_do(
    sizes: dict[str, int], padded: tuple[str, ...], index: int | None
) -> None:
    shapes = {"inputs": [("batch", "seq")], "outputs": [("batch", 7), ("batch", "seq")]}
    ladder = Ladder({"buckets": BUCKETS, "padded": padded, **shapes})
    request = [np.empty((sizes["batch"], sizes["seq"]))]
    for _ in range(2):  # what is known of these shapes is the same
        found, cuts = ladder.find(request, sizes["tokens"])
        assert found == index
        assert cuts == [
            (slice(sizes["batch"]), slice(None)),
            (slice(sizes["batch"]), slice(sizes["seq"])),
        ]


def test_a_ladder_without_tokens_has_room_for_any_and_forgets_shapes_before_they_are_too_many() -> None:
    ladder = Ladder({"buckets": [{"n": 8}, {"n": 4}], "padded": ["n"], "inputs": [("n",)], "outputs": [("n",)]})
    ladder.KEPT = 3
    assert [ladder.find([np.empty(n)], 99)[0] for n in (1, 4, 5, 8, 9)] == [1, 1, 0, 0, None]
    assert len(ladder.known) <= 3


@pytest.mark.parametrize("columns", [3, 5])
def test_tokens_come_from_their_places_and_spare_ones_go_behind_the_batch(columns: int) -> None:
    mask = np.zeros((3, columns), np.int64)
    mask[:, :3] = [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    places = [row * columns + column for row, column in ((0, 0), (0, 1), (2, 0), (2, 1), (2, 2))]
    sources, targets, begins = (np.full(size, -1, np.int64) for size in (7, 7, 4))
    pack(mask, sources, targets, begins)
    assert sources.tolist() == [*places, 0, 0]
    assert targets.tolist() == [*places, mask.size, mask.size]
    assert begins.tolist() == [0, 2, 2, 5]


def test_graphs_json_names_the_mask_only_where_padding_is_dropped() -> None:
    assert described(TEXT, Form(dropped=True, padded=("batch",)), "cuda")["mask"] == 1
    plain = described(TEXT, Form(padded=("batch",)), "cuda")
    assert plain["mask"] is None
    assert plain["dtypes"] == ["int64", "int64"]
