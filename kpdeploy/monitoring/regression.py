"""The detector: are these latencies worse than those? By window values, never by single calls, which are correlated.

Worse means all of: significant (a rank test), large enough to matter (the effect), enough windows, and persistent. The
study that chose this is benchmarks/detectors.py. The rank tests are Mann and Whitney's (1947) for independent windows
and Wilcoxon's (1945) for interleaved pairs, both in their normal approximation with ties, good from ten windows on;
the estimates are those of Hodges and Lehmann (1963).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

T_99 = (31.821, 6.965, 4.541, 3.747, 3.365, 3.143, 2.998, 2.896)
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860)
"""Student's t of 1 to 8 degrees of freedom, one-sided; the last is good for more, and a little strict."""

Outcome = Literal["regressed", "improved", "equal", "unknown"]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """When a difference is a regression.

    `significance`: the largest p of the rank test, over all looks together: `looks` says how often the same question
    will be asked at most, and each look gets its share. `effect`: the smallest ratio - 1 that matters. `windows`: the
    fewest on each side. `persistence`: the share of the parts of the new windows that must show half of the effect.
    """

    significance: float = 1e-3
    effect: float = 0.05
    windows: int = 20
    persistence: float = 0.75
    looks: int = 1


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a comparison showed. `ratio` is new / old, with the bounds of its 90 % interval; `p` is that of "no worse",
    `p_better` that of "no better"."""

    outcome: Outcome
    ratio: float
    low: float
    high: float
    p: float
    p_better: float
    windows: int
    reason: str


def judge(old: Sequence[float], new: Sequence[float], criteria: Criteria, *, parts: int = 2) -> Judgement:
    """Compare independent windows: those of a baseline with those of now, for instance. Larger is worse.

    `parts`: into how many pieces the new windows are cut, in time, to see whether the difference persists.
    """
    before, after = _log(old), _log(new)
    if min(len(before), len(after)) < criteria.windows:
        return _too_few(min(len(before), len(after)), criteria)
    p, p_better = mann_whitney(before, after), mann_whitney(after, before)
    differences = np.sort(np.subtract.outer(after, before), axis=None)
    spread = math.sqrt(len(before) * len(after) * (len(before) + len(after) + 1) / 12)
    middle = np.median(before)
    pieces = [float(np.median(piece) - middle) for piece in np.array_split(after, parts)]
    return _judged(differences, spread, p, p_better, pieces, criteria, windows=min(len(before), len(after)))


def judge_pairs(
    old: Sequence[float], new: Sequence[float], criteria: Criteria, *, blocks: Sequence[int] = ()
) -> Judgement:
    """Compare interleaved windows: `old[i]` and `new[i]` were taken side by side, so that what slows the machine slows
    both. `blocks[i]` is the block of a pair, such as the pair of processes it was measured in: what all windows of a
    block share is no evidence, so that the medians of the blocks must tell the same, by their own spread."""
    difference = _log(new) - _log(old)
    count = len(difference)
    if count < criteria.windows:
        return _too_few(count, criteria)
    p, p_better = signed_rank(difference), signed_rank(-difference)
    first, second = np.triu_indices(count)
    averages = np.sort((difference[first] + difference[second]) / 2)
    spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    numbers = np.asarray(blocks) if len(blocks) else np.repeat([0, 1], [count // 2, count - count // 2])
    pieces = [float(np.median(difference[numbers == number])) for number in np.unique(numbers)]
    found = _judged(averages, spread, p, p_better, pieces, criteria, windows=count)
    return _among_blocks(found, pieces, criteria) if len(blocks) else found


def first_alarm(
    old: Sequence[float],
    new: Sequence[float],
    criteria: Criteria,
    *,
    every: int = 5,
    confirm: int = 3,
) -> int | None:
    """Watch windows as they come: after how many new ones a regression was known; None if it never was.

    Every `every` windows the newest `criteria.windows` are judged, each look with its share of the significance. Noise
    of a machine comes in waves that last several windows: `confirm` looks in a row must agree.
    """
    ends = range(criteria.windows, len(new) + 1, every)
    share = replace(criteria, looks=max(1, len(ends)))
    row = 0
    for end in ends:
        row = row + 1 if judge(old, new[end - criteria.windows : end], share).outcome == "regressed" else 0
        if row == confirm:
            return end
    return None


def _log(values: Sequence[float]) -> Values:
    """Ratios are what is compared: a machine that is twice as slow has twice the noise."""
    logs: Values = np.log(np.maximum(np.asarray(values, float), 1e-12))
    return logs


def _too_few(count: int, criteria: Criteria) -> Judgement:
    reason = f"{count} windows, {criteria.windows} are needed"
    return Judgement(
        outcome="unknown", ratio=1, low=0, high=math.inf, p=1, p_better=1, windows=count, reason=reason
    )  # fmt: skip


def _judged(
    shifts: Values,
    spread: float,
    p: float,
    p_better: float,
    pieces: Sequence[float],
    criteria: Criteria,
    *,
    windows: int,
) -> Judgement:
    """By all pairwise shifts (sorted): their median estimates the effect, their order statistics bound it."""
    reach = 1.645 * spread
    place = (len(shifts) - 1) / 2
    low, high = (float(shifts[int(min(max(place + side, 0), len(shifts) - 1))]) for side in (-reach, reach))
    found = Judgement(
        outcome="unknown", ratio=math.exp(float(np.median(shifts))), low=math.exp(low), high=math.exp(high),
        p=p, p_better=p_better, windows=windows, reason="",
    )  # fmt: skip
    bar, share = math.log1p(criteria.effect), criteria.significance / criteria.looks
    agreeing = np.mean([piece >= bar / 2 for piece in pieces])
    if p < share and found.ratio >= 1 + criteria.effect:
        if agreeing >= criteria.persistence:
            return replace(found, outcome="regressed", reason=f"{found.ratio - 1:+.1%}, p {p:.1e}")
        return replace(found, reason=f"{found.ratio - 1:+.1%}, but only in {agreeing:.0%} of the parts")
    if high < bar:
        better = p_better < share and found.ratio <= 1 / (1 + criteria.effect)
        return replace(found, outcome="improved" if better else "equal", reason=f"{found.ratio - 1:+.1%}")
    return replace(
        found, reason=f"{low:+.1%} to {high:+.1%} is too wide to tell" if low < bar else "not yet significant"
    )


def _among_blocks(found: Judgement, pieces: Sequence[float], criteria: Criteria) -> Judgement:
    """The judgement, or unknown where the blocks differ so much among each other that few more could turn it."""
    if found.outcome == "unknown":
        return found
    middle, degrees = float(np.mean(pieces)), len(pieces) - 1
    error = float(np.std(pieces, ddof=1)) / math.sqrt(len(pieces)) if degrees else math.inf
    sure, bound = (t[min(degrees, len(t)) - 1] * error for t in (T_99, T_95))
    doubtful = middle - sure <= 0 if found.outcome == "regressed" else middle + bound >= math.log1p(criteria.effect)
    if not doubtful:
        return found
    return replace(found, outcome="unknown", reason=f"{found.ratio - 1:+.1%}, but the blocks differ too much to tell")


def mann_whitney(old: Values, new: Values) -> float:
    """The p of "new is no larger than old", one-sided."""
    n, m = len(old), len(new)
    ranks, ties = _ranks(np.concatenate([old, new]))
    u = ranks[n:].sum() - m * (m + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    return _tail(u - n * m / 2, variance)


def signed_rank(differences: Values) -> float:
    """The p of "the differences are no larger than 0", one-sided; those that are 0 are left out."""
    kept = differences[differences != 0]
    n = len(kept)
    ranks, ties = _ranks(np.abs(kept))
    variance = n * (n + 1) * (2 * n + 1) / 24 - ties / 48
    return _tail(ranks[kept > 0].sum() - n * (n + 1) / 4, variance)


def _ranks(values: Values) -> tuple[Values, float]:
    """Ranks from 1, equal values sharing theirs; and the sum of t³ - t over groups of t equal values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place], float((counts.astype(float) ** 3 - counts).sum())


def _tail(above: float, variance: float) -> float:
    """P(a normal variable > above), with the correction for continuity."""
    return 1.0 if variance <= 0 else 0.5 * math.erfc((above - 0.5) / math.sqrt(2 * variance))
