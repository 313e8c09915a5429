"""Draw `Figure`s as PNG files with matplotlib, without pyplot's global state or a display."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from prunekit.report.charts import COLORS, MARK_COLOR, Chart, Figure, Series

_PANEL_INCHES = (5.2, 3.6)
_COLUMNS = 3  # a page's width
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
# Markers repeat what colours say, for readers and printers that see none.
_MARKERS = {"h": "o", "z": "s", "p": "^", "kl": "o", "reverse": "v", "estimate": "D"}


def draw(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as PNG, 144 dots per inch."""
    width, height = _PANEL_INCHES
    rows = -(-len(figure.charts) // _COLUMNS)
    columns = -(-len(figure.charts) // rows)
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(width * columns, height * rows), layout="constrained")
        axes = canvas.subplots(rows, columns, squeeze=False, sharey=figure.share_y)
        for axis, chart in zip(axes.flat, figure.charts, strict=False):
            _draw_chart(axis, chart)
        for spare in axes.flat[len(figure.charts) :]:
            spare.set_axis_off()
        canvas.savefig(
            path, format="png", dpi=144, metadata={"Software": None, "Title": figure.title}
        )


def _draw_chart(axis: Axes, chart: Chart) -> None:
    axis.set_title(chart.title)
    note = "\n".join(textwrap.wrap(chart.note, 62)).replace("$", r"\$")
    axis.set_xlabel("\n".join(filter(None, (chart.x_label, note))))
    axis.set_ylabel(chart.y_label)
    if chart.kind == "lines":
        for series in chart.series:
            _draw_line(axis, series, chart.log)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for number, mark in enumerate(chart.marks):
            name = chart.marks_name if number == 0 else None
            axis.axvspan(mark - 0.5, mark + 0.5, color=MARK_COLOR, alpha=0.16, lw=0, label=name)
    elif chart.kind == "histogram":
        for series in chart.series:
            gap = min(np.diff(series.x), default=1.0)
            axis.bar(
                np.asarray(series.x),
                series.mean,
                width=0.9 * gap,
                color=COLORS[series.role],
                label=series.name,
            )
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        _draw_bars(axis, chart)
    positive = [value for series in chart.series for value in series.mean if value > 0]
    if chart.log and positive:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        low = max(low, min(positive) / 10)  # an interval that almost touches 0 has no lower end
        axis.set_ylim(low, high)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif chart.y_range is not None and chart.kind != "hbars":
        axis.set_ylim(*chart.y_range)
    if len(chart.series) > 1 or chart.kind == "lines":
        _legend_above(axis)


def _legend_above(axis: Axes) -> None:
    """Between title and axes, so that it can't cover data."""
    names = list(dict.fromkeys(axis.get_legend_handles_labels()[1]))
    columns = len(names) if sum(len(name) + 6 for name in names) < 74 else 3
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        fontsize=8.5,
        borderaxespad=0.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )
    axis.set_title(axis.get_title(), pad=10 + 13 * math.ceil(len(names) / columns))


def _draw_line(axis: Axes, series: Series, log: bool) -> None:
    x, mean = np.asarray(series.x, float), np.asarray(series.mean, float)
    low, high = np.asarray(series.low, float), np.asarray(series.high, float)
    if log:  # zeros (identical models) have no place on a logarithmic axis: leave a gap
        mean = np.where(mean > 0, mean, np.nan)
        low = np.where(low > 0, low, mean) if low.size else low
    color, dashed = COLORS[series.role], series.dashed
    (line,) = axis.plot(
        x,
        mean,
        color=color,
        linestyle="--" if dashed else "-",
        marker=None if dashed else _MARKERS.get(series.role, "o"),
        markersize=3.5,
        linewidth=1.6,
        label=series.name,
        zorder=3,
    )
    if low.size and high.size:
        axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    invalid = series.invalid_at()
    if invalid:
        axis.plot(
            x[invalid],
            mean[invalid],
            "x",
            color=line.get_color(),
            markersize=6,
            zorder=4,
            label="estimate not valid here",
        )


def _draw_bars(axis: Axes, chart: Chart) -> None:
    horizontal = chart.kind == "hbars"
    positions = np.arange(len(chart.categories))
    thickness = 0.8 / max(1, len(chart.series))
    for number, series in enumerate(chart.series):
        offset = (number - (len(chart.series) - 1) / 2) * thickness
        mean = np.asarray(series.mean, float)
        where = np.asarray(series.x, float) + offset
        error = None
        if len(series.low) and len(series.high):
            spread = [mean - np.asarray(series.low), np.asarray(series.high) - mean]
            error = np.nan_to_num(np.clip(spread, 0, None))
        look: dict[str, Any] = {"color": COLORS[series.role], "label": series.name}
        look["error_kw"] = {"elinewidth": 1.1, "capsize": 2.5, "ecolor": "#333333"}
        if horizontal:
            axis.barh(where, mean, thickness * 0.92, xerr=error, **look)
        else:
            axis.bar(where, mean, thickness * 0.92, yerr=error, **look)
    names = [_wrapped(name, 26 if horizontal else 16) for name in chart.categories]
    if horizontal:
        axis.set_yticks(positions, names, fontsize=8.5)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        if chart.y_range is not None:
            axis.set_xlim(*chart.y_range)
    else:
        axis.set_xticks(positions, names, fontsize=8.5)
        axis.grid(False, axis="x")


def _wrapped(name: str, width: int) -> str:
    """`name` over at most two lines; a dollar sign is text here, not mathematics."""
    lines = textwrap.wrap(name, width, max_lines=2, placeholder="…") or [repr(name)]
    return "\n".join(lines).replace("$", r"\$")
