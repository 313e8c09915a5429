"""Charts as plain data: the PNG figures and the HTML page draw the same objects.

A `Chart` is one pair of axes; a `Figure` is a row of charts that belong together. Numbers are
already averaged over prompts; NaN means "not measured" and leaves a gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# A series names its role; every role has one colour wherever it appears (Okabe-Ito palette,
# distinguishable with the common colour-vision deficiencies), in figures and on the page.
COLORS = {
    "h": "#0072B2",
    "z": "#009E73",
    "p": "#D55E00",
    "dense": "#56B4E9",
    "pruned": "#D55E00",
    "kl": "#D55E00",
    "reverse": "#CC79A7",
    "estimate": "#0072B2",
    "single": "#009E73",
    "generative": "#CC79A7",
    "amber": "#E69F00",
    "black": "#000000",
    "yellow": "#F0E442",
}
#: Roles of eight colours, for series that only have to differ.
DISTINCT = ("h", "p", "z", "reverse", "dense", "amber", "black", "yellow")
MARK_COLOR = "#999999"


@dataclass(frozen=True)
class Series:
    """One curve, or one group of bars.

    Attributes:
        name: Shown in the legend.
        role: A key of `COLORS`.
        x: Positions: layer, step, category index, or left edges of histogram bins.
        mean: Value at each position.
        low: Lower end of the interval at each position (NaN: none), or empty.
        high: Upper end, like `low`.
        dashed: Draw dashed: what a formula predicts, beside what was measured.
        valid: For an estimate, the share of positions (0 to 1) where it may be used, or empty.
    """

    name: str
    role: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    valid: Sequence[float] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.mean)}
        lengths |= {len(part) for part in (self.low, self.high, self.valid) if len(part)}
        if len(lengths) > 1:
            raise ValueError(f"series '{self.name}': x, mean, low, high, valid differ in length")

    def invalid_at(self) -> list[int]:
        """Indices where the estimate may not be used at half of the positions or more."""
        return [i for i, share in enumerate(self.valid) if share < 0.5]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with its numbers as `compact_number` shortens them."""
        numbers = ("x", "mean", "low", "high", "valid")
        packed = {name: compact(getattr(self, name)) for name in numbers}
        return {"name": self.name, "role": self.role, "dashed": self.dashed, **packed}


@dataclass(frozen=True)
class Chart:
    """One pair of axes.

    Attributes:
        key: Unique name; links and file names use it.
        title: Short, above the axes.
        x_label: With unit.
        y_label: With unit.
        series: What is drawn.
        kind: "lines", "bars" (one group of bars per category), "hbars" (horizontal: long names)
            or "histogram".
        log: Logarithmic y axis to begin with.
        log_complement: For similarities up to 1: what the page calls 1 − y, which it shows on its
            logarithmic scale instead of y.
        categories: Names of the positions 0, 1, … of bars.
        note: One or two sentences on how to read it.
        y_range: Fixed (low, high), or None.
        marks: Positions on the x axis that are shaded, as dropped layers are.
        marks_name: What they are.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: str = "lines"
    log: bool = False
    log_complement: str = ""
    categories: Sequence[str] = ()
    note: str = ""
    y_range: tuple[float, float] | None = None
    marks: Sequence[float] = ()
    marks_name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as the page's script reads it."""
        return {
            "key": self.key,
            "title": self.title,
            "x_label": self.x_label,
            "y_label": self.y_label,
            "kind": self.kind,
            "log": self.log,
            "log_complement": self.log_complement,
            "categories": list(self.categories),
            "note": self.note,
            "y_range": self.y_range,
            "marks": list(self.marks),
            "marks_name": self.marks_name,
            "series": [series.to_dict() for series in self.series],
        }


@dataclass(frozen=True)
class Figure:
    """Charts that belong together: one PNG file, one section of the page.

    Attributes:
        key: File name without `.png`.
        title: Heading.
        text: What the figure answers, in plain words.
        charts: Drawn side by side.
        share_y: Whether the charts are drawn to one y scale.
    """

    key: str
    title: str
    text: str
    charts: Sequence[Chart] = field(default_factory=tuple)
    share_y: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as the page's script reads it."""
        return {
            "key": self.key,
            "title": self.title,
            "text": self.text,
            "share_y": self.share_y,
            "charts": [chart.to_dict() for chart in self.charts],
        }


def compact(numbers: Iterable[float]) -> list[float | int | None]:
    """Each number as `compact_number` shortens it."""
    return [compact_number(float(number)) for number in numbers]


def compact_number(number: float) -> float | int | None:
    """A short JSON number: NaN and ±inf are None, whole numbers ints.

    Five significant digits, or seven decimals, whichever is more: a cosine of 0.9999987 must keep
    its distance from 1.
    """
    if not math.isfinite(number):
        return None
    if number == int(number) and abs(number) < 1e15:
        return int(number)
    short, fixed = float(f"{number:.5g}"), round(number, 7)
    return fixed if abs(fixed - number) < abs(short - number) else short
