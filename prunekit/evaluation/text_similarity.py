"""Measures that compare a generated text with another, and that count its repetitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from prunekit.errors import PrunekitError


def exact_prefix(a_ids: Sequence[int], b_ids: Sequence[int]) -> int:
    """Number of leading tokens that `a_ids` and `b_ids` have in common."""
    shorter = min(len(a_ids), len(b_ids))
    return next((i for i in range(shorter) if a_ids[i] != b_ids[i]), shorter)


def first_divergence(a_ids: Sequence[int], b_ids: Sequence[int]) -> int | None:
    """Index of the first token that differs; None if the two are identical.

    Where one is a strict prefix of the other, they diverge at the shorter one's length.
    """
    prefix = exact_prefix(a_ids, b_ids)
    return None if prefix == len(a_ids) == len(b_ids) else prefix


def repetition_rate(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of `ids` that occurred earlier in it: 0 nothing repeats, near 1 a loop.

    Args:
        ids: Token ids.
        n: Length of the n-grams, at least 1.

    Returns:
        A share in [0, 1); NaN when `ids` is shorter than n, since there is nothing to repeat.
    """
    return 1.0 - distinct_n(ids, n)


def distinct_n(ids: Sequence[int], n: int) -> float:
    """Number of different n-grams of `ids` over their number (distinct-n, Li et al. 2016).

    Args:
        ids: Token ids.
        n: Length of the n-grams, at least 1.

    Returns:
        A share in (0, 1]; NaN when `ids` is shorter than n.

    Raises:
        PrunekitError: n is below 1.
    """
    if n < 1:
        raise PrunekitError(f"n-grams of length {n}: use n >= 1")
    total = len(ids) - n + 1
    if total < 1:
        return math.nan
    return len({tuple(ids[i : i + n]) for i in range(total)}) / total


def chrf(hypothesis: str, reference: str) -> float:
    """Character n-gram F-score of `hypothesis` against `reference`, 0 to 100.

    chrF2 with n-grams up to 6 and whitespace ignored (Popović 2015), as sacrebleu defines it by
    default. Two texts that are both empty, or all whitespace, count as identical: 100.
    """
    if not hypothesis.split() and not reference.split():
        return 100.0
    return float(_chrf_metric().sentence_score(hypothesis, [reference]).score)


@lru_cache(maxsize=1)
def _chrf_metric() -> Any:
    # Imported on use: sacrebleu is only needed once two texts are compared.
    from sacrebleu.metrics import CHRF

    return CHRF()
