"""Single-step against generative scores over the number of dropped sublayers.

The paper's headline: multiple-choice accuracy falls slowly as sublayers go, generation at once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from prunekit import distributed, generation
from prunekit.analysis import quality
from prunekit.analysis.decoding import decode
from prunekit.analysis.grid import interval_to_dict
from prunekit.errors import PrunekitError
from prunekit.evaluation.items import Choice
from prunekit.models.dropped import drop_sublayers_
from prunekit.models.layouts import SUBLAYERS
from prunekit.study.baseline import Baseline, shared_baseline
from prunekit.study.sharing import gather_decoding

# Metrics of the teacher-forced grid that a row carries.
_METRICS = ("h_cosine", "z_cosine", "p_cosine", "kl_dense_pruned", "kl_pruned_dense", "flipped")


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
) -> list[dict[str, Any]]:
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
        baseline: What the dense model does by itself, shared with other comparisons.

    Returns:
        One JSON-able row per count, ascending: `count`, the dropped layers as `attn` and `mlp`, and
        `scores`: per name of `quality.single_step`, `quality.generative` and `_METRICS` an interval
        as a dict of mean, low, high and n.

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
    share = distributed.shard(list(prompts))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    options |= {"chat": chat, "progress": progress}
    baseline = shared_baseline(baseline, dense, tokenizer, **options)
    rollouts = distributed.shard(baseline.rollouts(prompts))
    pruned = copy.deepcopy(dense)
    dropped: dict[str, list[int]] = {"attn": [], "mlp": []}
    rows = []
    for count in sorted(set(counts)):
        done = sum(map(len, dropped.values()))
        new: dict[str, list[int]] = {"attn": [], "mlp": []}
        for sublayer, layer in ranking[:count]:
            for part in SUBLAYERS if sublayer == "block" else (sublayer,):
                if layer not in dropped[part]:
                    new[part].append(layer)
                    dropped[part].append(layer)
        if sum(map(len, dropped.values())) > done:
            drop_sublayers_(pruned, **new)
        left = pruned if any(dropped.values()) else dense
        part_of = None
        if share:
            part_of = decode(
                dense,
                left,
                tokenizer,
                share,
                rollouts=rollouts,
                temperature=temperature,
                **options,
            )
        decoding = gather_decoding(part_of)
        if left is dense:
            found = dict(baseline.single_step(choices))
        else:
            found = quality.single_step(left, tokenizer, choices, progress=progress)
        found |= quality.generative(decoding.sequence, seed=seed)
        found |= {name: decoding.teacher_forced.interval(name, seed=seed) for name in _METRICS}
        table = {name: interval_to_dict(value) for name, value in found.items()}
        rows.append({"count": count, **{k: sorted(v) for k, v in dropped.items()}, "scores": table})
    return rows
