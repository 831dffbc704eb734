"""The detector against SciPy, and against series whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from kpdeploy.monitoring.regression import Criteria, judge, judge_pairs, mann_whitney, signed_rank

CRITERIA = Criteria()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("digits", [9, 1], ids=["distinct", "ties"])
def test_the_rank_tests_are_those_of_scipy(seed: int, digits: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="NOT RUN: SciPy, the reference, is not installed")
    rng = np.random.default_rng(seed)
    old, new = rng.normal(0, 1, 25).round(digits), rng.normal(0.4, 1, 31).round(digits)
    wanted = stats.mannwhitneyu(new, old, alternative="greater", method="asymptotic").pvalue
    assert mann_whitney(old, new) == pytest.approx(wanted, rel=1e-9)
    differences = rng.normal(0.2, 1, 40).round(digits)
    wanted = stats.wilcoxon(differences, alternative="greater", method="approx", correction=True).pvalue
    assert signed_rank(differences) == pytest.approx(wanted, rel=1e-9)


def series(rng: np.random.Generator, level: float, count: int = 40, noise: float = 0.02) -> list[float]:
    return (level * np.exp(rng.normal(0, noise, count))).tolist()


@pytest.mark.parametrize(
    ("level", "outcome"), [(1.0, "equal"), (1.1, "regressed"), (0.85, "improved"), (1.03, "equal")]
)
def test_each_outcome_is_found(level: float, outcome: str) -> None:
    rng = np.random.default_rng(1)
    old, new = series(rng, 20), series(rng, 20 * level)
    assert judge(old, new, CRITERIA).outcome == outcome
    assert judge_pairs(old, new, CRITERIA).outcome == outcome
    assert judge(old, new, CRITERIA).ratio == pytest.approx(level, rel=0.02)


def test_too_few_windows_tell_nothing() -> None:
    found = judge([1.0] * 60, [2.0] * 19, CRITERIA)
    assert (found.outcome, found.windows) == ("unknown", 19)
    assert "20 are needed" in found.reason


def test_noise_that_hides_the_effect_is_not_called_equal() -> None:
    rng = np.random.default_rng(2)
    assert judge_pairs(series(rng, 1, 20, 0.5), series(rng, 1, 20, 0.5), CRITERIA).outcome == "unknown"


def test_pairs_see_through_noise_that_hits_both_sides() -> None:
    rng = np.random.default_rng(3)
    machine = np.exp(rng.normal(0, 0.5, 24))
    old, new = machine * series(rng, 20, 24), machine * series(rng, 22, 24)
    assert judge_pairs(old.tolist(), new.tolist(), CRITERIA).outcome == "regressed"
    assert judge(old.tolist(), new.tolist(), CRITERIA).outcome == "unknown"


def test_a_difference_of_one_block_only_is_not_a_regression() -> None:
    rng = np.random.default_rng(4)
    old = series(rng, 20, 60)
    new = [*series(rng, 24, 40), *series(rng, 20, 20)]
    found = judge_pairs(old, new, CRITERIA, blocks=[0] * 20 + [1] * 20 + [2] * 20)
    assert found.outcome == "unknown"
    assert "only in 67% of the parts" in found.reason


@pytest.mark.parametrize(
    ("shared", "outcome"),
    [
        ((0.09, 0.10, 0.11), "regressed"),
        ((0.03, 0.16), "unknown"),
        ((0.0, 0.01, -0.01), "equal"),
        ((0.05, -0.06), "unknown"),
    ],
)
def test_what_the_windows_of_a_block_share_is_no_evidence(shared: tuple[float, ...], outcome: str) -> None:
    rng = np.random.default_rng(6)
    blocks = np.repeat(range(len(shared)), 12)
    old, new = series(rng, 20, len(blocks), 0.01), series(rng, 20, len(blocks), 0.01)
    shifted = (new * np.exp(np.take(shared, blocks))).tolist()
    found = judge_pairs(old, shifted, CRITERIA, blocks=blocks.tolist())
    assert found.outcome == outcome, found


def test_more_looks_ask_for_more_evidence() -> None:
    rng = np.random.default_rng(5)
    old, new = series(rng, 20, 20, 0.09), series(rng, 22, 20, 0.09)
    once = judge(old, new, Criteria(significance=0.01))
    many = judge(old, new, Criteria(significance=0.01, looks=1000))
    assert once.outcome == "regressed"
    assert many.outcome == "unknown"
