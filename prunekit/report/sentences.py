"""States a study's numbers in plain sentences that claim no more than the numbers show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prunekit.analysis.answers import Answers
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.findings import Findings
from prunekit.analysis.grid import MetricGrid
from prunekit.evaluation.intervals import Interval, Paired, wilson
from prunekit.report.summary_tables import Value, number

# Below this share of valid positions an estimate is called unusable, below the second doubtful.
_UNUSABLE, _DOUBTFUL = 0.5, 0.9
# Fewer than these are called few.
_FEW_PROMPTS, _FEW_QUESTIONS = 12, 50
# Below this p-value McNemar's test shows a change.
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Sentence:
    """One statement; `warn` marks limits that a reader must not miss."""

    text: str
    warn: bool = False


def describe(study: Findings) -> list[Sentence]:
    """The statements at the head of a report, from the sections that the study has."""
    said: list[Sentence] = []
    if study.decoding is not None:
        grid = study.decoding.teacher_forced
        said.append(_hierarchy(grid))
        if float(np.nanmax(grid["kl_dense_pruned"])) > 0:
            said += [_divergence(grid), _estimate(grid)]
    accuracies = {
        name: values["accuracy"]
        for name, values in (study.scores or {}).items()
        if "accuracy" in values
    }
    if accuracies:
        said += _single_step(accuracies, study.accuracy_change())
    written = study.answer_change()
    if study.answers is not None and written is not None:
        said += _written(study.answers, written)
    if study.decoding is not None:
        said.append(_texts(study.decoding))
        identical = float(study.decoding.sequence["identical"].mean())
        if _unchanged(study.accuracy_change()) and identical < 0.5:
            said.append(
                Sentence(
                    "So here the single-step score does not show what happened to the generated "
                    "texts: most of them differ from the dense model's, while the paired "
                    "difference of the accuracy on the same questions cannot be told from zero."
                )
            )
        said += _limits(len(study.decoding.generations), accuracies)
    return said


def _prompts(grid: MetricGrid) -> str:
    n = len(grid.labels["prompt"])
    return f"{n} prompt" if n == 1 else f"{n} prompts"


def _hierarchy(grid: MetricGrid) -> Sentence:
    if not float(np.nanmax(grid["kl_dense_pruned"])) and not float(
        np.nanmax(grid["h_one_minus_cosine"])
    ):
        return Sentence("The two models are identical at every position that was looked at.")
    h, z, p = (Value.of(grid.interval(f"{space}_cosine")) for space in "hzp")
    return Sentence(
        f"Reading the dense model's own text ({_prompts(grid)}), the pruned model's "
        f"hidden states have cosine {h} to the dense ones, its logits {z}, and its "
        f"next-token probabilities {p}."
    )


def _divergence(grid: MetricGrid) -> Sentence:
    kl = Value.of(grid.interval("kl_dense_pruned"), "nats")
    flipped = Value.of(grid.interval("flipped"), "%", 100)
    return Sentence(
        f"KL(dense‖pruned) averages {kl} per token of {_prompts(grid)}; the most likely next "
        f"token is another one at {flipped} of the positions."
    )


def _estimate(grid: MetricGrid) -> Sentence:
    share = float(grid.interval("estimate_valid").mean)
    exact, estimate = (float(grid.interval(m).mean) for m in ("kl_dense_pruned", "kl_estimate"))
    ratio = estimate / exact if exact > 0 else math.nan
    compared = f"its mean is {number(ratio)} times the exact one" if exact > 0 else "not comparable"
    where = f"{number(100 * share)} % of the positions of {_prompts(grid)}"
    if share < _UNUSABLE:
        return Sentence(
            f"The second-order estimate of KL is not usable here: the change is small enough for "
            f"it at only {where} ({compared}).",
            warn=True,
        )
    if share < _DOUBTFUL:
        return Sentence(
            f"The second-order estimate of KL holds at {where} only; {compared}, so take it with "
            "care.",
            warn=True,
        )
    return Sentence(f"The second-order estimate of KL is valid at {where}; {compared}.")


def _unchanged(change: Paired | None) -> bool:
    """Whether enough questions were asked, and neither interval nor test shows a change."""
    if change is None or int(change.difference.n) < _FEW_QUESTIONS:
        return False
    includes_zero = float(change.difference.low) <= 0 <= float(change.difference.high)
    return includes_zero and change.p >= _SIGNIFICANT


def _single_step(accuracies: Mapping[str, Interval], change: Paired | None) -> list[Sentence]:
    dense, pruned = (Value.of(accuracies[name], "%", 100) for name in ("dense", "pruned"))
    found = [
        Sentence(
            f"Single-step: accuracy on {accuracies['dense'].n} multiple-choice questions goes from "
            f"{dense} to {pruned}."
        )
    ]
    if change is None:  # a study of a former version: two intervals alone say little of a change
        return found
    return [*found, _paired(change, "question")]


def _written(answers: Answers, change: Paired) -> list[Sentence]:
    """What became of the generated answers."""
    n = len(answers.items)
    dense, pruned = (Value.of(wilson(sum(one), n), "%", 100) for one in answers.right())
    text = f"Generated answers: exact match on {n} open questions goes from {dense} to {pruned}."
    return [Sentence(text), _paired(change, "open question")]


def _paired(change: Paired, what: str) -> Sentence:
    """The change on the same questions, and what so many questions can show."""
    n, difference = int(change.difference.n), change.difference
    if not change.gained and not change.lost:
        most = number(100 * float(wilson(0, n).high))
        return Sentence(
            f"On the same {n} {what}s no answer turns from right to wrong or back; up to {most} "
            "% of such questions may still do so (95 % interval)."
        )
    includes = float(difference.low) <= 0 <= float(difference.high)
    needed = (
        f" To tell 2 points from zero, {change.needed} such questions would be needed."
        if change.needed > n
        else ""
    )
    return Sentence(
        f"On the same {n} {what}s the paired difference is "
        f"{Value.of(difference, 'points', 100)}, an interval that "
        f"{'includes' if includes else 'excludes'} zero: {change.lost} right answers turn "
        f"wrong and {change.gained} wrong ones right (McNemar's exact p = {number(change.p)})."
        f"{needed}"
    )


def _texts(decoding: Decoding) -> Sentence:
    steps = [found.first_divergence for found in decoding.generations]
    differing = sorted(step for step in steps if step is not None)
    if not differing:
        return Sentence(
            f"Generation: all {len(steps)} greedy texts are identical to the dense ones."
        )
    middle = number(float(np.median(differing)))
    chrf = number(float(np.nanmean(decoding.sequence["chrf"])))
    same = len(steps) - len(differing)
    one = len(differing) == 1
    first = "the other differs" if one else "half of those that differ do so"
    when = f"from step {middle}" if one else f"by step {middle}"
    return Sentence(
        f"Generation: {same} of {len(steps)} greedy texts {'is' if same == 1 else 'are'} identical "
        f"to the dense model's; {first} {when}; chrF to the dense texts is {chrf} of 100."
    )


def _limits(prompts: int, accuracies: Mapping[str, Interval]) -> list[Sentence]:
    found = []
    if prompts < _FEW_PROMPTS:
        text = f"Only {prompts} prompts were used: the intervals over prompts are rough."
        found.append(Sentence(text, warn=True))
    questions = int(accuracies["dense"].n) if accuracies else 0
    if 0 < questions < _FEW_QUESTIONS:
        text = f"Only {questions} questions were asked: small differences of accuracy don't show."
        found.append(Sentence(text, warn=True))
    return found
