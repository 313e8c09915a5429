"""Block bootstrap against a plain evaluation of the same draws."""

from __future__ import annotations

import numpy as np
import pytest

from prunekit.divergence.bootstrap import BlockBootstrap

DRAW = np.random.default_rng(5)
BLOCKS = np.repeat(np.arange(9), DRAW.integers(1, 30, 9))
VALUES = DRAW.gamma(0.5, size=len(BLOCKS)) * (1 + BLOCKS)


def test_equals_plain_resampling():
    made = BlockBootstrap(BLOCKS, draws=300, seed=4)
    picks = np.random.default_rng(4).multinomial(9, np.full(9, 1 / 9), size=300)
    means = []
    for counts in picks:
        taken = np.concatenate([np.tile(VALUES[b == BLOCKS], counts[b]) for b in range(9)])
        means.append(taken.mean())
    assert made.means(VALUES) == pytest.approx(np.array(means), rel=1e-12)
    found = made.interval(VALUES)
    assert found["mean"] == pytest.approx(VALUES.mean(), rel=1e-12)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    assert made.block_means(VALUES)[3] == pytest.approx(VALUES[BLOCKS == 3].mean())


def test_what_shares_a_block_moves_together():
    # positions of a block are copies: as if there were 9 of them, not 2000
    blocks = np.repeat(np.arange(9), 200)
    level = np.random.default_rng(1).normal(size=9)
    wide = BlockBootstrap(blocks).interval(level[blocks])
    narrow = BlockBootstrap(np.arange(len(blocks)), draws=200).interval(level[blocks])
    assert wide["high"] - wide["low"] > 5 * (narrow["high"] - narrow["low"])


def test_paired_differences_are_narrower_than_each():
    made = BlockBootstrap(BLOCKS)
    other = VALUES + 0.01
    assert made.interval(other - VALUES) == pytest.approx({"mean": 0.01, "low": 0.01, "high": 0.01})
    each = made.interval(VALUES)
    assert each["high"] - each["low"] > 0.1


def test_one_block_has_no_interval():
    found = BlockBootstrap(np.zeros(5, np.int64)).interval(np.arange(5.0))
    assert found == {"mean": 2.0, "low": None, "high": None}


def test_a_function_of_the_mean():
    made = BlockBootstrap(BLOCKS)
    plain, rooted = made.interval(VALUES), made.interval(VALUES, np.sqrt)
    for end in ("mean", "low", "high"):
        assert rooted[end] == pytest.approx(np.sqrt(plain[end]), rel=1e-6)
