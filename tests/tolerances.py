"""How far a metric may be from float64 truth, for every implementation of the metric ops.

The figures are those found in fp32 emulation of the one-pass sums with realistic and flat rows
(V = 152064 and 262144). Two things come on top of them: results are returned in float32, so a
value v carries 2⁻²⁴·|v| of its own; and rounding of single terms averages out over the
vocabulary, so what was found at V = 152064 is √(152064/V) larger on shorter rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OUTPUT = 2.0**-24
_MEASURED_VOCAB = 152064


def allowed(
    field: str,
    truth: dict[str, Tensor],
    *,
    level: str = "core",
    vocab: int = _MEASURED_VOCAB,
    temperature: float = 1.0,
) -> Tensor:
    """Largest error of a float field that a test accepts, per row.

    Args:
        field: a field of `PairStats`, without the prefix of a nested group.
        truth: all fields of the row in float64 (some errors scale with another field).
        level: the level that was asked for.
        vocab: V.
        temperature: T; exponents, and their rounding, grow with 1/T.
    """
    value = truth[field].abs()
    output = OUTPUT * value
    exact = level != "core"
    sharp = 1.0 / min(temperature, 1.0)
    short = max(1.0, math.sqrt(_MEASURED_VOCAB / vocab))
    if field in ("kl_base_other", "kl_other_base", "js"):
        if exact:  # 1e-6 of KL ≥ 0.01, 3e-5 of 1e-5, 1e-4 of 1e-7, 1e-14 of 0
            return torch.maximum(1e-6 * value, (1e-4 * value).clamp_max(3e-10)) + output + 1e-14
        return 1e-6 * sharp + 1e-6 * value  # a tenth of KL 1e-5, 1e-4 of 0.01
    if field in ("kl_estimate", "one_minus_cos_prob_estimate", "uniform_variance"):
        return 4e-6 * (1.0 if exact else short) * value + output + 1e-14
    if field == "one_minus_cos_prob":
        return 3e-10 + (0.0 if exact else 4e-6 * sharp) * value + output
    if field == "one_minus_cos_logit":
        # ‖d⊥‖²/2‖b‖² is what is left of ‖d‖²/2‖b‖², with the latter's rounding.
        across2 = truth["orthogonal_ratio"] ** 2
        whole = (truth["alpha"] ** 2 + across2) / ((1 + truth["alpha"]) ** 2 + across2)
        whole = whole.nan_to_num(nan=1.0).clamp_max(1.0)  # beyond 1 it is 1−cos itself
        return 3e-11 + (0.0 if exact else 2e-7) * whole + output
    if field in ("entropy_base", "entropy_other"):
        return (0.0 if exact else 4e-7 * sharp) + output + 1e-12
    if field in ("lse_base", "lse_other", "nll_base", "nll_other"):
        return (0.0 if exact else 4e-7 * sharp) + output + 1e-12
    if field in ("cos_prob", "cos_logit", "prob_delta", "total_variation"):
        return (0.0 if exact else 2e-7 * sharp) + output + 1e-12
    if field in ("alpha", "parallel_ratio"):
        size = torch.hypot(truth["parallel_ratio"], truth["orthogonal_ratio"])
        return (0.0 if exact else 2e-7) * size + output + 1e-15 * size
    if field == "orthogonal_ratio":
        # ‖d⊥‖² is what is left of ‖d‖² (its error) without the parallel part.
        size2 = truth["parallel_ratio"] ** 2 + value**2
        floor = 1e-14 if exact else 2e-7
        return torch.minimum(floor * size2 / value, (floor * size2).sqrt()) + output
    if field in ("delta_l1", "delta_l2"):
        return (0.0 if exact else 2e-7) * value + output
    if field in ("margin_base", "margin_other", "hellinger"):
        return output + 1e-12
    raise KeyError(field)


def mismatches(
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    *,
    level: str = "core",
    vocab: int = _MEASURED_VOCAB,
    temperature: float = 1.0,
    slack: float = 1.0,
) -> list[str]:
    """One line for every field that is off by more than `allowed`, or not the same at all.

    `slack` multiplies what is allowed, for results that round more often than whole rows do.

    Ids and flags must be equal; NaN and infinities must be in the same places.
    """
    lines = []
    for name, value in found.items():
        group, _, field = name.rpartition(".")
        if group == "topk":
            continue
        siblings = {
            key.rpartition(".")[2]: item
            for key, item in truth.items()
            if key.rpartition(".")[0] == group
        }
        if not value.is_floating_point():
            if not torch.equal(value, truth[name]):
                lines.append(f"{name}: {value.tolist()} is not {truth[name].tolist()}")
            continue
        size = vocab if not group else 1
        limit = slack * allowed(field, siblings, level=level, vocab=size, temperature=temperature)
        wanted, got = truth[name], value.double()
        special = ~torch.isfinite(wanted)
        same = torch.where(wanted.isnan(), got.isnan(), got == wanted)
        fine = torch.where(special, same, (got - wanted).abs() <= limit)
        for index in (~fine).nonzero()[:3].tolist():
            at = tuple(index)
            lines.append(
                f"{name}{list(at)}: got {float(got[at]):.9e}, truth {float(wanted[at]):.9e}, "
                f"error {float((got - wanted)[at].abs()):.2e}, allowed {float(limit[at]):.2e}"
            )
    return lines
