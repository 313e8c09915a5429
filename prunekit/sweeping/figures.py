"""The figures of a sweep: curves of every series, KL, and the prediction of the divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prunekit.evaluation.intervals import Interval
from prunekit.report.charts import Chart, Figure, Series
from prunekit.sweeping.findings import SweepFindings, Swept
from prunekit.sweeping.rows import Row, dense_scores

_CURVES = (
    ("accuracy", "accuracy", "single"),
    ("exact_match", "exact match", "generative"),
    ("same_answer", "same answer", "p"),
    ("same_text", "same text", "h"),
)
_FLOORS = " Dashed: what is left of exact match at least, as single steps predict."
_ROLES = ("h", "z", "p", "generative", "dense", "single", "kl", "reverse")


def figures(found: SweepFindings) -> list[Figure]:
    """Curves of every series, KL, and the prediction of the first divergence."""
    made = []
    predictions = [row for row in found.rows if row.prediction is not None]
    curves = [one for one in found.series if len([r for r in one.rows if not r.error]) > 1]
    if curves:
        made.append(
            Figure(
                "edge",
                "Single-step accuracy against generated answers",
                "Accuracy is by choosing among options, exact match by writing; same answer and "
                "same text as the dense model's, which is at 0." + _FLOORS * bool(predictions),
                [_curve(one, found) for one in curves],
            )
        )
    if curves and any(row.kl for row in found.rows):
        made.append(_divergences(curves))
    if predictions:
        made.append(_prediction(predictions))
    return made


def _curve(one: Swept, found: SweepFindings) -> Chart:
    scores = dense_scores(found.dense)
    rows = [row for row in one.rows if not row.error]
    scale = 1.0 if one.axis == "count" else 100.0
    series = []
    for key, name, role in _CURVES:
        if key not in rows[0].scores:
            continue
        start = scores.get(key, Interval(1.0, math.nan, math.nan, 0))
        held = [start, *(row.scores[key] for row in rows)]
        series.append(
            Series(
                name,
                role,
                [0.0, *(scale * row.x for row in rows)],
                [100 * float(interval.mean) for interval in held],
                [100 * float(interval.low) for interval in held],
                [100 * float(interval.high) for interval in held],
            )
        )
    floors = [row.floor for row in rows if row.floor is not None]
    if floors:
        shares = [floors[0].dense, *(floor.floor for floor in floors)]
        places = [0.0, *(scale * row.x for row in rows if row.floor is not None)]
        percent = [100 * share for share in shares]
        series.append(
            Series("exact match, predicted floor", "generative", places, percent, dashed=True)
        )
    key = "curve-" + "-".join(one.name.lower().split())
    label = one.name if one.axis == "count" else "zeros, %"
    return Chart(key, one.name, label, "share of questions, %", series, y_range=(0, 105))


def _divergences(curves: Sequence[Swept]) -> Figure:
    charts = []
    for axis, label, scale in (("count", "dropped", 1.0), ("sparsity", "zeros, %", 100.0)):
        series: list[Series] = []
        for one in (one for one in curves if one.axis == axis):
            rows = [row for row in one.rows if row.kl is not None]
            kls = [row.kl["kl"] for row in rows if row.kl is not None]
            series.append(
                Series(
                    one.name,
                    _ROLES[len(series) % len(_ROLES)],
                    [scale * row.x for row in rows],
                    [plain(kl["mean"]) for kl in kls],
                    [plain(kl["low"]) for kl in kls],
                    [plain(kl["high"]) for kl in kls],
                )
            )
        if series:
            title = f"KL(dense‖copy): {label.partition(',')[0]}"
            charts.append(Chart(f"kl-{axis}", title, label, "nats per token", series, log=True))
    text = "How far each copy's next-token distribution is from the dense model's over a text."
    return Figure("divergence", "KL divergence", text, charts)


def _prediction(rows: Sequence[Row]) -> Figure:
    """Observed over predicted shares of unchanged answers, all points and steps."""
    pairs: list[tuple[float, float]] = []
    for row in rows:
        assert row.prediction is not None
        pairs += [(100 * s["predicted"], 100 * s["observed"]) for s in row.prediction["steps"]]
    pairs.sort()
    bins: list[Mapping[str, float]] = []
    for start in range(0, 100, 10):
        held = [p for p in pairs if start <= p[0] < start + 10 or (start == 90 and p[0] == 100)]
        if held:
            seen = sorted(p[1] for p in held)
            bins.append(
                {
                    "x": sum(p[0] for p in held) / len(held),
                    "mean": sum(seen) / len(seen),
                    "low": seen[len(seen) // 10],
                    "high": seen[-1 - len(seen) // 10],
                }
            )
    observed = Series(
        "observed",
        "p",
        [one["x"] for one in bins],
        [one["mean"] for one in bins],
        [one["low"] for one in bins],
        [one["high"] for one in bins],
    )
    ideal = Series("if perfect", "dense", [0.0, 100.0], [0.0, 100.0], dashed=True)
    chart = Chart(
        "prediction",
        "Answers still unchanged",
        "predicted from single steps, %",
        "observed, %",
        [observed, ideal],
        y_range=(0, 105),
        note="Every copy at steps 1, 2, 3, 4, 6, 8, … of its answers, in bins of "
        "the prediction; band: 10 to 90 % of them.",
    )
    text = (
        "Before a copy writes anything: from how often its top token flips in a text, by the dense "
        "model's entropy, the share of its answers that still equal the dense ones after so many "
        "steps."
    )
    return Figure("prediction", "The first divergence, predicted", text, [chart])


def plain(value: float | None) -> float:
    """A recorded number, NaN where there is none."""
    return math.nan if value is None else float(value)
