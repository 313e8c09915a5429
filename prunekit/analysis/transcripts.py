"""Both models' texts for one prompt, token by token, and both models' view of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from prunekernels import PairStats

from prunekit.analysis.grid import MetricGrid
from prunekit.evaluation import text_similarity
from prunekit.models.generation import Rollout

TOP_TOKENS = 5
Tops = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class TopToken:
    """A likely next token: its id, its text and its probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One step of the dense model's continuation, as both models see it.

    Attributes:
        kl: KL(dense ‖ pruned), in nats.
        p_cosine: Cosine of the two distributions.
        top_dense: The dense model's most likely next tokens, most likely first.
        top_pruned: The pruned model's.
    """

    kl: float
    p_cosine: float
    top_dense: tuple[TopToken, ...]
    top_pruned: tuple[TopToken, ...]


@dataclass(frozen=True)
class Generation:
    """One prompt and what both models make of it, greedily.

    Attributes:
        prompt: The text that was asked.
        prompt_ids: Token ids the models were given (chat template included).
        dense_ids: The dense model's continuation, with its end-of-sequence token if it came.
        pruned_ids: The pruned model's.
        dense_text: Text of `dense_ids` without special tokens.
        pruned_text: Text of `pruned_ids`.
        dense_tokens: One string per token of `dense_ids`, for display.
        pruned_tokens: One string per token of `pruned_ids`.
        first_divergence: First step at which the tokens differ, None if none does.
        steps: Per token of `dense_ids`, both models' view of that step (teacher-forced).
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    dense_ids: tuple[int, ...]
    pruned_ids: tuple[int, ...]
    dense_text: str
    pruned_text: str
    dense_tokens: tuple[str, ...]
    pruned_tokens: tuple[str, ...]
    first_divergence: int | None
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; a non-finite number becomes a string."""
        data = asdict(self)
        for step in data["steps"]:
            for name in ("kl", "p_cosine"):
                step[name] = step[name] if np.isfinite(step[name]) else repr(step[name])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Generation:
        """Undo `to_dict`."""
        steps = tuple(
            Step(
                float(step["kl"]),
                float(step["p_cosine"]),
                tuple(TopToken(**token) for token in step["top_dense"]),
                tuple(TopToken(**token) for token in step["top_pruned"]),
            )
            for step in data["steps"]
        )
        fields: dict[str, Any] = dict(data)
        for name in ("prompt_ids", "dense_ids", "pruned_ids", "dense_tokens", "pruned_tokens"):
            fields[name] = tuple(fields[name])
        return cls(**(fields | {"steps": steps}))


def top_tokens(pairs: PairStats) -> tuple[Tops, Tops]:
    """Each row's top tokens as (id, probability), of the dense and of the pruned model."""
    top = pairs.topk
    assert top is not None
    sides = (top.ids_base, top.prob_base), (top.ids_other, top.prob_other)
    lists = [
        [
            list(zip(row_ids, row_probs, strict=True))
            for row_ids, row_probs in zip(ids.tolist(), probs.tolist(), strict=True)
        ]
        for ids, probs in sides
    ]
    return lists[0], lists[1]


def named(tokenizer: Any, tokens: Sequence[tuple[int, float]]) -> tuple[TopToken, ...]:
    """Top tokens with their texts."""
    return tuple(TopToken(i, tokenizer.decode([i]), probability) for i, probability in tokens)


def transcribed(
    tokenizer: Any,
    prompt: str,
    ours: Rollout,
    theirs: Rollout,
    grid: MetricGrid,
    index: int,
    tops: tuple[Tops, Tops],
) -> Generation:
    def shown(ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(tokenizer.decode([token]) for token in ids)

    steps = tuple(
        Step(
            float(grid["kl_dense_pruned"][index, step]),
            float(grid["p_cosine"][index, step]),
            named(tokenizer, tops[0][step]),
            named(tokenizer, tops[1][step]),
        )
        for step in range(len(ours.continuation))
    )
    return Generation(
        prompt,
        ours.prompt,
        ours.continuation,
        theirs.continuation,
        tokenizer.decode(list(ours.continuation), skip_special_tokens=True),
        tokenizer.decode(list(theirs.continuation), skip_special_tokens=True),
        shown(ours.continuation),
        shown(theirs.continuation),
        text_similarity.first_divergence(ours.continuation, theirs.continuation),
        steps,
    )
