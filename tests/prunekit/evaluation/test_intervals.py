"""Intervals: the bootstrap and Wilson's, against theory and at their edges."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import (
    bootstrap_mean,
    mcnemar,
    needed_pairs,
    paired,
    paired_difference,
    wilson,
)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2.0, 5.0, size=500)
    interval = bootstrap_mean(values, draws=20_000)
    half = 1.959964 * values.std() / math.sqrt(500)
    assert interval.mean == pytest.approx(values.mean())
    # Monte-Carlo error of a 2.5 % quantile from 20,000 draws is about 1 % of `half`.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert interval.n == 500
    narrow = bootstrap_mean(values, draws=20_000, level=0.5)
    assert (narrow.high - narrow.low) / (2 * half) == pytest.approx(0.6745 / 1.96, rel=0.05)


def test_bootstrap_leaves_nan_out_and_resamples_whole_rows() -> None:
    values = np.random.default_rng(4).normal(size=(12, 2, 3))
    values[2:7, 0, 1] = np.nan
    values[:, 1, 0] = np.nan
    values[1:, 1, 2] = np.nan
    interval = bootstrap_mean(values, draws=300, seed=7)

    picks = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=300)
    means = np.array(
        [
            [np.nan if np.isnan(c).all() else np.nanmean(c) for c in rows.reshape(12, -1).T]
            for rows in (np.repeat(values, pick, axis=0) for pick in picks)
        ]
    )
    for column, (row, col) in enumerate(np.ndindex(2, 3)):
        valid = np.sort(means[~np.isnan(means[:, column]), column])
        measured = values[:, row, col][~np.isnan(values[:, row, col])]
        assert interval.n[row, col] == len(measured)
        if len(measured) == 0:
            assert np.isnan([interval.mean[row, col], interval.low[row, col]]).all()
            continue
        assert interval.mean[row, col] == pytest.approx(measured.mean())
        if len(measured) < 2:
            assert np.isnan([interval.low[row, col], interval.high[row, col]]).all()
            continue
        edge = round(0.025 * (len(valid) - 1))
        assert interval.low[row, col] == pytest.approx(valid[edge])
        assert interval.high[row, col] == pytest.approx(valid[-1 - edge])


def test_bootstrap_edges() -> None:
    infinite = bootstrap_mean([1.0, math.inf, 2.0, 3.0])
    assert infinite.mean == infinite.high == math.inf
    assert infinite.low < math.inf  # some resamples miss the infinite value
    one = bootstrap_mean([4.0])
    assert (one.mean, one.n) == (4.0, 1)
    assert math.isnan(one.low) and math.isnan(one.high)
    same = bootstrap_mean(np.full(9, 0.1))
    assert same.low == pytest.approx(0.1) and same.high == pytest.approx(0.1)
    wide = np.random.default_rng(0).normal(size=(6, 5000))  # more columns than one chunk
    assert bootstrap_mean(wide, draws=50).low[4999] == pytest.approx(
        bootstrap_mean(wide[:, 4999], draws=50).low
    )
    for bad in ([], 3.0):
        with pytest.raises(PrunekitError, match="at least one row"):
            bootstrap_mean(bad)
    with pytest.raises(PrunekitError, match="between 0 and 1"):
        bootstrap_mean([1.0], level=95)


def test_wilson() -> None:
    # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 1/2, n = 10, z = 1.959964.
    half = wilson(5, 10)
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    z2 = 1.959964**2
    none = wilson(0, 20)
    assert none.low == 0 and none.high == pytest.approx(z2 / (20 + z2), rel=1e-6)
    every = wilson(20, 20)
    assert every.high == 1 and every.low == pytest.approx(20 / (20 + z2), rel=1e-6)
    for successes, n in ((3, 2), (-1, 5), (0, 0)):
        with pytest.raises(PrunekitError, match="pass 0 <= successes"):
            wilson(successes, n)


def test_paired_difference_by_hand() -> None:
    first, second = [1, 1, 0, 0, 1], [1, 0, 1, 0, 0]
    found = paired_difference(first, second, draws=500, seed=3)
    assert found.mean == pytest.approx(-1 / 5) and found.n == 5
    picks = np.random.default_rng(3).multinomial(5, np.full(5, 1 / 5), size=500)
    means = np.sort(picks @ np.array([0.0, -1, 1, 0, -1]) / 5)
    low = round(0.025 * 499)
    assert (found.low, found.high) == (pytest.approx(means[low]), pytest.approx(means[499 - low]))
    assert paired_difference(first, second, draws=500, seed=3) == found
    gap = paired_difference([1.0, math.nan, 0.0], [0.0, 1.0, 0.0])
    assert gap.n == 2 and gap.mean == pytest.approx(-0.5)
    with pytest.raises(PrunekitError, match=r"shapes \(2,\) and \(3,\)"):
        paired_difference([1, 0], [1, 0, 1])


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 x 1/2
        (0, 6, 2 / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (5, 5, 1.0),  # twice the tail exceeds 1
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (0, 1100, 0.0),  # 2^-1099 underflows; the quotient of integers must not overflow
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-15, abs=0)


def test_mcnemar_sums_its_tail_exactly() -> None:
    tail = sum(Fraction(math.comb(1301, k), 2**1301) for k in range(601))
    assert mcnemar(600, 701) == float(2 * tail)
    with pytest.raises(PrunekitError, match="-1 gained and 2 lost"):
        mcnemar(-1, 2)


def test_paired_counts_flips_both_ways() -> None:
    found = paired([True, True, False, False, True], [True, False, True, False, False])
    assert (found.gained, found.lost, found.p) == (1, 2, 1.0)
    assert found.difference == paired_difference([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    same = paired([True, False], [True, False])
    assert (same.difference.low, same.difference.high, same.p) == (0.0, 0.0, 1.0)


def test_paired_interval_covers_the_true_difference() -> None:
    """Coverage over 2000 simulated sets of 100 questions whose answers go together.

    P(both right) = 0.5, only the first 0.2, only the second 0.12: the true difference is -0.08.
    The standard error of a coverage of 95 % over 2000 sets is 0.5 %.
    """
    cases = np.random.default_rng(11).choice(4, p=[0.5, 0.2, 0.12, 0.18], size=(100, 2000))
    first, second = np.isin(cases, (0, 1)), np.isin(cases, (0, 2))
    found = paired_difference(first, second, draws=1000)
    covered = np.mean((np.asarray(found.low) <= -0.08) & (np.asarray(found.high) >= -0.08))
    assert 0.93 <= covered <= 0.97
    # the two models' questions go together, so pairing must narrow the interval
    unpaired = np.var(first, 0) + np.var(second, 0)
    width = np.asarray(found.high) - np.asarray(found.low)
    assert width.mean() < 0.9 * (2 * 1.96 * np.sqrt(unpaired / 100)).mean()


def test_how_many_questions_two_points_would_take():
    # Connor 1987, equation 7, by hand: psi = 0.1, delta = 0.02
    root = 1.959964 * 0.1**0.5 + 0.841621 * (0.1 - 0.0004) ** 0.5
    assert needed_pairs(20, 200) == math.ceil(root**2 / 0.0004)
    assert needed_pairs(40, 200) > needed_pairs(20, 200) > needed_pairs(2, 200)
    # no change seen is not no change: the upper end of Wilson's interval stands in
    assert needed_pairs(0, 50) > needed_pairs(0, 500) >= needed_pairs(10, 500)
    assert needed_pairs(20, 200, difference=0.1) < needed_pairs(20, 200) / 20
    with pytest.raises(PrunekitError, match="difference is 0"):
        needed_pairs(1, 2, difference=0)


@pytest.mark.slow
@pytest.mark.parametrize(("gained", "lost"), [(0.05, 0.10), (0.04, 0.06), (0.15, 0.15)])
def test_so_many_questions_show_the_difference_with_the_power_asked_for(gained, lost):
    changed = round(1000 * (gained + lost))
    needed = needed_pairs(changed, 1000, difference=abs(lost - gained) or 0.05)
    draw = np.random.default_rng(3)
    pairs = draw.multinomial(needed, [gained, lost, 1 - gained - lost], size=4000)
    z = (pairs[:, 0] - pairs[:, 1]) / np.sqrt(np.maximum(pairs[:, 0] + pairs[:, 1], 1))
    seen = float(np.mean(np.abs(z) > 1.96))
    assert 0.03 < seen < 0.07 if lost == gained else 0.77 < seen < 0.83


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "gained", "lost"),
    [(200, 0.05, 0.10), (200, 0.15, 0.15), (200, 0.03, 0.12), (500, 0.02, 0.06), (100, 0.2, 0.3)],
)
def test_paired_intervals_cover_what_they_promise(n, gained, lost):
    """95 % intervals over 4000 synthetic pairs of models cover the true difference 93 to 97 %."""
    truth, covered, made = gained - lost, 0, 0
    draw = np.random.default_rng(17)
    for seed in range(10):  # every block of 400 pairs shares its resamples
        kinds = draw.choice(3, (n, 400), p=[gained, lost, 1 - gained - lost])
        agree = draw.random((n, 400)) < 0.5  # where both are alike: both right or both wrong
        first = np.where(kinds == 2, agree, kinds == 1)
        second = np.where(kinds == 2, agree, kinds == 0)
        found = paired_difference(first, second, seed=seed)
        covered += int(np.sum((found.low <= truth) & (truth <= found.high)))
        made += 400
    assert 0.93 <= covered / made <= 0.97, covered / made
