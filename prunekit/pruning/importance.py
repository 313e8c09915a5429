"""Scores of weights (higher = more worth keeping), and masks with exact counts from them.

Every function takes a matrix as (out_features, in_features), in any floating dtype, and computes
in float32. Masks: True = keep; of equal scores the lower index is kept first.
"""

from __future__ import annotations

import torch
from prunekernels import nm_mask, rowwise_mask
from torch import Tensor

from prunekit.pruning.patterns import Pattern


def magnitude(matrix: Tensor) -> Tensor:
    """|W|, (out, in), float32."""
    return matrix.float().abs()


def wanda(matrix: Tensor, mean_square: Tensor) -> Tensor:
    """|W| · √(mean x²) per input column.

    Args:
        matrix: (out, in).
        mean_square: (in,), the mean over calibration tokens of each input's square.

    Returns:
        (out, in), float32. Source: arXiv 2306.11695, equation 1 (a norm there: the root of the
        mean ranks alike).
    """
    return matrix.float().abs().mul_(mean_square.sqrt().to(matrix.device, torch.float32))


def relative(matrix: Tensor, mean_square: Tensor, power: float) -> Tensor:
    """(|W| / its row's sum of |W| + |W| / its column's) · (√mean x²)^a: RIA's score.

    Args:
        matrix: (out, in).
        mean_square: See `wanda`.
        power: a.

    Returns:
        (out, in), float32. A row or column of zeros scores zero. Source: "Plug-and-Play: An
        Efficient Post-training Pruning Method for Large Language Models" (ICLR 2024), equation 4
        (a norm there: the root of the mean ranks alike).
    """
    size = matrix.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    shares = size / size.sum(1, keepdim=True).clamp_min_(tiny)
    shares += size / size.sum(0, keepdim=True).clamp_min_(tiny)
    return shares.mul_(mean_square.to(matrix.device, torch.float32).pow(power / 2))


def wanda_mask(matrix: Tensor, mean_square: Tensor, pattern: Pattern) -> Tensor:
    """The mask that keeps each row's highest `wanda` scores, without forming them.

    Args:
        matrix: (out, in).
        mean_square: See `wanda`.
        pattern: N:M, or an exact count per row.

    Returns:
        (out, in), bool, True = keep.
    """
    matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    norms = mean_square.sqrt().to(matrix.device, torch.float32)
    if pattern.structured:
        return nm_mask(matrix, pattern.keep, pattern.of, norms=norms)
    return rowwise_mask(matrix, pattern.sparsity, norms=norms)


def cumulative_shares(scores: Tensor) -> Tensor:
    """For each score, its row's scores up to and including it, as a share of the row's sum.

    Pruning all weights whose share is at most α is the Wanda variant's rule; ranking a matrix by
    shares therefore finds the α of a wanted sparsity exactly, where bisection stops near it.

    Args:
        scores: (out, in), not negative.

    Returns:
        (out, in), float32, in [0, 1]; rises with the score inside a row.
    """
    # Ascending, and of equal scores the higher index first: it is pruned first.
    order = scores.shape[-1] - 1 - scores.flip(-1).argsort(dim=-1, stable=True)
    sums = scores.gather(-1, order).cumsum(-1, dtype=torch.float64)
    shares = sums / sums[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(scores).scatter_(-1, order, shares.to(scores.dtype))


def select(scores: Tensor, pattern: Pattern, *, per_row: bool) -> Tensor:
    """The mask that keeps the highest scores.

    Args:
        scores: (out, in).
        pattern: N:M keeps N of every M in a row; unstructured prunes exactly ⌊sparsity · count⌋.
        per_row: Unstructured: count in each row, instead of over the matrix.

    Returns:
        (out, in), bool, True = keep.
    """
    if pattern.structured:
        return nm_mask(scores, pattern.keep, pattern.of)
    if per_row:
        return rowwise_mask(scores, pattern.sparsity)
    return rowwise_mask(scores.reshape(1, -1), pattern.sparsity).view_as(scores)
