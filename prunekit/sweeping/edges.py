"""Where a model breaks: each side's loss at every point, paired with the dense model's answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunekit.evaluation.intervals import Paired, wilson

#: The loss, in points, that a sweep without a budget speaks of.
USUAL_BUDGET = 2.0


@dataclass(frozen=True)
class Edge:
    """How far a side of a series holds.

    Attributes:
        holds: Index of the last point up to which no loss exceeds the budget, by the estimates;
            None if the first one's does.
        shown: The same by the whole intervals: a greater loss is ruled out.
        lost: Index of the first point from which on all losses exceed the budget by their whole
            intervals; None if there is none.
    """

    holds: int | None
    shown: int | None
    lost: int | None


def edge(changes: Sequence[Paired], budget: float) -> Edge:
    """The edge of one side.

    Args:
        changes: Of each point, the one that loses least first.
        budget: Points that may be lost.
    """
    margin = -budget / 100
    losses = [change.difference for change in changes]
    lost = [is_lost(change, budget) for change in changes]
    return Edge(
        _until([float(one.mean) >= margin for one in losses]),
        _until([bounds(change)[0] >= margin for change in changes]),
        from_on(lost),
    )


def bounds(change: Paired) -> tuple[float, float]:
    """Lower and upper end of a difference, wide enough where few answers changed.

    The bootstrap knows only the changes that it saw: with one answer gained and none lost it never
    draws a loss. So each end is the farther of the bootstrap's and of the one that Wilson's
    intervals of the shares gained and lost give by squaring and adding (Newcombe 1998, "Interval
    Estimation for the Difference Between Independent Proportions", Statistics in Medicine 17).
    """
    n = int(change.difference.n)
    gained, lost = (wilson(count, n) for count in (change.gained, change.lost))
    mean = float(gained.mean) - float(lost.mean)
    below = math.hypot(float(gained.mean - gained.low), float(lost.high - lost.mean))
    above = math.hypot(float(gained.high - gained.mean), float(lost.mean - lost.low))
    low, high = float(change.difference.low), float(change.difference.high)
    return min(low, mean - below), max(high, mean + above)


def is_lost(change: Paired, budget: float) -> bool:
    """Whether the whole interval of a loss lies beyond the budget."""
    return bounds(change)[1] < -budget / 100


def from_on(lost: Sequence[bool]) -> int | None:
    """Index of the first point from which on all are lost; None without one."""
    return next((i for i in range(len(lost)) if all(lost[i:])), None)


def _until(holds: Sequence[bool]) -> int | None:
    """Index of the last of the leading True's."""
    count = int(np.argmin([*holds, False]))
    return count - 1 if count else None
