"""Selection as chunked torch: what runs on a CPU and wherever Triton cannot.

Scores are formed a few rows at a time, so that no matrix of them exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekernels import checks
from prunekernels.rows import take_rows

_COMPARED = 24  # size of a group up to which comparing all pairs is fastest
_LONG_ROW = 1 << 16  # scores from which a sample brackets the cut
_SAMPLE = 1 << 11


def nm_mask(
    scores: Tensor, norms: Tensor | None, keep: int, of: int, absolute: bool, inplace: bool
) -> Tensor:
    """True for the `keep` largest of every `of` along the last dimension, lower index first.

    Args:
        scores: (…, K), or weights.
        norms: (K,) factors on |weight|, or None.
        keep: N.
        of: M, a divisor of K.
        absolute: Score by |scores|; norms imply it.
        inplace: Also set what goes to zero.
    """
    checks.finite("nm_mask", scores, norms)
    width = scores.shape[-1]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel() == 0:
        return mask
    flat = mask.view(-1, width)
    step = max(1, (1 << (18 if scores.device.type == "cpu" else 26)) // width)
    for start, block in _blocks("nm_mask", scores, norms, absolute, step):
        groups = block.reshape(-1, of)
        chosen = flat[start : start + len(block)].view(-1, of)
        if of <= _COMPARED:
            chosen.copy_(_rank_small(groups, keep))
        else:
            _select(groups, of - keep, chosen)
    if inplace:
        scores.masked_fill_(mask.logical_not(), 0)
    return mask


def _blocks(
    op: str, scores: Tensor, norms: Tensor | None, absolute: bool, step: int
) -> Iterator[tuple[int, Tensor]]:
    """First row and scores (up to `step` rows, K), formed when they are needed."""
    rows = scores.numel() // scores.shape[-1]
    for start in range(0, rows, step):
        block = take_rows(scores, start, min(start + step, rows))
        if norms is not None:
            block = block.float().abs().mul_(norms)
            if bool(torch.isinf(block.amax())):
                raise ValueError(f"{op}: |weight|·norm overflows float32; scale the norms down")
        elif absolute:
            block = block.abs()
        yield start, block


def _rank_small(groups: Tensor, keep: int) -> Tensor:
    """Which `keep` members of each group (count, size) win."""
    columns = torch.empty(groups.shape[1], len(groups), dtype=torch.float32, device=groups.device)
    for member in range(len(columns)):
        columns[member] = groups[:, member]
    return torch.stack(rank_columns(columns, keep).unbind(0), -1)


def rank_columns(columns: Tensor, keep: int) -> Tensor:
    """Which `keep` members of each group win, from a column of float32 scores per member.

    Counts how many beat each: size·(size−1)/2 comparisons, vectorised over groups. Comparisons are
    written as floats: torch vectorises those, and not the ones written as bool.

    Args:
        columns: (size, count) float32.
        keep: N.

    Returns:
        (size, count), bool.
    """
    size = len(columns)
    beaten = torch.zeros_like(columns)
    wins = torch.empty_like(columns)
    for left in range(size - 1):
        later = slice(left + 1, size)
        # An equal, earlier member comes first.
        torch.ge(columns[left], columns[later], out=wins[later])
        beaten[later] += wins[later]
        beaten[left] += (size - 1 - left) - wins[later].sum(0)
    return beaten < keep


def _select(rows: Tensor, prune: int, keep: Tensor) -> None:
    """Write which of each row (count, size) stay: all but the `prune` smallest."""
    if prune == 0:
        keep.fill_(True)
        return
    cut = _cuts(rows, prune)
    torch.gt(rows, cut, out=keep)
    kept = keep.view(torch.uint8).sum(-1, dtype=torch.int32)  # twice as fast as of bools
    missing = rows.shape[1] - prune - kept  # members equal to the cut that stay
    tied = (missing > 0).nonzero().squeeze(1)
    if tied.numel():
        equal = rows[tied] == cut[tied]
        keep[tied] |= equal & (equal.cumsum(-1) <= missing[tied, None])


def rowwise_mask(
    scores: Tensor, norms: Tensor | None, prune: int, absolute: bool, inplace: bool
) -> Tensor:
    """False for the `prune` smallest of every row; among equals the higher index goes first.

    Args:
        scores: (…, K), or weights.
        norms: (K,) factors on |weight|, or None.
        prune: How many go.
        absolute: Score by |scores|; norms imply it.
        inplace: Also set what goes to zero.
    """
    checks.finite("rowwise_mask", scores, norms)
    width = scores.shape[-1]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel() == 0:
        return mask
    flat = mask.view(-1, width)
    step = max(1, (1 << (20 if scores.device.type == "cpu" else 26)) // width)
    for start, block in _blocks("rowwise_mask", scores, norms, absolute, step):
        _select(block, prune, flat[start : start + len(block)])
    if inplace:
        scores.masked_fill_(mask.logical_not(), 0)
    return mask


def _cuts(block: Tensor, prune: int) -> Tensor:
    """The `prune`-th smallest score of every row, (rows, 1)."""
    if block.shape[1] < _LONG_ROW or block.is_cuda:
        return block.kthvalue(prune, -1, keepdim=True).values
    return torch.stack([_long_cut(row, prune) for row in block])[:, None]


def _long_cut(row: Tensor, prune: int) -> Tensor:
    """The `prune`-th smallest of a long row: a sorted sample brackets it, the bracket is searched.

    Four standard deviations of a random sample's rank on either side; where an even sample is no
    fair one and the bracket misses, the whole row is searched.
    """
    sample = row[:: max(1, len(row) // _SAMPLE)].sort().values
    rank, margin = prune * len(sample) // len(row), 2 * int(len(sample) ** 0.5)
    low = sample[max(0, rank - margin)]
    high = sample[min(len(sample) - 1, rank + margin)]
    below = int((row < low).sum())
    bracket = row[(row >= low) & (row <= high)]
    if below < prune <= below + len(bracket):
        return bracket.kthvalue(prune - below).values
    return row.kthvalue(prune).values
