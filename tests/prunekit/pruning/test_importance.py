"""Scores of weights and the masks from them, by hand."""

from __future__ import annotations

import torch

from prunekit.pruning import (
    importance,
    patterns,
)


def test_magnitude_counts_over_the_matrix():
    matrix = torch.tensor([[1.0, -9.0, 2.0, 8.0], [-3.0, 0.5, -0.25, 4.0]])
    mask = importance.select(
        importance.magnitude(matrix), patterns.parse("unstructured"), per_row=False
    )
    assert mask.tolist() == [[False, True, False, True], [True, False, False, True]]


def test_wanda_by_hand_where_other_formulas_differ():
    matrix = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    mean_square = torch.tensor([100.0, 4.0, 1.0, 0.25], dtype=torch.float64)
    # |W|·√: [10, 4, 3, 2] and [40, 6, 2, .5]; |W| alone would prune columns 0, 1 of row 0, and
    # |W|·mean square would rank row 1 alike but a matrix-wide count differently
    found = importance.wanda(matrix, mean_square)
    assert found.tolist() == [[10.0, 4.0, 3.0, 2.0], [40.0, 6.0, 2.0, 0.5]]
    mask = importance.select(found, patterns.parse("unstructured"), per_row=True)
    assert mask.tolist() == [[True, True, False, False]] * 2
    root_matters = importance.wanda(torch.tensor([[1.0, 3.0]]), torch.tensor([4.0, 1.0]).double())
    assert root_matters.argmin() == 0  # 2 < 3, while 1·4 > 3·1
    nm = importance.select(found, patterns.parse("1:2"), per_row=True)
    assert nm.tolist() == [[True, False, True, False]] * 2


def test_scores_leave_the_weights_alone():
    matrix = torch.tensor([[1.0, -2.0]])
    found = importance.wanda(matrix, torch.tensor([4.0, 1.0]).double())
    importance.cumulative_shares(found)
    importance.magnitude(matrix).add_(1)
    assert matrix.tolist() == [[1.0, -2.0]]


def test_variant_by_hand():
    # sums 10 and 100; shares after sorting: .1 .3 .6 1 and .01 .03 .06 1 (order of columns kept)
    found = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 94.0, 2.0, 3.0]])
    shares = importance.cumulative_shares(found)
    expected = torch.tensor([[1.0, 0.1, 0.6, 0.3], [0.01, 1.0, 0.03, 0.06]])
    torch.testing.assert_close(shares, expected)
    mask = importance.select(shares, patterns.parse("unstructured"), per_row=False)
    # the four smallest shares: three of row 1, one of row 0; Wanda would take two of each
    assert mask.tolist() == [[True, False, True, True], [False, True, False, False]]


def test_variant_is_the_limit_of_bisecting_alpha():
    found = torch.rand(16, 40, generator=torch.Generator().manual_seed(3)) ** 3
    ordered = found.double().sort(-1).values
    sums, total = ordered.cumsum(-1), ordered.sum(-1, keepdim=True)
    low, high = 0.0, 1.0
    for _ in range(100):
        alpha = (low + high) / 2
        low, high = (alpha, high) if (sums <= alpha * total).sum() <= 320 else (low, alpha)
    pruned_per_row = (sums <= low * total).sum(-1)
    mask = importance.select(
        importance.cumulative_shares(found), patterns.parse("unstructured"), per_row=False
    )
    assert torch.equal((~mask).sum(-1), pruned_per_row)
    assert len(set(pruned_per_row.tolist())) > 1


def test_variant_on_ties_and_silent_rows():
    shares = importance.cumulative_shares(
        torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    )
    assert shares.tolist() == [[1.0, 0.75, 0.5, 0.25], [0.0, 0.0, 0.0, 0.0]]
