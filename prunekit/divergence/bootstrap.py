"""Intervals by resampling blocks of positions: what shares a text moves together.

The block bootstrap (Künsch 1989) with documents (or windows) as blocks: a draw takes as many blocks
as there are, with replacement, and averages all their positions, so that a long document weighs by
its length, as it does in the mean. All candidates see the same draws: a difference of two
candidates has an interval of its own, much narrower than theirs where both err at the same places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class BlockBootstrap:
    """Draws over the blocks of some positions.

    Args:
        blocks: (n,) block of each position.
        draws: Number of resamples.
        seed: Seed of the draws: equal seeds and blocks give equal draws.
        level: Coverage of the intervals.
    """

    def __init__(
        self, blocks: NDArray[np.int64], *, draws: int = 2000, seed: int = 0, level: float = 0.95
    ) -> None:
        _, self._index = np.unique(blocks, return_inverse=True)
        self.counts = np.bincount(self._index).astype(np.float64)
        self.blocks = len(self.counts)
        even = np.full(self.blocks, 1 / self.blocks)
        picks = np.random.default_rng(seed).multinomial(self.blocks, even, size=draws)
        self._picks = picks.astype(np.float64)
        self._tail = (1 - level) / 2

    def block_means(self, values: NDArray[Any]) -> Floats:
        """(blocks,) mean of each block."""
        return np.bincount(self._index, np.asarray(values, np.float64)) / self.counts

    def means(self, values: NDArray[Any]) -> Floats:
        """(draws,) mean of each resample of `values` (n,)."""
        sums = np.bincount(self._index, np.asarray(values, np.float64))
        found: Floats = (self._picks @ sums) / (self._picks @ self.counts)
        return found

    def interval(
        self, values: NDArray[Any], of_mean: Callable[[Any], Any] = lambda mean: mean
    ) -> dict[str, float | None]:
        """Mean of `values` (n,), or a monotone function of it, with its percentile interval.

        One block says nothing about the spread: its interval is None.
        """
        mean = float(of_mean(np.mean(np.asarray(values, np.float64))))
        if self.blocks < 2:
            return {"mean": mean, "low": None, "high": None}
        drawn = of_mean(self.means(values))
        low, high = np.quantile(drawn, [self._tail, 1 - self._tail])
        return {"mean": mean, "low": float(low), "high": float(high)}
