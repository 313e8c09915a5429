"""From sums over the vocabulary to the reported fields, in float64, all rows at once.

With a, b the two logit rows, T the temperature, α = max a, β the reference of b,
a' = a−α, b' = b−β, x = b'−a', w = e^{a'/T}, v = e^{b'/T}, ρ = v−w, d = b−a, the sums are
    W0 W1 W2 Wy = Σw{1, x, x², a'}    V0 V1 V2 Vy = Σv{1, x, x², b'}
    R0 R1 R2 = Σw²{1, x, x²}          S0 S1 S2 = Σv²{1, x, x²}
    C0 = Σwv   Pw = Σwρ   P2 = Σρ²    U1 U2 = Σ{x, x²}   L1 = Σ|d|
    Z2 Zd D2 ZZ B2 = Σ{a², ad, d², ab, b²}
and every field below is a closed form of them. Where sums are float32 and small divergences are to
be kept, three more hold what would cancel: with t = x/T, φ(t) = eᵗ−1−t,
    A = Σρ   Fp = Σwφ(t)   Fq = Σvφ(−t)
Everything is centred, so that the differences
of nearly equal numbers are taken inside the sums and not between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.result_rows import LABEL_FLOATS

SUMS = (
    *("W0", "W1", "W2", "Wy", "V0", "V1", "V2", "Vy", "R0", "R1", "R2", "S0", "S1", "S2"),
    *("C0", "Pw", "P2", "U1", "U2", "L1", "Z2", "Zd", "D2", "ZZ", "B2"),
    *("JS", "TV", "HE"),  # second pass: 2·JS, Σ|q−p|, Σ(√q−√p)²
    *("n", "only_base", "only_other"),  # counted, and excluded in one row only
)
PHI_SUMS = ("A", "Fp", "Fq")
_Number = TypeVar("_Number", float, Tensor)


def pair_fields(
    sums: dict[str, Tensor],
    alpha: Tensor,
    beta: Tensor,
    options: PairOptions,
    *,
    full: bool,
) -> dict[str, Tensor]:
    """Evaluate the fields asked for that need no single token, from `SUMS`.

    Args:
        sums: one float64 `(N,)` tensor per name in `SUMS`; the KLs come from `PHI_SUMS` if given.
            Sums that no field needs may be left out; without counts nothing was excluded.
        alpha: `(N,)` float64, the reference of base (its maximum).
        beta: `(N,)` float64, the reference of other.
        options: T, whose distribution weighs the second-order estimates, and what is asked for.
        full: whether the second-pass sums are there.

    Returns:
        Float64 `(N,)` tensors by field name; `estimate_valid` is bool.
    """
    t = options.temperature
    inv_2t2 = 1.0 / (2.0 * t * t)
    w0, v0 = sums["W0"], sums["V0"]
    inf, nan = float("inf"), float("nan")
    # −inf in base alone makes x = +inf where q > 0; in other alone x = −inf where p > 0.
    only_base, only_other, one_sided = None, None, None
    if "only_base" in sums:
        only_base, only_other = sums["only_base"] > 0, sums["only_other"] > 0
        one_sided = only_base | only_other
    fields: dict[str, Tensor] = {}
    asked = options.asked

    def wants(*names: str) -> bool:
        return not asked.isdisjoint(names)

    def put(lost: Tensor | None, value: float, **named: Tensor) -> None:
        """Take fields, which are `value` where elements were `lost`."""
        for name, field in named.items():
            fields[name] = field if lost is None else field.masked_fill(lost, value)

    if wants("kl_base_other", "kl_other_base", "estimate_valid"):
        kl_pq, kl_qp = divergences(torch.log, w0, v0, sums["W1"], sums["V1"], t)
        if "A" in sums:
            mean = sums["A"] / w0
            bend = torch.log1p(mean)
            # Where the masses differ much, the φ form cancels; where references moved far (a KL
            # above 1 then), its sums have cancelled already.
            alike = (mean.abs() < 0.5) & (kl_pq < 1.0) & (kl_qp < 1.0)
            kl_pq = torch.where(alike, sums["Fp"] / w0 - (mean - bend), kl_pq)
            kl_qp = torch.where(alike, sums["Fq"] / v0 + mean / (1.0 + mean) - bend, kl_qp)
        put(only_other, inf, kl_base_other=kl_pq.clamp_min(0.0))
        put(only_base, inf, kl_other_base=kl_qp.clamp_min(0.0))
    if wants("entropy_base", "entropy_other"):
        fields["entropy_base"] = (torch.log(w0) - sums["Wy"] / w0 / t).clamp_min(0.0)
        fields["entropy_other"] = (torch.log(v0) - sums["Vy"] / v0 / t).clamp_min(0.0)
    if wants("lse_base", "lse_other", *LABEL_FLOATS):
        fields["lse_base"] = log_normaliser(torch.log, alpha, w0, t)
        fields["lse_other"] = log_normaliser(torch.log, beta, v0, t)
    if wants("kl_estimate", "estimate_valid"):
        side, lost = ("V", only_base) if options.by_other else ("W", only_other)
        mass, first, second = (sums[f"{side}{power}"] for power in range(3))
        variance = (second / mass - (first / mass) ** 2).clamp_min(0.0)
        put(lost, inf, kl_estimate=variance * inv_2t2)
    if wants("estimate_valid"):
        valid = estimate_applies(
            2.0 * fields["kl_estimate"], fields["kl_base_other"] + fields["kl_other_base"]
        )
        fields["estimate_valid"] = valid if one_sided is None else valid & ~one_sided
    if wants("one_minus_cos_prob_estimate"):
        squared, lost = ("S", only_base) if options.by_other else ("R", only_other)
        s0, s1, s2 = (sums[f"{squared}{power}"] for power in range(3))
        var_r = (s2 / s0 - (s1 / s0) ** 2).clamp_min(0.0)
        put(lost, inf, one_minus_cos_prob_estimate=var_r * inv_2t2)
    if wants("cos_prob", "one_minus_cos_prob"):
        cos_prob = (sums["C0"] / torch.sqrt(sums["R0"] * sums["S0"])).clamp_max(1.0)
        apart = (sums["P2"] - sums["Pw"] ** 2 / sums["R0"]).clamp_min(0.0)
        fields["cos_prob"] = cos_prob
        # The residual v−w is worth its rounding where it is shorter than v; else 1−cos itself is.
        fields["one_minus_cos_prob"] = torch.where(
            sums["P2"] < sums["S0"], apart / (sums["S0"] * (1.0 + cos_prob)), 1.0 - cos_prob
        )
    if wants("cos_logit", "one_minus_cos_logit", "alpha", "parallel_ratio", "orthogonal_ratio"):
        logit = angle_fields(*(sums[name] for name in ("Z2", "Zd", "D2", "ZZ", "B2")))
        put(
            one_sided,
            nan,
            cos_logit=logit["cosine"],
            one_minus_cos_logit=logit["one_minus_cosine"],
            alpha=logit["alpha"],
            parallel_ratio=logit["parallel_ratio"],
            orthogonal_ratio=logit["orthogonal_ratio"],
        )
    if wants("uniform_variance"):
        n = sums["n"]
        # d = x + β − α: subtract the smaller mean's square. x has the large one where the top token
        # moved and the rest did not, d where the whole row moved.
        mean_x = sums["U1"] / n
        mean_d = mean_x + (beta - alpha)
        uniform = torch.where(
            mean_d.abs() < mean_x.abs(), sums["D2"] / n - mean_d**2, sums["U2"] / n - mean_x**2
        )
        put(one_sided, inf, uniform_variance=uniform.clamp_min(0.0))
    if wants("delta_l1", "delta_l2"):
        put(one_sided, inf, delta_l1=sums["L1"], delta_l2=sums["D2"])
    if full:
        fields["js"] = (0.5 * sums["JS"]).clamp_min(0.0)
        fields["total_variation"] = 0.5 * sums["TV"]
        fields["hellinger"] = torch.sqrt(0.5 * sums["HE"])
    return fields


def divergences(
    log: Callable[[_Number], _Number],
    w0: _Number,
    v0: _Number,
    w1: _Number,
    v1: _Number,
    temperature: float,
) -> tuple[_Number, _Number]:
    """KL(p‖q) and KL(q‖p) of a row's numbers or all rows' tensors, with the logarithm of either."""
    c = log(v0 / w0)
    mean_p, mean_q = w1 / w0, v1 / v0
    if temperature != 1.0:
        mean_p, mean_q = mean_p / temperature, mean_q / temperature
    return c - mean_p, mean_q - c


def log_normaliser(
    log: Callable[[_Number], _Number], reference: _Number, mass: _Number, temperature: float
) -> _Number:
    """log Σ e^{z/T} of a mass relative to a reference, as `divergences` takes them."""
    return reference / temperature + log(mass)


#: Nats below which a variance and a divergence are both rounding, so that their ratio says nothing.
ROUNDING = 1e-5


def estimate_applies(variance: Tensor, divergence: Tensor) -> Tensor:
    """Whether second-order estimates describe the change from p to q.

    With K₂, K₃ the cumulants of d/T under p, KL(p‖q) = K₂/2 + K₃/6 + … and J = KL(p‖q)+KL(q‖p) =
    K₂ + K₃/2 + …, where K₂ = Var(d/T). J leaves the variance sooner than the KL leaves its
    estimate; where both are at most 1 and within a factor of 2 of one another, the estimate is
    closer still. A small variance alone says little: under a p that is nearly one-hot, every
    change has one.

    Args:
        variance: (...) variance of d/T.
        divergence: (...) J in nats.

    Returns:
        (...) bool.
    """
    alike = (divergence <= 2.0 * variance + ROUNDING) & (variance <= 2.0 * divergence + ROUNDING)
    return (variance <= 1.0) & (divergence <= 1.0) & alike


def pack(
    fields: dict[str, Tensor],
    tops: Tensor,
    margins: Tensor,
    ids: Tensor,
    label_logits: Tensor | None,
    options: PairOptions,
) -> list[Tensor]:
    """Add the fields that need single tokens, and pack those asked for as `result_rows` says.

    Args:
        fields: what `pair_fields` returned.
        tops: `(2, N)` float64 largest logits of base and other; NaN, infinite: the row is broken.
        margins: `(2, N)` float64 leads over the runners-up.
        ids: `(2, N)` int64 first indices of the largest.
        label_logits: `(2, N)` float64 logits of the labels, or None.
        options: T, and which float fields to pack.

    Returns:
        Floats, ids and flags; NaN, −1 and False where a row is broken.
    """
    fields["margin_base"], fields["margin_other"] = margins
    if label_logits is not None:
        fields |= label_fields(fields, label_logits, options)
    names = options.floats
    broken = ~torch.isfinite(tops)  # NaN, +inf, or nothing but −inf
    any_broken = broken.any(0)
    floats = tops.new_empty(len(names), tops.shape[1], dtype=torch.float32)
    if names:
        torch.stack([fields[name] for name in names], out=floats)
    floats.masked_fill_(any_broken, float("nan"))
    ids = ids.masked_fill(broken, -1)
    valid = fields.get("estimate_valid", any_broken)  # any will do where it is not asked for
    flags = torch.stack([ids[0] != ids[1], (margins == 0).any(0), valid])
    return [floats, ids, flags & ~any_broken]


def label_fields(
    fields: dict[str, Tensor], label_logits: Tensor, options: PairOptions
) -> dict[str, Tensor]:
    """NLLs and the change of probability of labels with these logits `(2, N)`, if asked for."""
    if options.asked.isdisjoint(LABEL_FLOATS):
        return {}
    nll_base = fields["lse_base"] - label_logits[0] / options.temperature
    nll_other = fields["lse_other"] - label_logits[1] / options.temperature
    prob_delta = torch.exp(-nll_other) - torch.exp(-nll_base)
    return dict(zip(LABEL_FLOATS, (nll_base, nll_other, prob_delta), strict=True))


def angle_fields(
    z2: Tensor, zd: Tensor | None, d2: Tensor, zz: Tensor, b2: Tensor
) -> dict[str, Tensor]:
    """Cosine, 1−cosine and the split of d along a, from ‖a‖², ⟨a, d⟩, ‖d‖², ⟨a, b⟩ and ‖b‖².

    ‖d⊥‖² = ‖d‖²−⟨a,d⟩²/‖a‖² and 1−cos = ‖d⊥‖²/[‖b‖²(1+cos)], which does not cancel where the
    two vectors nearly agree; where d is longer than b, the plain difference cancels less. Two
    equal vectors have cosine 1, zero vectors too; one zero vector has cosine 0 and, as a base,
    no defined alpha or ratios (NaN). Without ⟨a, d⟩ there are the cosine and the norms alone.
    """
    same = d2 == 0
    cosine = (zz / torch.sqrt(z2 * b2)).clamp(-1.0, 1.0)
    cosine = torch.where((z2 == 0) | (b2 == 0), 0.0, cosine).masked_fill(same, 1.0)
    if zd is None:
        return {"cosine": cosine, "norm_base": torch.sqrt(z2), "norm_other": torch.sqrt(b2)}
    alpha = (zd / z2).masked_fill(same, 0.0)
    across2 = (d2 - alpha * zd).clamp_min(0.0)
    one_minus = torch.where(d2 < b2, across2 / (b2 * (1.0 + cosine)), 1.0 - cosine)
    return {
        "cosine": cosine,
        "one_minus_cosine": one_minus,
        "alpha": alpha,
        "parallel_ratio": alpha.abs(),
        "orthogonal_ratio": torch.sqrt(across2 / z2).masked_fill(same, 0.0),
        "norm_base": torch.sqrt(z2),
        "norm_other": torch.sqrt(b2),
    }
