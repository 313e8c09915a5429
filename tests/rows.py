"""Rows of logits on which one-pass formulas go wrong, for every implementation of the metrics."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(size: int, hot: int, height: float) -> Tensor:
    """Zeros but for one logit."""
    row = torch.zeros(size)
    row[hot] = height
    return row


def adversarial(size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of rows of `size` float32 logits, at least 1000, by what is odd about them."""
    noise, more = torch.randn(size), torch.randn(size)
    ascending = torch.linspace(-40.0, 40.0, size)
    return {
        "offset on base": (noise + 1e4, noise + 0.1 * more),
        "offset on other": (noise, noise + 0.1 * more - 1e4),
        "offset on both": (noise + 1e4, (noise + 0.1 * more) + 1e4),
        "one-hot, same token": (one_hot(size, 7, 60.0), one_hot(size, 7, 50.0)),
        "one-hot against flat": (one_hot(size, 7, 60.0), torch.zeros(size)),
        "flat against one-hot": (torch.zeros(size), one_hot(size, 7, 60.0)),
        "both flat": (torch.zeros(size), torch.full((size,), 3.0)),
        "disjoint, 80 apart": (one_hot(size, 3, 80.0), one_hot(size, size - 1, 80.0)),
        "maximum in the last element": (one_hot(size, size - 1, 9.0) + noise, noise),
        "maximum at a block's end": (
            one_hot(size, 127, 9.0) + noise,
            one_hot(size, 128, 9.0) + noise,
        ),
        "ascending": (ascending, ascending + 0.3 * more),
        "descending": (ascending.flip(0), ascending.flip(0) + 0.3 * more),
        "ties": (one_hot(size, 5, 4.0) + one_hot(size, 900, 4.0), one_hot(size, 900, 4.0)),
        "opposite": (noise, -noise),
        "far and small": (100 * noise, 1e-3 * noise),
        "short and nearly parallel": (100 * noise, 1e-3 * (noise + 0.05 * more)),
        "broad against its own top token": (
            0.3 * noise + one_hot(size, 7, 3.0),
            one_hot(size, 7, 60.0),
        ),
    }


def broad_against_certain(size: int) -> tuple[Tensor, Tensor]:
    """Three pairs whose Σv² is as little as 1e-5 of Σw²: a difference of the two would be lost."""
    base, other = 0.05 * torch.randn(3, size), 0.05 * torch.randn(3, size)
    base[:, 7], other[:, 7] = 0.3, torch.tensor([4.0, 5.0, 9.0])
    return base, other
