"""What became of the answers: the dense model's replies beside another model's, item by item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunekit.analysis.grid import Array
from prunekit.analysis.quality import Scores
from prunekit.evaluation import text_similarity
from prunekit.evaluation.answering import Reply
from prunekit.evaluation.extraction import same_answer
from prunekit.evaluation.intervals import bootstrap_mean, wilson

# Measures of one reply beside the dense model's.
MEASURES = (
    "right",
    "same_answer",
    "identical",
    "exact_prefix_share",
    "chrf",
    "first_divergence",
    "length",
)
_SHARES = {"right": "exact_match", "same_answer": "same_answer", "identical": "same_text"}
_MEANS = {"exact_prefix_share": "answer_prefix", "chrf": "answer_chrf", "length": "answer_length"}


def reply_measures(dense: Sequence[Reply], other: Sequence[Reply]) -> dict[str, Array]:
    """Per name of `MEASURES` one float64 value per question.

    `right`, `same_answer` (as the dense model's) and `identical` are 0 or 1; `exact_prefix_share`
    is of the longer text; `chrf` 0 to 100; `first_divergence` the step of the first token that
    differs, NaN where none does; `length` in tokens.
    """
    rows = []
    for ours, theirs in zip(dense, other, strict=True):
        first = text_similarity.first_divergence(ours.ids, theirs.ids)
        prefix = text_similarity.exact_prefix(ours.ids, theirs.ids)
        both_silent = ours.given is None and theirs.given is None
        rows.append(
            (
                float(theirs.right),
                float(both_silent or same_answer(ours.given, theirs.given)),
                float(first is None),
                prefix / max(len(ours.ids), len(theirs.ids)),
                text_similarity.chrf(theirs.text, ours.text),
                np.nan if first is None else float(first),
                float(len(theirs.ids)),
            )
        )
    columns = np.array(rows, np.float64).T
    return dict(zip(MEASURES, columns, strict=True))


def reply_scores(measures: dict[str, Array], *, seed: int = 0) -> Scores:
    """Scores of a model's answers, each with its interval over the questions.

    Returns:
        exact_match, same_answer and same_text with Wilson's intervals; answer_prefix, answer_chrf
        (0–100) and answer_length (tokens) with bootstrap intervals.
    """
    scores: Scores = {
        name: wilson(int(measures[key].sum()), len(measures[key])) for key, name in _SHARES.items()
    }
    for key, name in _MEANS.items():
        scores[name] = bootstrap_mean(measures[key], seed=seed)
    return scores
