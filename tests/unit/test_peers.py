"""The figures of benchmarks/peers.py that a reader has to trust."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from kpdeploy.signature import parse_inputs

PATH = Path(__file__).parents[2] / "benchmarks" / "peers.py"
spec = importlib.util.spec_from_file_location("peers", PATH)
assert spec is not None
assert spec.loader is not None
peers = importlib.util.module_from_spec(spec)
sys.modules["peers"] = peers
spec.loader.exec_module(peers)


def test_ratio_of_equal_rounds_is_one_without_doubt() -> None:
    rounds = [[10.0, 11.0, 12.0]] * 7
    assert peers.ratio_interval(rounds, rounds) == (1.0, 1.0)


def test_slow_rounds_that_hit_both_alike_leave_the_ratio_as_it_is() -> None:
    subject = [[10.0 * slow] * 5 for slow in (1, 1, 3, 1, 1, 2, 1)]
    peer = [[2 * ms for ms in taken] for taken in subject]
    assert peers.ratio_interval(subject, peer) == (2.0, 2.0)


def test_interval_is_wide_where_the_rounds_disagree() -> None:
    subject = [[10.0] * 5] * 8
    peer = [[8.0] * 5, [12.0] * 5] * 4
    low, high = peers.ratio_interval(subject, peer)
    assert low == pytest.approx(0.8)
    assert high == pytest.approx(1.2)


def test_rounds_must_be_those_of_one_run() -> None:
    with pytest.raises(ValueError, match="2 rounds against 1"):
        peers.ratio_interval([[1.0], [1.0]], [[1.0]])


def test_padded_batch_has_lengths_from_the_full_one_down_to_sixteen() -> None:
    signature = parse_inputs(["ids:int64[batch=1..32,seq=1..256]{0..99}", "mask:int64[batch,seq]{mask}"])
    ids, mask = peers.padded_batch(signature, {"batch": 8, "seq": 128})
    assert ids.shape == mask.shape == (8, 128)
    assert mask.sum(axis=1).tolist() == [128, 112, 96, 80, 64, 48, 32, 16]
    assert (np.diff(mask, axis=1) <= 0).all()
