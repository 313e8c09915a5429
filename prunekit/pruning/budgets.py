"""How much each layer loses: OWL's sparsities, and whole steps that add up. No model here.

Source: "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity" (arXiv 2310.05175): layers with more outliers, weights whose |W|·‖x‖ is more than M times
their layer's mean, keep more, by at most λ more or less than the mean layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 100  # of the interval in which the layers' common shift lies


def outlier_share(scores: Sequence[Tensor], outlier: float) -> float:
    """The share of a layer's weights whose score is above `outlier` times the layer's mean score.

    Args:
        scores: (out, in) each, of the layer's matrices.
        outlier: M of the source.
    """
    size = sum(part.numel() for part in scores)
    mean = sum(part.sum(dtype=torch.float64).item() for part in scores) / size
    return sum(int((part > outlier * mean).sum()) for part in scores) / size


def sparsities(
    shares: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float
) -> list[float]:
    """Each layer's sparsity; weighted by size their mean is `sparsity`.

    The densities spread linearly over 2λ, from the fewest to the most outliers. The source centres
    them by their plain mean; here the sizes count, and no layer loses less than nothing or more
    than all.

    Args:
        shares: `outlier_share` of each layer.
        sizes: Weights of each layer.
        sparsity: Fraction to prune of all layers, in (0, 1).
        spread: λ of the source.
    """
    low, high = min(shares), max(shares)
    width = 2 * spread / (high - low) if high > low else 0.0
    offsets = [-(share - low) * width for share in shares]
    wanted = sparsity * sum(sizes)
    below, above = 0.0, 1.0 + 2 * spread
    for _ in range(_HALVINGS):
        shift = (below + above) / 2
        found = [min(max(shift + offset, 0.0), 1.0) for offset in offsets]
        pruned = sum(part * size for part, size in zip(found, sizes, strict=True))
        below, above = (shift, above) if pruned < wanted else (below, shift)
    return found


@dataclass(frozen=True)
class Part:
    """Matrices that are pruned alike.

    Attributes:
        units: By name, how many weights one step more prunes in each of them.
        wanted: Steps that are wanted, a fraction.
        most: Steps that are possible.
    """

    units: dict[str, int]
    wanted: float
    most: int

    @property
    def unit(self) -> int:
        """How many weights one step more prunes in all of them."""
        return sum(self.units.values())


def apportion(parts: Sequence[Part], total: int) -> dict[str, int]:
    """Whole steps for every matrix, as wanted and in sum `total` weights.

    Every part gets the whole steps that it wants, then one more in the order of their fractions
    while it fits; what is still missing is made up by single matrices, smallest units first. Where
    a unit is one weight that last way is the only one, so that all but one matrix of a part stay
    alike. If no unit divides what is missing, it is less than the smallest unit.
    """
    steps = {name: min(int(part.wanted), part.most) for part in parts for name in part.units}
    left = total - sum(steps[name] * unit for part in parts for name, unit in part.units.items())
    for part in sorted(parts, key=lambda part: int(part.wanted) - part.wanted):
        first = next(iter(part.units))
        if 1 < part.unit <= left and min(part.units.values()) > 1 and steps[first] < part.most:
            steps |= {name: steps[name] + 1 for name in part.units}
            left -= part.unit
    single = [(unit, name, part.most) for part in parts for name, unit in part.units.items()]
    for unit, name, most in sorted(single):
        more = min(left // unit, most - steps[name])
        if more > 0:
            steps[name] += more
            left -= more * unit
    return steps
