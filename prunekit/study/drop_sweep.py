"""Single-step against generative scores over the number of dropped sublayers.

The paper's headline: multiple-choice accuracy falls slowly as sublayers go, generation at once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from transformers import PreTrainedModel

from prunekit.analysis import quality
from prunekit.analysis.grid import interval_to_dict
from prunekit.analysis.quality import Scores
from prunekit.errors import PrunekitError
from prunekit.evaluation.items import Choice
from prunekit.models import generation
from prunekit.models.dropped import drop_sublayers_
from prunekit.models.layouts import SUBLAYERS
from prunekit.process.ambient import usual_torch
from prunekit.study.baseline import Baseline
from prunekit.study.setup import Setup

# Metrics of the teacher-forced grid that a row carries.
_METRICS = ("h_cosine", "z_cosine", "p_cosine", "kl_dense_pruned", "kl_pruned_dense", "flipped")


class SweepRow(TypedDict):
    """One model of a sweep, JSON-able.

    Attributes:
        count: How many entries of the ranking are dropped.
        attn: The layers whose attention is.
        mlp: The layers whose MLP is.
        scores: Per name of `quality.single_step`, `quality.generative` and `_METRICS` an interval
            as a dict of mean, low, high and n.
    """

    count: int
    attn: list[int]
    mlp: list[int]
    scores: dict[str, dict[str, Any]]


@usual_torch()
def sweep(
    dense: PreTrainedModel,
    tokenizer: Any,
    ranking: Sequence[tuple[str, int]],
    counts: Sequence[int],
    *,
    prompts: Sequence[str],
    choices: Sequence[Choice],
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    batch_size: int = 8,
    chat: generation.Chat = "auto",
    seed: int = 0,
    progress: bool = True,
    baseline: Baseline | None = None,
) -> list[SweepRow]:
    """Drop more and more sublayers and score each model both ways.

    Args:
        dense: The dense model; stays as it is (one copy of it is made).
        tokenizer: Its tokenizer.
        ranking: (sublayer, layer) in the order they go, as a `DropReport` ranks them; the sublayer
            "block" stands for both of a layer.
        counts: How many of the ranking are dropped; 0 is the dense model.
        prompts: Texts to continue.
        choices: Multiple-choice questions.
        max_new_tokens: Longest continuation.
        temperature: T in p = softmax(z / T) of the metrics.
        batch_size: Prompts run together.
        chat: Whether prompts are asked through the chat template.
        seed: Seed of the intervals' resampling.
        progress: Show progress bars (on a terminal only).
        baseline: The dense model's own texts and scores, which other comparisons may share.

    Returns:
        One row per count, ascending.

    Raises:
        PrunekitError: A count exceeds the ranking, or what `compare` raises.
    """
    if any(not 0 <= count <= len(ranking) for count in counts):
        raise PrunekitError(
            f"counts {list(counts)} for a ranking of {len(ranking)}: use 0 to {len(ranking)}"
        )
    unknown = [sublayer for sublayer, _ in ranking if sublayer not in (*SUBLAYERS, "block")]
    if unknown:
        raise PrunekitError(f"unknown sublayer '{unknown[0]}': use attn, mlp or block")
    setup = Setup(
        dense=dense,
        tokenizer=tokenizer,
        prompts=prompts,
        choices=choices,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        chat=chat,
        seed=seed,
        progress=progress,
        shared=baseline,
    )
    pruned = copy.deepcopy(dense)
    dropped: dict[str, list[int]] = {"attn": [], "mlp": []}
    rows: list[SweepRow] = []
    for count in sorted(set(counts)):
        new = _not_yet(ranking[:count], dropped)
        if any(new.values()):
            drop_sublayers_(pruned, **new)
        dropped = {part: sorted(dropped[part] + new[part]) for part in SUBLAYERS}
        left = pruned if any(dropped.values()) else dense
        table = {name: interval_to_dict(value) for name, value in _scores(setup, left).items()}
        rows.append(SweepRow(count=count, attn=dropped["attn"], mlp=dropped["mlp"], scores=table))
    return rows


def _not_yet(
    ranked: Sequence[tuple[str, int]], dropped: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Per sublayer the layers among `ranked` that are not dropped yet, each once."""
    new: dict[str, list[int]] = {part: [] for part in SUBLAYERS}
    for sublayer, layer in ranked:
        for part in SUBLAYERS if sublayer == "block" else (sublayer,):
            if layer not in dropped[part] and layer not in new[part]:
                new[part].append(layer)
    return new


def _scores(setup: Setup, model: PreTrainedModel) -> Scores:
    """Single-step scores, generative ones, and `_METRICS` of one model."""
    decoding = setup.decode(model)
    return {
        **setup.single_step(model).scores,
        **quality.generative(decoding.sequence, seed=setup.seed),
        **{name: decoding.teacher_forced.interval(name, seed=setup.seed) for name in _METRICS},
    }
