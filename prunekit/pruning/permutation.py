"""Orders of a matrix's inputs whose N:M groups hold more of what is worth keeping. No model here.

Source: "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (ICLR
2024), section 3.3: channels are dealt out by their scores, then one channel of every group at a
time is assigned anew. What a channel adds to a group is, row by row, max(0, its score - the lowest
score that the group would keep without it), so no group is sorted for every channel.
"""

from __future__ import annotations

import torch
from prunekernels import nm_mask
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SWEEPS = 2  # times that every place of the groups is assigned anew
_PAIRED_TOGETHER = 2**24  # elements of the gains that exist at once


def permutation(scores: Tensor, keep: int, of: int) -> Tensor:
    """An order of the columns in which N:M keeps more score.

    Args:
        scores: (out, in), not negative; `in` is a multiple of `of`.
        keep: N.
        of: M.

    Returns:
        (in,), int64: which column comes where. No order keeps less score than the present one.
    """
    width = scores.shape[1]
    scores = scores.float()
    present = torch.arange(width, device=scores.device)
    order = _dealt_out(scores.sum(0), of)
    for _ in range(SWEEPS):
        for place in range(of):
            groups = order.view(-1, of).clone()
            removed = groups[:, place]
            others = groups[:, [index for index in range(of) if index != place]]
            gains = _gains(scores, others, removed, keep)
            _, chosen = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
            groups[:, place] = removed[torch.from_numpy(chosen).to(removed.device)]
            order = groups.reshape(-1)
    return (
        order if kept_score(scores[:, order], keep, of) > kept_score(scores, keep, of) else present
    )


def kept_score(scores: Tensor, keep: int, of: int) -> float:
    """The sum of the scores that N:M keeps."""
    return float((scores * nm_mask(scores, keep, of)).sum(dtype=torch.float64))


def _dealt_out(totals: Tensor, of: int) -> Tensor:
    """The columns dealt to the groups in turn, best first, there and back."""
    rounds = totals.argsort(descending=True, stable=True).view(of, -1)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().reshape(-1)


def _gains(scores: Tensor, others: Tensor, removed: Tensor, keep: int) -> Tensor:
    """What each removed column would add to each group: (groups, columns), float32.

    Args:
        scores: (out, in).
        others: (groups, M - 1): the columns that stay in each group.
        removed: (groups,): the columns to assign.
        keep: N.
    """
    rows, count = len(scores), len(removed)
    held = scores[:, others.reshape(-1)].view(rows, count, -1)
    least = held.topk(keep, dim=-1).values[..., -1].t()
    added = scores[:, removed].t()
    gains = torch.empty(count, count, device=scores.device)
    step = max(1, _PAIRED_TOGETHER // (count * rows))
    for start in range(0, count, step):
        part = least[start : start + step, None]
        gains[start : start + step] = (added - part).clamp_min_(0).sum(-1)
    return gains
