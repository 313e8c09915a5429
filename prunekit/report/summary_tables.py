"""The summary of a study as tables, for the terminal and the page alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.quality import Scores
from prunekit.analysis.subspace import Subspace
from prunekit.evaluation.intervals import Floats, Interval, bootstrap_mean
from prunekit.report.charts import compact_number

SPACES = (
    ("h", "hidden state", "cosine of the final hidden states"),
    ("z", "logits", "cosine of the logits"),
    ("p", "probabilities", "cosine of the next-token probabilities"),
)
NONE = "–"

# What comparing the dense texts with themselves gives: said in words, since it is no measurement.
OF_ITSELF = {
    "same_answer": "100 %",
    "identical": "100 %",
    "exact_prefix_share": "100 %",
    "chrf": "100",
}
# kind, key of Scores, name, unit, factor, meaning
_SCORES = (
    (
        "single-step",
        "accuracy",
        "accuracy",
        "%",
        100,
        "multiple choice by the log-likelihood of each option",
    ),
    (
        "single-step",
        "accuracy_normalised",
        "accuracy per character",
        "%",
        100,
        "the same, log-likelihoods divided by the options' lengths",
    ),
    ("single-step", "chance", "guessing", "%", 100, "what chance alone would reach"),
    (
        "generated",
        "exact_match",
        "exact match",
        "%",
        100,
        "open questions whose extracted answer is the right one",
    ),
    (
        "generated",
        "same_answer",
        "same answer",
        "%",
        100,
        "open questions whose answer is the dense model's",
    ),
    ("generated", "identical", "identical texts", "%", 100, "to the last token"),
    (
        "generated",
        "exact_prefix_share",
        "exact prefix",
        "%",
        100,
        "share of the text before the first difference",
    ),
    ("generated", "chrf", "chrF to the dense text", "", 1, "0 to 100, by character n-grams"),
    (
        "generated",
        "repetition",
        "repetition",
        "%",
        100,
        "4-grams that occurred before in the same text",
    ),
    (
        "generated",
        "perplexity",
        "perplexity",
        "",
        1,
        "of the texts under the dense model, geometric mean",
    ),
    ("generated", "length", "length", "tokens", 1, "up to the limit of the run"),
)


@dataclass(frozen=True)
class Value:
    """A number with its interval (NaN: none) and unit."""

    mean: float
    low: float = float("nan")
    high: float = float("nan")
    unit: str = ""

    @classmethod
    def of(cls, interval: Interval, unit: str = "", scale: float = 1.0) -> Value:
        """From scalars of an Interval, times `scale`."""
        mean, low, high = (float(e) * scale for e in (interval.mean, interval.low, interval.high))
        return cls(mean, low, high, unit)

    @classmethod
    def of_dict(cls, told: Mapping[str, Any], unit: str = "", scale: float = 1.0) -> Value:
        """From mean, low and high of JSON-able data, where None stands for what is not finite."""
        ends = (told[end] for end in ("mean", "low", "high"))
        mean, low, high = (math.nan if end is None else scale * float(end) for end in ends)
        return cls(mean, low, high, unit)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        mean, low, high = (compact_number(end) for end in (self.mean, self.low, self.high))
        return {"mean": mean, "low": low, "high": high, "unit": self.unit}

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        known = math.isfinite(self.low) and math.isfinite(self.high) and self.low != self.high
        if not known or not math.isfinite(self.mean):
            return f"{number(self.mean)}{unit}"
        mean, low, high = _alike(self.mean, self.low, self.high)
        return f"{mean}{unit} [{low}, {high}]"

    def short(self) -> str:
        """Without the interval, for narrow terminals."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{number(self.mean)}{unit}"


Cell: TypeAlias = Value | str


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; the last column says in words what the row means."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [[c if isinstance(c, str) else c.to_dict() for c in row] for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows}


def hierarchy(grid: MetricGrid) -> list[dict[str, Any]]:
    """The similarity of each space over the whole text, for the head of the page."""
    return [
        {
            "role": space,
            "name": name,
            "text": text,
            "value": Value.of(grid.interval(f"{space}_cosine")).to_dict(),
        }
        for space, name, text in SPACES
    ]


def inside_table(grid: MetricGrid) -> Table:
    """The change from h to z to p, averaged over teacher-forced steps."""

    def value(metric: str, unit: str = "", scale: float = 1.0) -> Value:
        return Value.of(grid.interval(metric), unit, scale)

    rows: list[list[Cell]] = [
        [f"{space}: cosine", value(f"{space}_cosine"), f"{text}; 1 = unchanged"]
        for space, _, text in SPACES
    ]
    rows += [
        ["KL(dense‖pruned)", value("kl_dense_pruned", "nats"), "per token; 0 = unchanged"],
        ["KL(pruned‖dense)", value("kl_pruned_dense", "nats"), "the other direction"],
        ["estimate of KL", value("kl_estimate", "nats"), "to second order in the logit change"],
        ["1 − cosine of p", value("p_one_minus_cosine"), "0 = unchanged"],
        ["estimate of 1 − cos p", value("p_one_minus_cosine_estimate"), "to second order"],
        [
            "estimates valid",
            value("estimate_valid", "%", 100),
            "share of the positions; elsewhere the change is too large for them",
        ],
        ["most likely token changes", value("flipped", "%", 100), "share of the positions"],
    ]
    columns = ("Reading the dense model's text", "mean", "")
    prompts = len(grid.labels["prompt"])
    title = f"From hidden state to logit to probability: {prompts} prompts"
    return Table(title, columns, rows)


def scores_table(scores: Mapping[str, Scores], first_divergence: Floats) -> Table:
    """Single-step scores beside what became of the generated texts.

    Args:
        scores: Of "dense" and "pruned".
        first_divergence: Per prompt the step of the first different token, NaN if there is none.
    """
    dense, pruned = scores["dense"], scores["pruned"]
    rows: list[list[Cell]] = [
        [
            f"{kind}: {name}",
            Value.of(dense[key], unit, scale) if key not in OF_ITSELF else OF_ITSELF[key],
            Value.of(pruned[key], unit, scale),
            text,
        ]
        for kind, key, name, unit, scale, text in _SCORES
        if key in pruned
    ]
    first = Value.of(bootstrap_mean(first_divergence), "tokens")
    rows.append(["generated: first difference after", NONE, first, "of the texts that differ"])
    asked = f" ({int(dense['accuracy'].n)} questions)" if "accuracy" in dense else ""
    title = f"Single-step{asked} against generative ({len(first_divergence)} prompts)"
    return Table(title, ("Score", "dense", "pruned", ""), rows)


def subspace_tables(found: Subspace) -> list[Table]:
    """The answer position of multiple-choice questions: option tokens against all tokens."""
    grid = found.grid

    def value(metric: str, unit: str = "", scale: float = 1.0) -> Value:
        return Value.of(grid.interval(metric), unit, scale)

    both: list[list[Cell]] = [
        ["cosine of p", value("subset_p_cosine"), value("p_cosine"), "1 = unchanged"],
        ["cosine of z", value("subset_z_cosine"), value("z_cosine"), "1 = unchanged"],
        [
            "KL(dense‖pruned)",
            value("subset_kl_dense_pruned", "nats"),
            value("kl_dense_pruned", "nats"),
            "0 = unchanged",
        ],
        [
            "same best token",
            value("agreement", "%", 100),
            Value.of(bootstrap_mean(1 - grid["flipped"]), "%", 100),
            "share of the questions",
        ],
        ["rank agreement", value("kendall"), NONE, "Kendall's τ of the options; 1 = same order"],
    ]
    each: list[list[Cell]] = [
        [
            "accuracy by letter",
            value("correct_dense", "%", 100),
            value("correct_pruned", "%", 100),
            "the most likely option token is the right one",
        ],
        [
            "probability off the options",
            value("outside_dense", "%", 100),
            value("outside_pruned", "%", 100),
            "what a multiple-choice score does not look at",
        ],
    ]
    names = ", ".join(repr(token) for token in found.tokens)
    columns = ("At the answer position", f"among {names}", "whole vocabulary", "")
    n = f"{len(found.items)} questions"
    return [
        Table(f"Answer options against the whole vocabulary: {n}", columns, both),
        Table(f"At the answer position: {n}", ("", "dense", "pruned", ""), each),
    ]


def _alike(mean: float, low: float, high: float) -> list[str]:
    """A finite mean and its ends, which differ, with the same number of decimals.

    Four significant digits of the largest, two of the mean, and two of the interval's width, at
    most eight decimals.
    """
    values = (mean, low, high)
    largest = max(map(abs, values))
    if largest < 1e6 and all(value == int(value) for value in values):
        return [str(int(value)) for value in values]
    if largest >= 1e6 or 0 < abs(mean) < 1e-3:
        return [f"{value:.2e}" for value in values]
    wanted = [4 - _exponent(largest), 2 - _exponent(high - low)]
    if mean:
        wanted.append(2 - _exponent(mean))
    decimals = min(8, max(0, *(places - 1 for places in wanted)))
    return [f"{value:.{decimals}f}" for value in values]


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def number(value: float) -> str:
    """Four significant digits; more where a cosine is close to 1; – for NaN."""
    if math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if value == int(value) and size < 1e6:
        return str(int(value))
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2e}"
    if 0.99 < size < 1:
        return f"{value:.6f}" if size > 0.9999 else f"{value:.4f}"
    return f"{value:.4g}"
