"""Where a model breaks: each side's loss at every point, paired with the dense model's answers."""

from __future__ import annotations

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
    from_on = next((i for i in range(len(lost)) if all(lost[i:])), None)
    return Edge(
        _until([float(one.mean) >= margin for one in losses]),
        _until([lowest(change) >= margin for change in changes]),
        from_on,
    )


def lowest(change: Paired) -> float:
    """The lower end of a difference's interval.

    Where no answer changed the bootstrap has no width: it is then Wilson's bound of the share of
    answers that may still change.
    """
    if change.gained or change.lost:
        return float(change.difference.low)
    return -float(wilson(0, int(change.difference.n)).high)


def is_lost(change: Paired, budget: float) -> bool:
    """Whether the whole interval of a loss lies beyond the budget."""
    return bool(float(change.difference.high) < -budget / 100)


def _until(holds: Sequence[bool]) -> int | None:
    """Index of the last of the leading True's."""
    count = int(np.argmin([*holds, False]))
    return count - 1 if count else None
