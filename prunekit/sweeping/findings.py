"""What a sweep found: its rows, and where each series breaks; plain data with questions to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prunekit.sweeping import floors
from prunekit.sweeping.edges import USUAL_BUDGET, edge
from prunekit.sweeping.points import Point
from prunekit.sweeping.prediction import calibration
from prunekit.sweeping.rows import Row


@dataclass(frozen=True)
class Swept:
    """One series of a sweep.

    Attributes:
        name: What its copies are.
        axis: "count", "sparsity", or "checkpoint".
        rows: Its points, the one that loses least first.
        left: Labels of the points that the budget ended it before.
        points: What the rows were made from.
    """

    name: str
    axis: str
    rows: tuple[Row, ...]
    left: tuple[str, ...] = ()
    points: tuple[Point, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class SweepFindings:
    """What a sweep found.

    Attributes:
        meta: Settings, versions and counts.
        dense: The dense model's recorded answers and sizes.
        series: In the order in which they were asked for.
        budget: Points that may be lost, None: 2 and no early end.
        seed: Of the intervals.
    """

    meta: dict[str, Any]
    dense: dict[str, Any]
    series: tuple[Swept, ...]
    budget: float | None
    seed: int

    @property
    def margin(self) -> float:
        """The loss, in points, that the edges are about."""
        return USUAL_BUDGET if self.budget is None else self.budget

    @property
    def rows(self) -> list[Row]:
        """All points."""
        return [row for one in self.series for row in one.rows]

    @property
    def failed(self) -> list[Row]:
        """Points without numbers."""
        return [row for row in self.rows if row.error]

    def sides(self) -> tuple[str, ...]:
        """The kinds of answers that were asked for: "accuracy", "exact_match"."""
        asked = {"accuracy": self.meta["choices"], "exact_match": self.meta["questions"]}
        return tuple(name for name, count in asked.items() if count)

    def edges(self, one: Swept) -> dict[str, Any]:
        """Per side the `Edge` of a series, over its points that have numbers."""
        rows = [row for row in one.rows if not row.error]
        return {
            side: edge([row.changes[side] for row in rows], self.margin) for side in self.sides()
        }

    def last_that_holds(self, one: Swept) -> int | None:
        """Index of the last point of a series up to which no side loses more than the margin.

        By the estimates; None where the first point already does.
        """
        if any(row.error for row in one.rows):
            return None
        holds = [found.holds for found in self.edges(one).values()]
        return None if None in holds else min(holds)

    def best(self) -> tuple[Any, ...] | None:
        """The copy with the fewest bytes, then parameters, then zeros left, that holds."""
        found: list[tuple[Any, ...]] = []
        for one in self.series:
            at = self.last_that_holds(one)
            if at is not None:
                row = one.rows[at]
                size = row.sizes["bytes_in_memory"]
                zeros = row.x if one.axis != "count" else 0.0
                found.append((size, row.sizes["parameters"], -zeros, len(found), one, at))
        return min(found)[-2:] if found else None

    def calibration(self) -> dict[str, float] | None:
        """How well the first divergence was predicted, over all points."""
        return calibration([row.prediction for row in self.rows if row.prediction is not None])

    def floor_calibration(self) -> dict[str, Any] | None:
        """How well the floors of exact match fit, over all points."""
        return floors.calibration([row.floor for row in self.rows if row.floor is not None])

    def lost_from(self, one: Swept) -> dict[str, int | None] | None:
        """From which point of a series on more exact match goes than the margin.

        Returns:
            The indices by the `predicted` floors and by the `observed` estimates, over the points
            that have numbers, None where there is none; None without floors.
        """
        found = [row.floor for row in one.rows if row.floor is not None]
        if not found:
            return None
        seen = [100 * (floor.dense - floor.observed) for floor in found]
        return {
            "predicted": floors.from_where([floor.lost for floor in found], self.margin),
            "observed": floors.from_where(seen, self.margin),
        }
