"""SparseGPT's walk over a block of columns as torch, without a loop over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels.pruning import masks_eager

_TOGETHER = 32  # columns between two matrix products that bring the rest of a block up to date


def sparsegpt_update(
    weight: Tensor, upper: Tensor, mask: Tensor | None, keep: int, of: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune the columns of a block one after the other; see `update.sparsegpt_update`.

    Args:
        weight: (R, C) float32.
        upper: (C, C) float32.
        mask: (R, C) bool, or None to choose `keep` of every `of` columns.
        keep: N.
        of: M.
    """
    # Transposed: a visited column of all rows is contiguous.
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    errors = torch.zeros_like(columns)
    # as numbers: torch vectorises products with floats, and not those with bools
    kept = torch.empty_like(columns)
    if mask is not None:
        kept.copy_(mask.t())
    scale = upper.diagonal().reciprocal()[:, None]
    by_column = upper.t().contiguous()
    together = _TOGETHER if mask is not None else max(of, _TOGETHER - _TOGETHER % of)
    for start in range(0, len(columns), together):
        stop = min(start + together, len(columns))
        _propagate(columns, by_column, errors, 0, start, stop)
        step = together if mask is not None else of
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if mask is None:
                _propagate(columns, by_column, errors, start, first, last)
                scores = (columns[first:last] * scale[first:last]).square_()
                kept[first:last] = masks_eager.rank_columns(scores, keep)
            _visit(columns, by_column, scale, kept, errors, first, last)
    columns.mul_(kept)
    return columns.t(), errors.t(), kept.bool().t()


def _propagate(
    columns: Tensor, by_column: Tensor, errors: Tensor, source: int, start: int, stop: int
) -> None:
    """Take the errors of columns source..start out of columns start..stop."""
    if start > source:
        factor = by_column[start:stop, source:start]
        columns[start:stop].addmm_(factor, errors[source:start], alpha=-1)


def _visit(
    columns: Tensor,
    by_column: Tensor,
    scale: Tensor,
    kept: Tensor,
    errors: Tensor,
    first: int,
    last: int,
) -> None:
    """Visit columns first..last, all earlier errors being taken out of them already.

    A product with all of their errors: those of columns to come are still zero, and slicing them
    off would take longer.
    """
    factors = (scale[first:last] * (1 - kept[first:last])).unbind(0)
    wrong = errors[first:last]
    upper = by_column[first:last, first:last].unbind(0)
    visited = zip(columns[first:last].unbind(0), factors, upper, wrong.unbind(0), strict=True)
    for column, factor, row, error in visited:
        column.addmv_(wrong.t(), row, alpha=-1)
        torch.mul(column, factor, out=error)
