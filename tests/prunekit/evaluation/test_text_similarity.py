"""Measures of texts by hand: prefixes, repetition, chrF."""

from __future__ import annotations

import math

import pytest

from prunekit.errors import PrunekitError
from prunekit.evaluation.text_similarity import chrf, distinct_n, exact_prefix, first_divergence
from prunekit.evaluation.text_similarity import repetition_rate as repetition


@pytest.mark.parametrize(
    ("a", "b", "prefix", "divergence"),
    [
        ([], [], 0, None),
        ([1, 2], [1, 2], 2, None),
        ([1, 2], [1, 2, 3], 2, 2),
        ([1, 2, 3], [1, 2], 2, 2),
        ([], [1], 0, 0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 2, 2),
        ([7, 2], [1, 2], 0, 0),
    ],
    ids=str,
)
def test_prefix_and_divergence(a: list, b: list, prefix: int, divergence: int | None) -> None:
    assert exact_prefix(a, b) == prefix
    assert first_divergence(a, b) == divergence


def test_repetition_counts_ngrams_seen_before() -> None:
    # Bigrams: 12 21 12 21 12: three of five occurred earlier.
    assert repetition([1, 2, 1, 2, 1, 2], 2) == pytest.approx(3 / 5)
    assert distinct_n([1, 2, 1, 2, 1, 2], 2) == pytest.approx(2 / 5)
    assert repetition([5] * 10) == pytest.approx(6 / 7)
    assert repetition(list(range(10))) == 0.0
    assert distinct_n([3, 3, 4], 1) == pytest.approx(2 / 3)
    assert math.isnan(repetition([1, 2, 3]))
    assert math.isnan(distinct_n([], 1))
    with pytest.raises(PrunekitError, match="use n >= 1"):
        distinct_n([1], 0)


def test_chrf_by_hand() -> None:
    # Without whitespace "ab" against "abc": precision 1 and 1, recall 2/3 and 1/2 for n = 1, 2;
    # longer n-grams do not exist in both. F2 = 5 P R / (4 P + R) with P = 1, R = 7/12.
    assert chrf("ab", "ab c") == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12))
    assert chrf("a cat", "a cat") == pytest.approx(100)
    assert chrf("xyz", "abc") == 0
    assert chrf("", "abc") == chrf("abc", "") == 0
    assert chrf("", "") == chrf(" ", "\n") == 100
