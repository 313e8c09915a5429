"""Partial sums of pairs of logit rows that merge exactly: what one part of the vocabulary says.

A state is one float64 number per row and name of `STATE_FIELDS`: references α, β (−inf: nothing
there), the two largest logits, the first id of the largest, the label's logit and whether it is
there, and the sums of `closed_form`. Moving the references from (α, β) to (α*, β*), with δa = α*−α,
δb = β*−β, s = δb−δa, turns a' into a'−δa, b' into b'−δb and x into x−s, so that every sum becomes
one of the sums' combinations (docs/metrics.md, "Moving the references"); states with the same
references then add. Ids are exact in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels.metrics.closed_form import PHI_SUMS, SUMS, pack, pair_fields
from prunekernels.metrics.options import PairOptions

HEAD_FIELDS = (
    *("alpha", "beta", "top_base", "top_other", "second_base", "second_other"),
    *("id_base", "id_other", "label_base", "label_other", "held"),
)
SUM_FIELDS = (*(name for name in SUMS if name not in ("JS", "TV", "HE")), *PHI_SUMS)
STATE_FIELDS = (*HEAD_FIELDS, *SUM_FIELDS)
_INF = float("inf")


def merge(parts: Tensor, temperature: float) -> Tensor:
    """One state `(N, F)` of K states `(K, N, F)`, of disjoint parts of the same rows."""
    named = dict(zip(STATE_FIELDS, parts.unbind(-1), strict=True))
    merged: dict[str, Tensor] = {}
    for side in ("base", "other"):
        top, index = named[f"top_{side}"], named[f"id_{side}"]
        best = top.amax(0)  # NaN wins
        first = torch.where(top == best, index, _INF).amin(0)
        leads = (top == best) & (index == first)
        merged[f"top_{side}"] = best
        merged[f"id_{side}"] = torch.where((first == _INF) | (best == -_INF), 0.0, first)
        merged[f"second_{side}"] = torch.where(leads, named[f"second_{side}"], top).amax(0)
        merged[f"label_{side}"] = named[f"label_{side}"].sum(0)
    alpha, holder = named["alpha"].max(0)
    beta = named["beta"].gather(0, holder[None]).squeeze(0)
    near = merged["top_other"] - beta <= 20.0 * temperature
    beta = torch.where(near, beta, merged["top_other"])
    moved = _moved(named, alpha, beta, temperature)
    merged |= {"alpha": alpha, "beta": beta, "held": named["held"].sum(0)}
    merged |= {name: moved[name].sum(0) for name in SUM_FIELDS}
    return torch.stack([merged[name] for name in STATE_FIELDS], -1)


def _moved(
    s: dict[str, Tensor], alpha: Tensor, beta: Tensor, temperature: float
) -> dict[str, Tensor]:
    """The sums relative to other references."""
    da = torch.where(s["alpha"] == -_INF, 0.0, alpha - s["alpha"])
    db = torch.where(s["beta"] == -_INF, 0.0, beta - s["beta"])
    shift = db - da
    t = shift / temperature
    ra, rb = torch.exp(-da / temperature), torch.exp(-db / temperature)
    # ra·(e^{−t}−1), ra·φ(−t) and rb·φ(t), φ(t) = eᵗ−1−t, from what neither cancels nor overflows
    close = t.abs() < 0.5
    small = torch.where(close, t, 0.0)
    gap = torch.where(close, ra * torch.expm1(-small), rb - ra)
    phi_p = torch.where(close, ra * (torch.expm1(-small) + small), rb - ra + ra * t)
    phi_q = torch.where(close, rb * (torch.expm1(small) - small), ra - rb - rb * t)

    def moments(scale: Tensor, *names: str) -> dict[str, Tensor]:
        zeroth, first, second = (s[name] for name in names)
        values = (
            zeroth,
            first - shift * zeroth,
            second - shift * (2.0 * first - shift * zeroth),
        )
        return {name: scale * value for name, value in zip(names, values, strict=True)}

    moved = moments(ra, "W0", "W1", "W2") | moments(rb, "V0", "V1", "V2")
    moved |= moments(ra * ra, "R0", "R1", "R2") | moments(rb * rb, "S0", "S1", "S2")
    moved |= moments(torch.ones_like(ra), "n", "U1", "U2")
    moved |= {
        "Wy": ra * (s["Wy"] - da * s["W0"]),
        "Vy": rb * (s["Vy"] - db * s["V0"]),
        "C0": ra * rb * s["C0"],
        "Pw": ra * (gap * s["R0"] + rb * s["Pw"]),
        "P2": gap * (gap * s["R0"] + 2.0 * rb * s["Pw"]) + rb * rb * s["P2"],
        "A": gap * s["W0"] + rb * s["A"],
        "Fp": ra * s["Fp"] + phi_p * s["W0"] + gap * s["A"],
        "Fq": rb * s["Fq"] + phi_q * s["W0"] - rb * t * s["A"],
    }
    return {name: s[name] for name in SUM_FIELDS} | moved


def finish(state: Tensor, options: PairOptions) -> list[Tensor]:
    """Floats, ids and flags of a state `(N, F)` of whole rows, as `result_rows` packs them."""
    named = dict(zip(STATE_FIELDS, state.unbind(-1), strict=True))
    sums = {name: named[name] for name in SUM_FIELDS if options.precise or name not in PHI_SUMS}
    found = pair_fields(sums, named["alpha"], named["beta"], options, full=False)

    def pair(name: str) -> Tensor:
        return torch.stack([named[f"{name}_base"], named[f"{name}_other"]])

    lost = named["held"] != 1  # a label that no part holds, or more than one
    return pack(
        found,
        pair("top"),
        pair("top") - pair("second"),
        pair("id").long(),
        pair("label").masked_fill(lost, float("nan")) if options.labels else None,
        options,
    )
