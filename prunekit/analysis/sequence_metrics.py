"""Measures of whole texts: of each prompt's dense and pruned continuation, not of single steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from prunekit.analysis.grid import Array, nan_mean
from prunekit.analysis.transcripts import Generation
from prunekit.evaluation import text_similarity
from prunekit.evaluation.likelihood import sequence_nll
from prunekit.evaluation.scoring import right_padded
from prunekit.models.architectures import input_device
from prunekit.models.generation import Rollout

# Per-prompt measures of `Decoding.sequence`; the perplexities are under the dense model.
SEQUENCE_METRICS = (
    "identical",
    "first_divergence",
    "exact_prefix",
    "exact_prefix_share",
    "chrf",
    "repetition_dense",
    "repetition_pruned",
    "distinct2_dense",
    "distinct2_pruned",
    "eos_dense",
    "eos_pruned",
    "length_dense",
    "length_pruned",
    "nll_dense_text",
    "nll_pruned_text",
    "perplexity_dense_text",
    "perplexity_pruned_text",
)


def sequence_metrics(
    generations: Sequence[Generation],
    ends: Sequence[int],
    dense_nlls: Array,
    pruned_nlls: Array,
) -> dict[str, Array]:
    table = []
    for index, found in enumerate(generations):
        ours, theirs = found.dense_ids, found.pruned_ids
        prefix = text_similarity.exact_prefix(ours, theirs)
        table.append(
            {
                "identical": float(found.first_divergence is None),
                "first_divergence": np.nan
                if found.first_divergence is None
                else float(found.first_divergence),
                "exact_prefix": float(prefix),
                "exact_prefix_share": prefix / max(len(ours), len(theirs)),
                "chrf": text_similarity.chrf(found.pruned_text, found.dense_text),
                "repetition_dense": text_similarity.repetition_rate(ours, 4),
                "repetition_pruned": text_similarity.repetition_rate(theirs, 4),
                "distinct2_dense": text_similarity.distinct_n(ours, 2),
                "distinct2_pruned": text_similarity.distinct_n(theirs, 2),
                "eos_dense": float(ours[-1] in ends),
                "eos_pruned": float(theirs[-1] in ends),
                "length_dense": float(len(ours)),
                "length_pruned": float(len(theirs)),
                "nll_dense_text": dense_nlls[index],
                "nll_pruned_text": pruned_nlls[index],
                "perplexity_dense_text": float(np.exp(dense_nlls[index])),
                "perplexity_pruned_text": float(np.exp(pruned_nlls[index])),
            }
        )
    return {name: np.array([row[name] for row in table], np.float64) for name in SEQUENCE_METRICS}


def text_nlls(
    dense: PreTrainedModel, generations: Sequence[Generation], stepwise: Array | None
) -> tuple[Array, Array]:
    """Mean NLL per token, in nats, of the dense and of the pruned texts under the dense model.

    Args:
        dense: The dense model.
        generations: The texts.
        stepwise: (prompt, step) NLLs of the dense texts' tokens, if they were measured at T = 1.
    """
    if stepwise is None:
        ours = _mean_nlls(dense, [Rollout(g.prompt_ids, g.dense_ids) for g in generations])
    else:
        ours = nan_mean(stepwise, (1,))
    other = [i for i, found in enumerate(generations) if found.first_divergence is not None]
    texts = [Rollout(generations[i].prompt_ids, generations[i].pruned_ids) for i in other]
    theirs = ours.copy()  # a text that is the same is as likely
    if texts:
        theirs[other] = _mean_nlls(dense, texts)
    return ours, theirs


def _mean_nlls(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> Array:
    """Mean NLL per continuation token of each rollout, in nats."""
    device = input_device(model)
    ids, mask = right_padded([rollout.ids for rollout in rollouts], device)
    found = sequence_nll(model, ids, mask, [len(rollout.prompt) for rollout in rollouts])
    means: Array = found.totals / found.tokens
    return means
