"""Intervals for scores: bootstrap over prompts, Wilson's for accuracies, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prunekit.errors import PrunekitError

# Columns resampled at once: bounds the memory at draws x this many float64.
_COLUMNS_PER_CHUNK = 4096

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: Point estimate: a float, or an array when every entry is one of many quantities.
        low: Lower end, like `mean`; NaN where fewer than two values leave the spread unknown.
        high: Upper end, like `low`.
        n: Number of values behind `mean`: an int, or an array of them.
    """

    mean: float | Floats
    low: float | Floats
    high: float | Floats
    n: int | NDArray[np.int64]


def bootstrap_mean(
    values: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean over the first axis with a percentile bootstrap interval (Efron 1979).

    The first axis is the sampling unit (prompts): whole entries are resampled with replacement, the
    same ones for every column, so what goes together within a prompt stays together. NaN means
    "not measured" and is left out of the column's mean; infinite values make an infinite mean.

    Args:
        values: (n, ...) numbers.
        draws: Number of resamples.
        seed: Seed of the resampling; the same seed and n resample the same entries.
        level: Coverage, between 0 and 1.

    Returns:
        Interval of floats for a 1-D `values`, of float64 arrays (...) otherwise. A column without
        any value has a NaN mean.

    Raises:
        PrunekitError: `values` has no first axis or it is empty, or a parameter is out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[0] == 0:
        raise PrunekitError("no values to average: pass an array with at least one row")
    _check_level(level)
    if draws < 1:
        raise PrunekitError(f"draws is {draws}: use at least 1")
    n = array.shape[0]
    columns = array.reshape(n, -1)
    # How often each draw picks each entry: means over resamples become one matrix product.
    picks = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    weights = picks.astype(np.float64)

    count = np.sum(~np.isnan(columns), axis=0)
    mean = _weighted_means(np.ones((1, n)), columns)[0]
    low, high = np.full((2, columns.shape[1]), np.nan)
    for start in range(0, columns.shape[1], _COLUMNS_PER_CHUNK):
        chunk = slice(start, start + _COLUMNS_PER_CHUNK)
        low[chunk], high[chunk] = _percentiles(_weighted_means(weights, columns[:, chunk]), level)
    low[count < 2] = high[count < 2] = np.nan

    shape = array.shape[1:]
    if not shape:
        return Interval(float(mean[0]), float(low[0]), float(high[0]), int(count[0]))
    mean, low, high = (each.reshape(shape) for each in (mean, low, high))
    return Interval(mean, low, high, count.reshape(shape))


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval (Wilson 1927), right for small n and near 0 or 1.

    Args:
        successes: Number of successes, 0 to n.
        n: Number of trials, at least 1.
        level: Coverage, between 0 and 1.

    Raises:
        PrunekitError: A count or the level is out of range.
    """
    _check_level(level)
    if not 0 <= successes <= n or n < 1:
        raise PrunekitError(f"{successes} successes in {n} trials: pass 0 <= successes <= n, n > 0")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n successes one end equals the proportion exactly; rounding must not cross it.
    low, high = min(centre - half, share), max(centre + half, share)
    return Interval(share, max(0.0, low), min(1.0, high), n)


@dataclass(frozen=True)
class Paired:
    """What changed from one model to another on the same questions.

    Attributes:
        difference: Accuracy of the second minus that of the first, with its paired interval.
        gained: Questions that only the second answers right.
        lost: Questions that only the first answers right.
        p: Two-sided p-value of McNemar's exact test, between 0 and 1.
        needed: How many such questions would show a change of 2 points, see `needed_pairs`.
    """

    difference: Interval
    gained: int
    lost: int
    p: float
    needed: int


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of second minus first on the same items, with a paired percentile bootstrap interval.

    Items are resampled with both models' values together (Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 8), so that what makes an item hard for both models
    cancels. Arithmetic is in float64. Where no item differs the interval has no width: that says
    nothing about the items that were not asked.

    Args:
        first: (n, ...) numbers of the first model, NaN where an item was not measured.
        second: (n, ...) numbers of the second model, of the same items in the same order.
        draws: Number of resamples.
        seed: Seed of the resampling.
        level: Coverage, between 0 and 1.

    Raises:
        PrunekitError: The shapes differ, there is no item, or a parameter is out of range.
    """
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if before.shape != after.shape:
        raise PrunekitError(
            f"paired values of shapes {before.shape} and {after.shape}: pass the same items, in "
            "the same order, for both models"
        )
    return bootstrap_mean(after - before, draws=draws, seed=seed, level=level)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's test in its exact, binomial form (McNemar 1947).

    If both models were equally good, each question that only one of them answers right would fall
    to either with probability 1/2. The sum of binomial coefficients is exact.

    Args:
        gained: Questions that only the second model answers right.
        lost: Questions that only the first answers right.

    Raises:
        PrunekitError: A count is negative.
    """
    if min(gained, lost) < 0:
        raise PrunekitError(f"{gained} gained and {lost} lost: pass counts that are not negative")
    n = gained + lost
    term = tail = 1
    for k in range(min(gained, lost)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def paired(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> Paired:
    """The change of accuracy between two models that answered the same questions.

    Args:
        first: Whether the first model is right, per question.
        second: Whether the second is, for the same questions in the same order.
        seed: Seed of the interval's resampling.

    Raises:
        PrunekitError: The numbers of questions differ, or there are none.
    """
    difference = paired_difference(first, second, seed=seed)
    pairs = list(zip(first, second, strict=True))
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    needed = needed_pairs(gained + lost, len(pairs))
    return Paired(difference, gained, lost, mcnemar(gained, lost), needed)


def needed_pairs(
    changed: int, n: int, *, difference: float = 0.02, level: float = 0.95, power: float = 0.8
) -> int:
    """How many questions two models must answer for a difference of accuracy to be seen.

    Connor 1987 ("Sample Size for Testing Differences in Proportions for the Paired-Sample Design",
    Biometrics 43): (z₁ √ψ + z₂ √(ψ − δ²))² / δ² with ψ the share of questions that only one of the
    two answers right, δ the difference, z₁ and z₂ the normal quantiles of level and power. Where
    none of the n questions changed, ψ is the upper end of Wilson's interval; ψ is at least δ.

    Args:
        changed: Questions that only one of the two models answers right.
        n: Questions that both were asked.
        difference: The difference to be seen, between 0 and 1.
        level: Coverage of the interval that must leave out zero.
        power: Probability that it does.

    Raises:
        PrunekitError: A number is out of range.
    """
    _check_level(level)
    _check_level(power)
    if not 0 < difference <= 1:
        raise PrunekitError(f"difference is {difference}: use a share above 0, such as 0.02")
    share = changed / n if changed else float(wilson(0, n, level=level).high)
    share = max(share, difference)
    normal = NormalDist()
    first, second = normal.inv_cdf((1 + level) / 2), normal.inv_cdf(power)
    root = first * math.sqrt(share) + second * math.sqrt(share - difference**2)
    return math.ceil((root / difference) ** 2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise PrunekitError(f"level is {level}: use a coverage between 0 and 1, such as 0.95")


def _weighted_means(weights: Floats, columns: Floats) -> Floats:
    """Means (draws, columns) of the non-NaN entries of `columns` (n, columns), by `weights`."""
    known = ~np.isnan(columns)
    finite = np.isfinite(columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = (weights @ np.where(finite, columns, 0.0)) / (weights @ known.astype(float))
        if not np.array_equal(known, finite):  # 0 x inf must not turn draws without it into NaN
            for sign in (np.inf, -np.inf):
                means = means + np.where(weights @ (columns == sign).astype(float) > 0, sign, 0.0)
    return means


def _percentiles(means: Floats, level: float) -> tuple[Floats, Floats]:
    """Lower and upper percentile of each column of `means` (draws, columns), NaN left out.

    Order statistics without interpolation, so that infinite means stay infinite.
    """
    means = np.sort(means, axis=0)  # NaN sorts last
    last = np.maximum(np.sum(~np.isnan(means), axis=0) - 1, 0)
    tail = (1 - level) / 2
    low = np.rint(tail * last).astype(np.int64)
    column = np.arange(means.shape[1])
    return means[low, column], means[last - low, column]
