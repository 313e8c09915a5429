"""What became of the answers: the dense model's replies beside another model's, item by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from prunekit.analysis.grid import Array
from prunekit.analysis.quality import Scores
from prunekit.evaluation import text_similarity
from prunekit.evaluation.answering import Reply
from prunekit.evaluation.extraction import same_answer
from prunekit.evaluation.intervals import bootstrap_mean, wilson
from prunekit.evaluation.questions import Question

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


@dataclass(frozen=True)
class Answer:
    """One question and what both models answer.

    Attributes:
        id: Its name.
        question: The question.
        right: The right answer.
        dense: The dense model's reply.
        pruned: The pruned model's.
    """

    id: str
    question: str
    right: str
    dense: Reply
    pruned: Reply


@dataclass(frozen=True)
class Answers:
    """Both models' answers to the same open questions.

    Attributes:
        items: One per question.
    """

    items: tuple[Answer, ...]

    @classmethod
    def of(
        cls, questions: Sequence[Question], dense: Sequence[Reply], pruned: Sequence[Reply]
    ) -> Self:
        """Put questions and replies together."""
        triples = zip(questions, dense, pruned, strict=True)
        return cls(tuple(Answer(q.id, q.question, q.answer, d, p) for q, d, p in triples))

    def measures(self, whose: str = "pruned") -> dict[str, Array]:
        """`reply_measures` of the "pruned" or the "dense" model's replies."""
        dense = [item.dense for item in self.items]
        return reply_measures(dense, [getattr(item, whose) for item in self.items])

    def right(self) -> tuple[list[bool], list[bool]]:
        """Per question whether the dense model, and whether the pruned one, is right."""
        both = [(item.dense.right, item.pruned.right) for item in self.items]
        return [one for one, _ in both], [other for _, other in both]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"items": [asdict(item) for item in self.items]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Undo `to_dict`."""

        def reply(told: Mapping[str, Any]) -> Reply:
            return Reply(**{**told, "ids": tuple(told["ids"]), "entropies": ()})

        items = (
            Answer(**{**item, **{whose: reply(item[whose]) for whose in ("dense", "pruned")}})
            for item in data["items"]
        )
        return cls(tuple(items))


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
        rows.append(
            (
                float(theirs.right),
                float(_agree(ours.given, theirs.given)),
                float(first is None),
                prefix / max(len(ours.ids), len(theirs.ids)),
                text_similarity.chrf(theirs.text, ours.text),
                np.nan if first is None else float(first),
                float(len(theirs.ids)),
            )
        )
    columns = np.array(rows, np.float64).T
    return dict(zip(MEASURES, columns, strict=True))


def expected_agreement(ours: Sequence[str | None], theirs: Sequence[str | None]) -> float:
    """The share of same answers if each model gave its own answers to questions at random.

    Σ p(a)·q(a) over the answers a, p and q being how often the models give them: the agreement by
    chance of Cohen's κ (1960). Silence agrees with silence.
    """
    counts = Counter(ours), Counter(theirs)
    pairs = ((m * n, _agree(a, b)) for a, m in counts[0].items() for b, n in counts[1].items())
    return sum(times for times, same in pairs if same) / (len(ours) * len(theirs))


def _agree(ours: str | None, theirs: str | None) -> bool:
    return same_answer(ours, theirs) or (ours is None and theirs is None)


def reply_scores(measures: Mapping[str, Array], *, seed: int = 0) -> Scores:
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
