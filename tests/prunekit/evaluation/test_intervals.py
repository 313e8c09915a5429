"""Intervals: the bootstrap and Wilson's, against theory and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import bootstrap_mean, wilson


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
