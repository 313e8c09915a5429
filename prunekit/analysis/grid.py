"""A labelled block of metrics over prompts × (step, layer, sublayer), and its statistics.

Prompts are the sampling unit: whatever axes an interval averages over, it first takes each
prompt's mean and then resamples prompts, so that a long answer does not count as many.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import Interval, bootstrap_mean

Array = NDArray[np.float64]

PROMPT = "prompt"


@dataclass(frozen=True)
class MetricGrid:
    """Metrics of the same shape, one axis per name, "prompt" first.

    Attributes:
        axes: Names of the axes, the first "prompt".
        labels: Per axis, what each index along it is called.
        values: Per metric, a float64 array shaped like the axes; NaN = not applicable.
    """

    axes: tuple[str, ...]
    labels: dict[str, list[Any]]
    values: dict[str, Array]

    def __post_init__(self) -> None:
        if not self.axes or self.axes[0] != PROMPT:
            raise ValueError(f"the first axis of a MetricGrid is 'prompt', got axes {self.axes}")
        if set(self.labels) != set(self.axes):
            raise ValueError(f"labels {sorted(self.labels)} do not name the axes {self.axes}")
        for name, value in self.values.items():
            if value.shape != self.shape or value.dtype != np.float64:
                raise ValueError(
                    f"metric {name}: {value.dtype} {value.shape} is not float64 {self.shape}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(len(self.labels[axis]) for axis in self.axes)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return list(self.values)

    def __getitem__(self, metric: str) -> Array:
        """The whole array of one metric.

        Raises:
            PrunekitError: There is no such metric; the message lists those there are.
        """
        if metric not in self.values:
            raise PrunekitError(f"no metric '{metric}' here: use one of {', '.join(self.values)}")
        return self.values[metric]

    def select(self, **wanted: Any) -> MetricGrid:
        """The grid at one label of each named axis (that axis keeps length 1).

        Args:
            **wanted: Axis name = label, as in `select(sublayer="attn", layer=3)`.

        Raises:
            PrunekitError: Unknown axis or label; the message lists those there are.
        """
        labels, values = dict(self.labels), dict(self.values)
        for name, label in wanted.items():
            if name not in self.axes:
                raise PrunekitError(f"no axis '{name}' here: use one of {', '.join(self.axes)}")
            if label not in labels[name]:
                raise PrunekitError(f"no {name} {label!r} here: use one of {labels[name]}")
            index, axis = labels[name].index(label), self.axes.index(name)
            labels[name] = [label]
            values = {key: value.take([index], axis) for key, value in values.items()}
        return MetricGrid(self.axes, labels, values)

    def where(self, mask: NDArray[np.bool_]) -> MetricGrid:
        """The same grid with NaN where `mask` (shaped like the axes) is False."""
        masked = {name: np.where(mask, value, np.nan) for name, value in self.values.items()}
        return replace(self, values=masked)

    def per_prompt(self, metric: str, keep: Sequence[str] = ()) -> Array:
        """Each prompt's mean over every axis but `keep`: shape (prompt, *keep in grid order)."""
        for name in keep:
            if name not in self.axes:
                raise PrunekitError(f"no axis '{name}' here: use one of {', '.join(self.axes)}")
        over = tuple(i for i, axis in enumerate(self.axes) if axis not in (PROMPT, *keep))
        return nan_mean(self[metric], over)

    def interval(self, metric: str, keep: Sequence[str] = (), *, seed: int = 0) -> Interval:
        """Mean over prompts with its bootstrap interval.

        Args:
            metric: Name of the metric.
            keep: Axes to keep; over the others each prompt is averaged first.
            seed: Seed of the resampling.

        Returns:
            An Interval of scalars, or of arrays shaped like the kept axes (in grid order).
        """
        return bootstrap_mean(self.per_prompt(metric, keep), seed=seed)

    def mean(self, metric: str, keep: Sequence[str] = ()) -> Array:
        """Mean over prompts of the per-prompt means: shape of the kept axes."""
        return nan_mean(self.per_prompt(metric, keep), (0,))

    def prompts(self) -> list[MetricGrid]:
        """One grid per prompt, which `concat` puts together again."""
        found = []
        for index, label in enumerate(self.labels[PROMPT]):
            values = {name: value[index : index + 1] for name, value in self.values.items()}
            found.append(MetricGrid(self.axes, {**self.labels, PROMPT: [label]}, values))
        return found

    def relabelled(self, prompts: Sequence[Any]) -> MetricGrid:
        """The same grid with other labels of its prompts."""
        return replace(self, labels={**self.labels, PROMPT: list(prompts)})

    def rows(self) -> list[dict[str, Any]]:
        """A long table, aggregated over prompts: the other axes, metric, mean, low, high, n."""
        keep = self.axes[1:]
        table: list[dict[str, Any]] = []
        for metric in self.values:
            found = self.interval(metric, keep)
            columns = [np.asarray(part) for part in (found.mean, found.low, found.high, found.n)]
            columns = [np.broadcast_to(column, self.shape[1:]) for column in columns]
            for index in np.ndindex(*self.shape[1:]):
                place = {axis: self.labels[axis][i] for axis, i in zip(keep, index, strict=True)}
                mean, low, high, n = (column[index] for column in columns)
                table.append(
                    {**place, "metric": metric, "mean": float(mean), "low": float(low)}
                    | {"high": float(high), "n": int(n)}
                )
        return table

    def to_csv(self) -> str:
        """`rows()` as CSV text with a header line."""
        out = io.StringIO()
        fields = [*self.axes[1:], "metric", "mean", "low", "high", "n"]
        writer = csv.DictWriter(out, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: nested lists, None for NaN, strings for infinities."""
        values = {name: _to_json(value) for name, value in self.values.items()}
        return {"axes": list(self.axes), "labels": self.labels, "values": values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricGrid:
        """Undo `to_dict`."""
        axes = tuple(data["axes"])
        labels = {axis: list(data["labels"][axis]) for axis in axes}
        shape = tuple(len(labels[axis]) for axis in axes)
        values = {name: _from_json(value, shape) for name, value in data["values"].items()}
        return cls(axes, labels, values)


def interval_to_dict(interval: Interval) -> dict[str, Any]:
    """JSON-able form of an interval of scalars."""
    return {
        **{end: _number(float(getattr(interval, end))) for end in ("mean", "low", "high")},
        "n": int(interval.n),
    }


def interval_from_dict(data: Mapping[str, Any]) -> Interval:
    """Undo `interval_to_dict`."""
    mean, low, high = (
        np.nan if data[end] is None else float(data[end]) for end in ("mean", "low", "high")
    )
    return Interval(mean, low, high, int(data["n"]))


def concat(grids: Iterable[MetricGrid]) -> MetricGrid:
    """Put grids of different prompts behind one another.

    Steps may differ: the result has every step label that occurs, in ascending order, with NaN
    where a prompt has no such step. Other axes must agree.

    Raises:
        ValueError: No grid given, or axes, labels or metrics disagree.
    """
    parts = [grid for grid in grids if grid.shape[0]]
    if not parts:
        raise ValueError("nothing to concatenate: every grid is empty")
    first = parts[0]
    labels = {axis: list(first.labels[axis]) for axis in first.axes}
    if "step" in labels:
        labels["step"] = sorted({label for grid in parts for label in grid.labels["step"]})
    labels[PROMPT] = [label for grid in parts for label in grid.labels[PROMPT]]
    shape = tuple(len(labels[axis]) for axis in first.axes)
    values = {name: np.full(shape, np.nan) for name in first.values}
    start = 0
    for grid in parts:
        same = all(grid.labels[a] == labels[a] for a in first.axes if a not in (PROMPT, "step"))
        if grid.axes != first.axes or not same or set(grid.values) != set(first.values):
            raise ValueError("grids of different axes, labels or metrics can't be concatenated")
        stop = start + grid.shape[0]
        place: list[Any] = [slice(start, stop)] + [slice(None)] * (len(shape) - 1)
        if "step" in labels:
            place[first.axes.index("step")] = [labels["step"].index(s) for s in grid.labels["step"]]
        for name, value in grid.values.items():
            values[name][tuple(place)] = value
        start = stop
    return MetricGrid(first.axes, labels, values)


def in_order(grid: MetricGrid) -> MetricGrid:
    """The same grid with its prompts sorted by label."""
    order = np.argsort(np.array(grid.labels[PROMPT]), kind="stable")
    labels = {**grid.labels, PROMPT: [grid.labels[PROMPT][index] for index in order]}
    return MetricGrid(grid.axes, labels, {name: v[order] for name, v in grid.values.items()})


def nan_mean(values: Array, axis: tuple[int, ...]) -> Array:
    """Mean over `axis` without the NaNs; NaN where nothing else is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of an empty slice is meant
        return np.asarray(np.nanmean(values, axis=axis), np.float64)


def _to_json(values: Array) -> Any:
    if values.ndim > 1:
        return [_to_json(value) for value in values]
    if np.isfinite(values).all():
        return values.tolist()
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | str | None:
    """A JSON number, None for NaN, "inf" or "-inf"."""
    if value != value:
        return None
    return value if abs(value) < np.inf else repr(value)


def _from_json(nested: Any, shape: tuple[int, ...]) -> Array:
    # float(...) reads "inf"; None is NaN
    flat: list[Any] = [nested]
    for _ in shape:
        flat = [inner for outer in flat for inner in outer]
    numbers = [np.nan if value is None else float(value) for value in flat]
    return np.array(numbers, np.float64).reshape(shape)
