"""From hidden states to the three spaces: h, z = head(norm(h)) and p = softmax(z / T).

The only place of the analysis that calls the metric ops: every number in a `MetricGrid` comes from
`prunekernels.vector_stats` (h) or `prunekernels.head_pair_stats` (z and p), under the names below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from prunekernels import PairStats, head_pair_stats, vector_stats
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.analysis.grid import Array
from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture, Head
from prunekit.models.layouts import base_model_type

Lens = Literal["final_norm", "raw"]
Weights = Literal["base", "other"]
Level = Literal["core", "precise"]

# Metric of a grid -> field of VectorStats.
HIDDEN_FIELDS = {
    "h_cosine": "cosine",
    "h_one_minus_cosine": "one_minus_cosine",
    "h_one_minus_cosine_estimate": "one_minus_cosine_estimate",
    "h_alpha": "alpha",
    "h_parallel_ratio": "parallel_ratio",
    "h_orthogonal_ratio": "orthogonal_ratio",
}
# Metric of a grid -> field of PairStats; base is the dense model, other the pruned one.
PAIR_FIELDS = {
    "z_cosine": "cos_logit",
    "z_one_minus_cosine": "one_minus_cos_logit",
    "z_alpha": "alpha",
    "z_parallel_ratio": "parallel_ratio",
    "z_orthogonal_ratio": "orthogonal_ratio",
    "p_cosine": "cos_prob",
    "p_one_minus_cosine": "one_minus_cos_prob",
    "p_one_minus_cosine_estimate": "one_minus_cos_prob_estimate",
    "kl_dense_pruned": "kl_base_other",
    "kl_pruned_dense": "kl_other_base",
    "kl_estimate": "kl_estimate",
    "uniform_variance": "uniform_variance",
    "entropy_dense": "entropy_base",
    "entropy_pruned": "entropy_other",
    "flipped": "flipped",
    "estimate_valid": "estimate_valid",
    "margin_dense": "margin_base",
}
LABEL_FIELDS = {"nll_dense": "nll_base", "nll_pruned": "nll_other"}
# Root mean square of the change of the logits over the vocabulary, from the sum of its squares.
DELTA_RMS = "z_delta_rms"
METRICS = (*HIDDEN_FIELDS, *PAIR_FIELDS, DELTA_RMS, *LABEL_FIELDS)


def check_pair(
    dense: PreTrainedModel, pruned: PreTrainedModel
) -> tuple[Architecture, Architecture]:
    """Make sure that two models can be compared, and see them through their layouts.

    Raises:
        PrunekitError: They differ in architecture, vocabulary, hidden size, dtype, device or
            attention implementation, one is in training mode, or the pruned model's layers can't
            be told apart.
    """
    archs = Architecture(dense), Architecture(pruned)
    for what, ours, theirs, fix in (
        (
            "architecture",
            base_model_type(dense.config),
            base_model_type(pruned.config),
            "compare a model with a pruned copy of itself",
        ),
        (
            "vocabulary size",
            archs[0].head.weight.shape[0],
            archs[1].head.weight.shape[0],
            "use the checkpoint that the pruned one was made from",
        ),
        (
            "hidden size",
            archs[0].head.weight.shape[1],
            archs[1].head.weight.shape[1],
            "use the checkpoint that the pruned one was made from",
        ),
        ("dtype", dense.dtype, pruned.dtype, "load both with the same dtype"),
        ("device", dense.device, pruned.device, "move both to the same device"),
        (
            "attention implementation",
            dense.config._attn_implementation,
            pruned.config._attn_implementation,
            "load both with the same attn_implementation",
        ),
    ):
        if ours != theirs:
            raise PrunekitError(f"the models differ in {what} ({ours} and {theirs}): {fix}")
    if dense.training or pruned.training:
        raise PrunekitError("a model is in training mode: call .eval() on both")
    twin_layers(*archs)
    return archs


def twin_layers(dense: Architecture, pruned: Architecture) -> list[int | None]:
    """For each layer of the dense model its index in the pruned one, None where it is gone.

    Raises:
        PrunekitError: The pruned model has layers that the dense one lacks, or fewer layers and no
            record of which ones it kept.
    """
    recorded = getattr(pruned.model.config, "prunekit_kept_blocks", None) is not None
    if len(pruned.layers) != len(dense.layers) and not recorded:
        raise PrunekitError(
            f"the models have {len(dense.layers)} and {len(pruned.layers)} layers and the pruned "
            "one's config.json does not say which it kept: add their indices as "
            "prunekit_kept_blocks"
        )
    index_of = {original: index for index, original in enumerate(pruned.original_layers)}
    unknown = sorted(set(index_of) - set(dense.original_layers))
    if unknown:
        raise PrunekitError(
            f"the pruned model has layers {unknown} that the dense one lacks: swap the two models"
        )
    return [index_of.get(original) for original in dense.original_layers]


@dataclass(frozen=True)
class Reading:
    """Metrics of pairs of hidden states.

    Attributes:
        metrics: Per name of `METRICS` (labels' only where labels were given) a float64 array (N,).
        pairs: The op's own result, for what a grid doesn't hold (top tokens, subset).
    """

    metrics: dict[str, Array]
    pairs: PairStats


class Reader:
    """Reads pairs of hidden states through norm and head.

    Args:
        dense: Whose norm and head read the base rows.
        pruned: Whose norm and head read the other rows; None uses the dense model's for both, as
            the counterfactual analysis does.
        temperature: T in p = softmax(z / T), above 0.
        lens: "final_norm" applies the model's final norm before its head; "raw" doesn't, which is
            what the research code does.
        weights: Which distribution weighs the second-order estimates: the dense model's ("base")
            or the pruned one's ("other").
        level: Precision of the divergences, see `prunekernels.pair_stats`.

    Raises:
        PrunekitError: The temperature or an option is out of range, or the heads differ in more
            than their weight.
    """

    def __init__(
        self,
        dense: Architecture,
        pruned: Architecture | None = None,
        *,
        temperature: float = 1.0,
        lens: Lens = "final_norm",
        weights: Weights = "base",
        level: Level = "precise",
    ) -> None:
        if not temperature > 0:
            raise PrunekitError(f"temperature {temperature} must be above 0: use 1 for softmax(z)")
        for name, value, allowed in (
            ("lens", lens, ("final_norm", "raw")),
            ("weights", weights, ("base", "other")),
        ):
            if value not in allowed:
                raise PrunekitError(f"unknown {name} '{value}': use one of {', '.join(allowed)}")
        self.dense, self.pruned = dense, pruned or dense
        self.temperature, self.lens, self.weights, self.level = temperature, lens, weights, level
        self.head = dense.head
        self.other_weight = _other_weight(self.head, self.pruned.head)

    def read(
        self,
        base: Tensor,
        other: Tensor,
        *,
        labels: Tensor | None = None,
        normed: bool = False,
        topk: int = 0,
        subset: Tensor | None = None,
    ) -> Reading:
        """Metrics of each pair of rows in h, z and p.

        Args:
            base: (N, hidden) hidden states of the dense model.
            other: (N, hidden) hidden states of the pruned model.
            labels: (N,) token that actually follows, or None.
            normed: The rows are behind the final norm already.
            topk: Top tokens of both rows to keep in `pairs`.
            subset: Token ids (k,) to evaluate apart, in `pairs`.

        Raises:
            PrunekitError: A model's logits are not finite.
        """
        head = self.head
        base, other = base.to(head.weight.device), other.to(head.weight.device)
        labels = None if labels is None else labels.to(head.weight.device)
        hidden = vector_stats(base, other)
        if self.lens == "final_norm" and not normed:
            base, other = self.dense.final_norm(base), self.pruned.final_norm(other)
        pairs = head_pair_stats(
            base,
            other,
            head.weight,
            other_head_weight=self.other_weight,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            temperature=self.temperature,
            labels=labels,
            subset=subset,
            topk=topk,
            level=self.level,
            weights=self.weights,
        )
        for name, best in (("dense", pairs.argmax_base), ("pruned", pairs.argmax_other)):
            if (best < 0).any():  # how the op marks a row that holds NaN or +inf
                raise PrunekitError(
                    f"the {name} model's logits are not finite: check its weights for NaN and "
                    "infinities, or load it as float32"
                )
        fields = PAIR_FIELDS if labels is None else {**PAIR_FIELDS, **LABEL_FIELDS}
        metrics = {name: to_array(getattr(hidden, field)) for name, field in HIDDEN_FIELDS.items()}
        metrics |= {name: to_array(getattr(pairs, field)) for name, field in fields.items()}
        vocabulary = head.weight.shape[0]
        metrics[DELTA_RMS] = np.sqrt(to_array(pairs.delta_l2) / vocabulary)
        return Reading(metrics, pairs)


def to_array(values: Tensor) -> Array:
    """A float64 numpy copy of any tensor."""
    array: Array = values.detach().to("cpu", torch.float64).numpy()
    return np.array(array)


def _other_weight(ours: Head, theirs: Head) -> Tensor | None:
    """The pruned head's weight, None if it equals the dense one's."""
    same_bias = (ours.bias is None) == (theirs.bias is None) and (
        ours.bias is None or theirs.bias is None or torch.equal(ours.bias, theirs.bias)
    )
    scalars = (ours.softcap, ours.logit_scale) == (theirs.softcap, theirs.logit_scale)
    if not same_bias or not scalars:
        raise PrunekitError(
            "the two models' heads differ in bias, softcap or logit scale: compare a model with a "
            "pruned copy of itself"
        )
    shared = ours.weight is theirs.weight or ours.weight.data_ptr() == theirs.weight.data_ptr()
    return None if shared or torch.equal(ours.weight, theirs.weight) else theirs.weight
