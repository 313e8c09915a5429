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


def for_splits(size: int, tile: int, splits: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of rows that are odd with regard to how the vocabulary is split.

    Args:
        size: V, of whole tiles and a tail.
        tile: columns of a tile.
        splits: S; split i takes the tiles from `tiles·i // S` on, the last the tail too.
    """
    noise, more = torch.randn(size), torch.randn(size)
    tiles = size // tile
    firsts = [tiles * i // splits * tile for i in range(splits)]
    tail = tiles * tile
    heights = torch.linspace(8.0, 30.0, splits)
    rising, falling = noise.clone(), noise.clone()
    rising[firsts], falling[firsts] = heights, heights.flip(0)
    # other's top token is 21 nats above its logit at base's, which comes before it
    late = 3 * torch.randn(size)
    moved = late + 0.2 * more
    late[size * 3 // 4], moved[size * 3 // 4], moved[size * 5 // 6] = 15.0, -5.0, 16.0
    near = noise + 0.1 * more
    holes = noise.clone()
    holes[::3] = float("-inf")
    holes[firsts[splits // 2] : firsts[splits // 2] + tile] = float("-inf")
    holes[tail:] = float("-inf")
    one_sided = near.clone()
    one_sided[tail // 2] = float("-inf")
    return {
        "maximum in the last element": (noise + one_hot(size, size - 1, 9.0), near),
        "maxima on either side of the tail's first": (
            noise + one_hot(size, tail - 1, 9.0),
            near + one_hot(size, tail, 9.0),
        ),
        "maximum in a split": (
            noise + one_hot(size, firsts[splits * 2 // 3], 9.0),
            near + one_hot(size, firsts[splits // 3], 9.0),
        ),
        "higher in every split": (rising, rising + 0.1 * more),
        "higher in every split, and lower in other": (rising, falling),
        "other's maximum far and late": (late, moved),
        "without the columns of a split and the tail": (holes, holes + 0.1 * more),
        "a column that base alone lacks": (one_sided, near),
        "a column that other alone lacks": (near, one_sided),
    }
