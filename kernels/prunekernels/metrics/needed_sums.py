"""Which sums over the vocabulary a choice of fields needs, and no more.

Sums come in groups, named as in `closed_form`; a loop that sums some groups alone yields all the
fields that need those. The masses and the largest logits are always there.
"""

from __future__ import annotations

from collections.abc import Iterable

from prunekernels.metrics.result_rows import (
    FULL_FLOATS,
    LABEL_FLOATS,
    PAIR_FLAGS,
    PAIR_FLOATS,
    PAIR_IDS,
)

#: Everything that `fields` can name, in the order of a result.
PAIR_FIELDS = (*PAIR_FLOATS, *LABEL_FLOATS, *FULL_FLOATS, *PAIR_IDS, *PAIR_FLAGS)

MASSES = ("W0", "V0")
#: KL(p‖q) and KL(q‖p). The Triton loops always have them: they notice what is not finite.
DIVERGENCES = ("W1", "V1")
PHI = ("A", "Fp", "Fq")
_ENTROPIES = ("Wy", "Vy")
_ANGLE = ("R0", "S0", "C0", "Pw", "P2")
_LOGITS = ("Z2", "Zd", "D2", "ZZ", "B2")
_UNIFORM = ("U1", "U2", "D2", "n")
_SPREAD = {"base": ("W1", "W2"), "other": ("W1", "W2", "V1", "V2")}
_SQUARED = {"base": ("R0", "R1", "R2"), "other": ("S0", "S1", "S2")}
_SUMS = {
    **dict.fromkeys(("kl_base_other", "kl_other_base", "estimate_valid"), DIVERGENCES),
    **dict.fromkeys(("entropy_base", "entropy_other"), _ENTROPIES),
    **dict.fromkeys(("cos_prob", "one_minus_cos_prob"), _ANGLE),
    **dict.fromkeys(("cos_logit", "one_minus_cos_logit", "alpha"), _LOGITS),
    **dict.fromkeys(("parallel_ratio", "orthogonal_ratio"), _LOGITS),
    "uniform_variance": _UNIFORM,
    "delta_l1": ("L1",),
    "delta_l2": ("D2",),
}


def sums(fields: Iterable[str], *, weights: str, precise: bool) -> frozenset[str]:
    """Names of the sums of one pass that the fields need.

    Args:
        fields: names of `PAIR_FIELDS`.
        weights: "base" or "other": whose distribution weighs the second-order estimates.
        precise: whether divergences come from float32 sums of φ (`PHI`).
    """
    needed = set(MASSES)
    for field in fields:
        needed.update(_SUMS.get(field, ()))
        if field in ("kl_estimate", "estimate_valid"):
            needed.update(_SPREAD[weights])
        if field == "one_minus_cos_prob_estimate":
            needed.update(_SQUARED[weights])
        if precise and field in ("kl_base_other", "kl_other_base", "estimate_valid"):
            needed.update(PHI)
    return frozenset(needed)


#: Fields of two vectors that need the products of the two alone, not those of their difference.
WITHOUT_DIFFERENCE = frozenset(("cosine", "norm_base", "norm_other"))
