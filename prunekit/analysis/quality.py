"""Single-step scores beside generative ones, for one model against the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from prunekit.analysis.grid import Array
from prunekit.evaluation.intervals import Interval, bootstrap_mean, wilson
from prunekit.evaluation.items import Choice
from prunekit.evaluation.likelihood import option_logliks
from prunekit.process import distributed

Scores = dict[str, Interval]


@dataclass(frozen=True)
class SingleStep:
    """A model's answers to multiple-choice questions.

    Attributes:
        scores: "accuracy" and "accuracy_normalised" with Wilson intervals, and "chance".
        right: Per question whether the option with the highest summed log-likelihood is the right
            one: the answers behind "accuracy", which pair two models on the same questions.
    """

    scores: Scores
    right: tuple[bool, ...]


# Generative score -> per-prompt measure of `Decoding.sequence`, for the pruned and the dense model.
_GENERATIVE = {
    "identical": ("identical", None),
    "exact_prefix": ("exact_prefix", "length_dense"),
    "exact_prefix_share": ("exact_prefix_share", None),
    "chrf": ("chrf", None),
    "repetition": ("repetition_pruned", "repetition_dense"),
    "distinct2": ("distinct2_pruned", "distinct2_dense"),
    "eos": ("eos_pruned", "eos_dense"),
    "length": ("length_pruned", "length_dense"),
}
# What comparing the dense model's texts with themselves gives.
_SAME_TEXT = {"identical": 1.0, "exact_prefix_share": 1.0, "chrf": 100.0}


def single_step(
    model: PreTrainedModel, tokenizer: Any, choices: Sequence[Choice], *, progress: bool = False
) -> SingleStep:
    """Multiple-choice accuracy by option log-likelihood, summed and per character.

    Every process scores its share of the questions; all get the result.
    """
    share = distributed.shard(choices)
    answered: list[tuple[float, float, float]] = []
    if share:
        result = option_logliks(model, tokenizer, share, progress=progress)
        chances = [1 / len(choice.options) for choice in share]
        answered = list(
            zip(result.correct.tolist(), result.correct_normalised.tolist(), chances, strict=True)
        )
    table = np.array(distributed.gather(answered), np.float64)
    right, right_normalised, chance = table.sum(0)
    guess = float(chance / len(table))
    scores = {
        "accuracy": wilson(int(right), len(table)),
        "accuracy_normalised": wilson(int(right_normalised), len(table)),
        "chance": Interval(guess, guess, guess, len(table)),
    }
    return SingleStep(scores, tuple(bool(answer) for answer in table[:, 0]))


def generative(sequence: Mapping[str, Array], *, dense: bool = False, seed: int = 0) -> Scores:
    """Scores of generated texts, from the per-prompt measures of a `Decoding`.

    Args:
        sequence: `Decoding.sequence`.
        dense: Score the dense model's own texts (against themselves) instead of the pruned ones.
        seed: Seed of the intervals' resampling.

    Returns:
        Per name an interval over prompts: identical, exact_prefix (tokens), exact_prefix_share,
        chrf (0–100) against the dense text; repetition (4-grams), distinct2, eos, length (tokens);
        perplexity under the dense model, the exponential of the mean NLL per token of a text.
    """
    scores: Scores = {}
    for name, (pruned_measure, dense_measure) in _GENERATIVE.items():
        if not dense:
            values = sequence[pruned_measure]
        elif dense_measure is not None:
            values = sequence[dense_measure]
        else:
            values = np.full_like(sequence[pruned_measure], _SAME_TEXT[name])
        scores[name] = bootstrap_mean(values, seed=seed)
    nll = bootstrap_mean(sequence["nll_dense_text" if dense else "nll_pruned_text"], seed=seed)
    mean, low, high = (float(np.exp(end)) for end in (nll.mean, nll.low, nll.high))
    scores["perplexity"] = Interval(mean, low, high, nll.n)
    return scores
