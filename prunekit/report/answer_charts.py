"""Charts of single cases (options and top tokens before and after) and of the final scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prunekit.analysis.decoding import Decoding
from prunekit.analysis.quality import Scores
from prunekit.analysis.subspace import Item, Subspace
from prunekit.analysis.transcripts import TopToken
from prunekit.evaluation.intervals import Interval
from prunekit.report.charts import Chart, Figure, Series

# Key of Scores, name, factor to 0…100.
SHOWN = (
    ("accuracy", "accuracy (single-step)", 100.0),
    ("exact_prefix_share", "exact prefix", 100.0),
    ("identical", "identical texts", 100.0),
    ("chrf", "chrF to dense text", 1.0),
)


def options(found: Subspace | None, decoding: Decoding | None) -> Figure | None:
    """Option log-likelihoods and top tokens, dense and pruned, on the clearest example.

    The question is the one whose best option changes, or else the first; the step is the first
    different token of the first text that differs.
    """
    charts = []
    if found is not None and found.items:
        item = next((item for item in found.items if _flips(item)), found.items[0])
        charts.append(_option_chart(item))
        charts.append(
            _top_chart("options-top", "Next token at the answer", item.top_dense, item.top_pruned)
        )
    generations = () if decoding is None else decoding.generations
    text = next((g for g in generations if g.first_divergence is not None), None)
    if text is not None and (text.first_divergence or 0) < len(text.steps):
        at = text.first_divergence or 0
        step = text.steps[at]
        charts.append(
            _top_chart(
                "divergence-top", f"Where a text forks (step {at})", step.top_dense, step.top_pruned
            )
        )
    if not charts:
        return None
    return Figure(
        "options",
        "One example up close",
        "How likely each answer option is as the next token: a multiple-choice score only asks "
        "which of them is largest. Then the most likely tokens of the whole vocabulary: they are "
        "what a generated text is made of.",
        charts,
    )


def scores(found: Mapping[str, Scores]) -> Figure:
    """Single-step against generative scores."""
    return Figure(
        "single_step_vs_generative",
        "Single-step scores against generated text",
        "Accuracy asks for one fixed choice at one step. The generative scores compare greedy texts"
        " with the dense model's own, so the dense model has 100 by definition; a different text is"
        " not therefore a worse one.",
        [_score_chart(found)],
    )


def _flips(item: Item) -> bool:
    return int(np.argmax(item.logprobs_dense)) != int(np.argmax(item.logprobs_pruned))


def _option_chart(item: Item) -> Chart:
    x = list(range(len(item.options)))
    names = [
        f"{'✓ ' if i == item.answer else ''}{chr(65 + i)}. {option}"  # long ones lose their end
        for i, option in enumerate(item.options)
    ]
    return Chart(
        "options-loglik",
        "Options before and after",
        "log-probability (nats)",
        "",
        [
            Series("dense", "dense", x, item.logprobs_dense),
            Series("pruned", "pruned", x, item.logprobs_pruned),
        ],
        kind="hbars",
        categories=names,
        note=f"{item.question} (✓ is right; a shorter bar is a likelier option)",
    )


def _top_chart(
    key: str, title: str, dense: Sequence[TopToken], pruned: Sequence[TopToken]
) -> Chart:
    """Probabilities of both models' top tokens; a bar is missing where only the other lists it."""
    ours = {token.id: token for token in dense}
    theirs = {token.id: token for token in pruned}
    ids = list(dict.fromkeys([*ours, *theirs]))
    names = [repr((ours.get(i) or theirs[i]).text) for i in ids]

    def series(name: str, found: Mapping[int, TopToken]) -> Series:
        places = [place for place, i in enumerate(ids) if i in found]
        return Series(name, name, places, [found[ids[place]].probability for place in places])

    return Chart(
        key,
        title,
        "probability",
        "",
        [series("dense", ours), series("pruned", theirs)],
        kind="hbars",
        categories=names,
        note="Each model's five most likely tokens; no bar: not among that model's five.",
    )


def _score_chart(found: Mapping[str, Scores]) -> Chart:
    shown = [entry for entry in SHOWN if entry[0] in found["pruned"]]
    return Chart(
        "scores",
        "Dense and pruned",
        "",
        "score (0 to 100)",
        [_bars(name, [(found[name][key], scale) for key, _, scale in shown]) for name in found],
        kind="bars",
        categories=[name for _, name, _ in shown],
        y_range=(0, 105),
    )


def _bars(name: str, found: Sequence[tuple[Interval, float]]) -> Series:
    mean, low, high = (
        [scale * float(getattr(interval, end)) for interval, scale in found]
        for end in ("mean", "low", "high")
    )
    return Series(name, name, list(range(len(found))), mean, low, high)
