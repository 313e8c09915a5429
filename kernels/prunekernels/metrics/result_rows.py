"""The order in which the ops pack their result fields, shared by every implementation.

An op returns few tensors rather than thirty: floats `(fields, N)`, ids `(2, N)` and flags
`(3, N)`. This module says which row is which field; `metrics/fields.py` unpacks them.
"""

from __future__ import annotations

LEVELS = ("core", "precise", "full")
WEIGHTS = ("base", "other")

PAIR_FLOATS = (
    "kl_base_other",
    "kl_other_base",
    "entropy_base",
    "entropy_other",
    "lse_base",
    "lse_other",
    "cos_prob",
    "one_minus_cos_prob",
    "cos_logit",
    "one_minus_cos_logit",
    "alpha",
    "parallel_ratio",
    "orthogonal_ratio",
    "kl_estimate",
    "one_minus_cos_prob_estimate",
    "uniform_variance",
    "delta_l1",
    "delta_l2",
    "margin_base",
    "margin_other",
)
LABEL_FLOATS = ("nll_base", "nll_other", "prob_delta")
FULL_FLOATS = ("js", "total_variation", "hellinger")
PAIR_IDS = ("argmax_base", "argmax_other")
PAIR_FLAGS = ("flipped", "tie", "estimate_valid")

TOPK_FLOATS = (
    "values_base",
    "values_other",
    "prob_base",
    "prob_other",
    "cross_base",
    "cross_other",
)  # (6, N, k)
TOPK_ROWS = (
    "overlap",
    "mass_base",
    "mass_other",
    "tail_base",
    "tail_other",
    "kl_base_other",
    "kl_other_base",
)  # (7, N)
TOPK_IDS = ("ids_base", "ids_other")  # (2, N, k)

#: The rows of a vector result; of a choice of fields, the others are not written.
VECTOR_FLOATS = (
    "cosine",
    "one_minus_cosine",
    "one_minus_cosine_estimate",
    "alpha",
    "parallel_ratio",
    "orthogonal_ratio",
    "norm_base",
    "norm_other",
)


def pair_floats(level: str, labels: bool, fields: str = "") -> tuple[str, ...]:
    """Names of the float rows of a pair result, in packed order.

    Args:
        level: "core", "precise" or "full".
        labels: whether there are labels.
        fields: names asked for, with commas between them; "" for all.
    """
    names: tuple[str, ...] = PAIR_FLOATS
    if labels:
        names += LABEL_FLOATS
    if level == "full":
        names += FULL_FLOATS
    return chosen(names, fields)


def chosen(names: tuple[str, ...], fields: str) -> tuple[str, ...]:
    """Those of `names` that `fields` asks for, in their own order."""
    asked = set(fields.split(","))
    return tuple(name for name in names if not fields or name in asked)
