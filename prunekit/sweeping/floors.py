"""Predict exact match from single steps: what the dense model's right answers leave at least.

Let the dense model's answer to question i be complete after nᵢ tokens of its text. A copy whose
text has not left the dense one by then gives the same answer, unless it writes another one later.
With S of `prediction.survival` its exact match is so predicted to be at least mean(rightᵢ·S(nᵢ)).
It may be more: an answer may stay right, or turn right, behind a divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunekit.analysis.grid import Array
from prunekit.evaluation.intervals import Interval, bootstrap_mean
from prunekit.sweeping.edges import from_on


@dataclass(frozen=True)
class Floor:
    """The predicted floor of a copy's exact match, and how far above it the copy is.

    Attributes:
        dense: The dense model's exact match.
        floor: What is left of it at least, as predicted.
        above: The copy's exact match minus the floor, with its interval, paired by question.
        kept: Right answers of the dense model that were complete before the copy's text left.
        strayed: Those of them that the copy has wrong all the same.
    """

    dense: float
    floor: float
    above: Interval
    kept: int
    strayed: int

    @property
    def observed(self) -> float:
        """The copy's exact match."""
        return self.floor + float(self.above.mean)

    @property
    def lost(self) -> float:
        """The most that is predicted to be lost, in points."""
        return 100 * (self.dense - self.floor)


def floor_of(
    curves: Sequence[Array],
    complete: Sequence[int],
    first_divergence: Sequence[float | None],
    dense: Sequence[bool],
    copy: Sequence[bool],
    *,
    seed: int,
) -> Floor:
    """The floor of one copy.

    Args:
        curves: S after each token of the dense model's texts (`survival`).
        complete: After how many tokens each text's answer is complete, at least 1.
        first_divergence: The step at which the copy's text first differs; None if it does not.
        dense: Whether the dense model's answer is right.
        copy: Whether the copy's is.
        seed: Of the interval's resampling.
    """
    unchanged = np.array([curve[n - 1] for curve, n in zip(curves, complete, strict=True)])
    floors = unchanged * np.array(dense, np.float64)
    above = bootstrap_mean(np.array(copy, np.float64) - floors, seed=seed)
    first = np.array([np.inf if step is None else step for step in first_divergence])
    kept = np.array(dense, bool) & (first >= np.array(complete))
    strayed = kept & ~np.array(copy, bool)
    return Floor(
        float(np.mean(dense)), float(floors.mean()), above, int(kept.sum()), int(strayed.sum())
    )


def calibration(floors: Sequence[Floor]) -> dict[str, Any] | None:
    """How the floors of all points fit what was observed; None without any.

    Returns:
        `points`; those where exact match is `reached`, no less than the floor, and those where the
        interval `allows` that; the mean absolute and signed distance from the floor; the former
        from the dense model's exact match, as if nothing were lost; and the answers `kept` and
        `strayed`.
    """
    if not floors:
        return None
    above = np.array([float(one.above.mean) for one in floors])
    return {
        "points": len(floors),
        "reached": int(np.sum(above >= 0)),
        "allows": sum(not float(one.above.high) < 0 for one in floors),
        "mean_distance": float(np.abs(above).mean()),
        "mean_above": float(above.mean()),
        "dense_mean_distance": float(np.mean([abs(one.observed - one.dense) for one in floors])),
        "kept": sum(one.kept for one in floors),
        "strayed": sum(one.strayed for one in floors),
    }


def from_where(losses: Sequence[float], margin: float) -> int | None:
    """Index of the first point from which on every loss exceeds the margin; None without one."""
    return from_on([loss > margin for loss in losses])
