"""Every op as the plainest torch: the executable specification that tests compare with.

float64 in, float64 out; nothing is chunked, fused or fast. Each line is one definition of
docs/metrics.md, "Fields", so that a reader can check it against a textbook. Divergences are
written as sums of terms that cannot be negative (φ(t) = eᵗ−1−t), which float64 evaluates to full
precision however small they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEG_INF = float("-inf")


def pair_stats(
    base: Tensor,
    other: Tensor,
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    subset: Tensor | None = None,
    topk: int = 0,
    level: str = "core",
    weights: str = "base",
) -> dict[str, Tensor]:
    """The fields of `PairStats.as_dict()` for `(…, V)` float64 logits."""
    a, b, t = base, other, temperature
    broken_a, broken_b = (~torch.isfinite(z.amax(-1)) for z in (a, b))
    hole_a, hole_b = a == _NEG_INF, b == _NEG_INF
    only_a, only_b = (hole_a & ~hole_b).any(-1), (hole_b & ~hole_a).any(-1)
    one_sided = only_a | only_b
    both = ~hole_a & ~hole_b
    inf, nan = float("inf"), float("nan")

    log_p, log_q = torch.log_softmax(a / t, -1), torch.log_softmax(b / t, -1)
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(both, log_q - log_p, 0.0)  # ln(q/p)
    d = torch.where(both, b - a, 0.0)
    za, zb = torch.where(both, a, 0.0), torch.where(both, b, 0.0)
    ra, rb = p * p / (p * p).sum(-1, keepdim=True), q * q / (q * q).sum(-1, keepdim=True)

    out: dict[str, Tensor] = {}
    kl_pq = _divergence(p, q, torch.where(both, ratio, -inf)).sum(-1)
    kl_qp = _divergence(q, p, torch.where(both, -ratio, -inf)).sum(-1)
    out["kl_base_other"] = kl_pq.masked_fill(only_b, inf)
    out["kl_other_base"] = kl_qp.masked_fill(only_a, inf)
    out["entropy_base"] = -torch.where(hole_a, 0.0, p * log_p).sum(-1)
    out["entropy_other"] = -torch.where(hole_b, 0.0, q * log_q).sum(-1)
    out["lse_base"] = torch.logsumexp(a / t, -1)
    out["lse_other"] = torch.logsumexp(b / t, -1)
    out["cos_prob"] = (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))
    out["one_minus_cos_prob"] = _one_minus_cosine(p, q)
    logit = vector_stats(za, zb)
    out["cos_logit"] = logit["cosine"].masked_fill(one_sided, nan)
    out["one_minus_cos_logit"] = logit["one_minus_cosine"].masked_fill(one_sided, nan)
    for name in ("alpha", "parallel_ratio", "orthogonal_ratio"):
        out[name] = logit[name].masked_fill(one_sided, nan)

    var_p = _variance(d, torch.where(both, p, 0.0))
    if weights == "base":
        var, var_squared, lost = var_p, _variance(d, ra), only_b
    else:
        var, var_squared, lost = _variance(d, q), _variance(d, rb), only_a
    out["kl_estimate"] = (var / (2 * t * t)).masked_fill(lost, inf)
    out["one_minus_cos_prob_estimate"] = (var_squared / (2 * t * t)).masked_fill(lost, inf)
    uniform = (~(hole_a & hole_b)).double()
    out["uniform_variance"] = _variance(d, uniform).masked_fill(one_sided, inf)
    out["delta_l1"] = d.abs().sum(-1).masked_fill(one_sided, inf)
    out["delta_l2"] = (d * d).sum(-1).masked_fill(one_sided, inf)
    out["margin_base"], out["margin_other"] = _margin(a), _margin(b)
    if labels is not None:
        index = labels[..., None]
        out["nll_base"] = -log_p.gather(-1, index).squeeze(-1)
        out["nll_other"] = -log_q.gather(-1, index).squeeze(-1)
        out["prob_delta"] = (q - p).gather(-1, index).squeeze(-1)
    if level == "full":
        m = 0.5 * (p + q)
        out["js"] = 0.5 * (
            torch.where((p > 0) & (m > 0), m * _xlogx((p - m) / m), 0.0)
            + torch.where((q > 0) & (m > 0), m * _xlogx((q - m) / m), 0.0)
            + torch.where((p == 0) & (q > 0), m, 0.0)
            + torch.where((q == 0) & (p > 0), m, 0.0)
        ).sum(-1)
        out["total_variation"] = 0.5 * (q - p).abs().sum(-1)
        out["hellinger"] = (0.5 * (q.sqrt() - p.sqrt()).square().sum(-1)).sqrt()

    broken = broken_a | broken_b
    out = {name: value.masked_fill(broken, nan) for name, value in out.items()}
    out["argmax_base"] = a.argmax(-1).masked_fill(broken_a, -1)
    out["argmax_other"] = b.argmax(-1).masked_fill(broken_b, -1)
    out["flipped"] = (out["argmax_base"] != out["argmax_other"]) & ~broken
    out["tie"] = ((out["margin_base"] == 0) | (out["margin_other"] == 0)) & ~broken
    spread, gap = 2.0 * out["kl_estimate"], out["kl_base_other"] + out["kl_other_base"]
    alike = (gap <= 2.0 * spread + 1e-5) & (spread <= 2.0 * gap + 1e-5)
    out["estimate_valid"] = (spread <= 1.0) & (gap <= 1.0) & alike & ~one_sided & ~broken
    if topk:
        top = _top_tokens(a, b, log_p, log_q, topk)
        out.update({f"topk.{name}": value for name, value in top.items()})
    if subset is not None:
        inner = pair_stats(
            a[..., subset], b[..., subset], temperature=t, level=level, weights=weights
        )
        out.update({f"subset.{name}": value for name, value in inner.items()})
    return out


def head_pair_stats(
    base_hidden: Tensor,
    other_hidden: Tensor,
    head_weight: Tensor,
    *,
    other_head_weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    softcap: float | None = None,
    logit_scale: float | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """`pair_stats` of the logits of `(…, D)` float64 hidden states."""
    pair = []
    for hidden, weight in ((base_hidden, head_weight), (other_hidden, other_head_weight)):
        if norm_weight is not None:
            mean_square = hidden.square().mean(-1, keepdim=True)
            hidden = hidden / (mean_square + norm_eps).sqrt() * norm_weight
        logits = hidden @ (head_weight if weight is None else weight).mT
        logits = logits if bias is None else logits + bias
        logits = logits if logit_scale is None else logits * logit_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        pair.append(logits)
    return pair_stats(pair[0], pair[1], **options)  # type: ignore[arg-type]


def vector_stats(base: Tensor, other: Tensor) -> dict[str, Tensor]:
    """The fields of `VectorStats` for `(…, D)` float64 vectors."""
    d = other - base
    norm_base, norm_other = base.norm(dim=-1), other.norm(dim=-1)
    same = (d == 0).all(-1)
    zero = (norm_base == 0) | (norm_other == 0)
    alpha = torch.where(same, 0.0, (d * base).sum(-1) / norm_base**2)
    across = d - alpha[..., None] * base
    cosine = (base * other).sum(-1) / (norm_base * norm_other)
    cosine = torch.where(zero, same.double(), cosine)
    one_minus = torch.where(zero, 1.0 - same.double(), _one_minus_cosine(base, other))
    orthogonal = torch.where(same, 0.0, across.norm(dim=-1) / norm_base)
    return {
        "cosine": cosine,
        "one_minus_cosine": one_minus,
        "one_minus_cosine_estimate": 0.5 * orthogonal**2,
        "alpha": alpha,
        "parallel_ratio": alpha.abs(),
        "orthogonal_ratio": orthogonal,
        "norm_base": norm_base,
        "norm_other": norm_other,
    }


def nm_mask(scores: Tensor, keep: int, of: int) -> Tensor:
    """Stable descending sort of every group of `of`; the first `keep` stay."""
    groups = scores.reshape(*scores.shape[:-1], -1, of)
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :keep], True).reshape(scores.shape)


def rowwise_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Stable descending sort of every row; all but floor(sparsity·K + 1e-9) stay."""
    width = scores.shape[-1]
    kept = width - math.floor(sparsity * width + 1e-9)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :kept], True)


def sparsegpt_update(
    weight: Tensor, upper: Tensor, mask: Tensor | None, keep: int = 0, of: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns one by one: pruned weights, errors and mask, each (R, C)."""
    weight = weight.clone()
    chosen = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    errors = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        if mask is None and i % of == 0:
            group = slice(i, i + of)
            scores = (weight[:, group] / upper.diagonal()[group]).square()
            chosen[:, group] = nm_mask(scores, keep, of)
        errors[:, i] = torch.where(chosen[:, i], 0.0, weight[:, i] / upper[i, i])
        weight[:, i + 1 :] -= errors[:, i, None] * upper[i, i + 1 :]
    return torch.where(chosen, weight, 0.0), errors, chosen


def _divergence(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """Terms p·φ(ln(q/p)) = q−p−p·ln(q/p) ≥ 0, whose sum is KL(p‖q); q where p is 0.

    By the series of φ(t) = eᵗ−1−t where the closed form cancels. `ratio` is ln(q/p), −inf where
    either side is excluded.
    """
    t = ratio.clamp(-0.5, 0.5)
    series, term = torch.zeros_like(t), torch.ones_like(t)
    for order in range(1, 16):
        term = term * t / order
        if order >= 2:
            series = series + term
    direct = torch.where(p > 0, q - p - p * ratio, q)
    return torch.where(ratio.abs() < 0.5, p * series, direct)


def _xlogx(s: Tensor) -> Tensor:
    """(1+s)·ln(1+s)−s, never negative; by its series where the closed form cancels."""
    series, power = torch.zeros_like(s), -s
    for order in range(2, 18):
        power = -power * s
        series = series + power / (order * (order - 1))
    return torch.where(s.abs() < 0.05, series, torch.xlogy(1 + s, 1 + s) - s)


def _variance(values: Tensor, weights: Tensor) -> Tensor:
    weights = weights / weights.sum(-1, keepdim=True)
    mean = (weights * values).sum(-1, keepdim=True)
    return (weights * (values - mean).square()).sum(-1)


def _one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    """½·‖x/‖x‖ − y/‖y‖‖², which equals 1−cos(x, y)."""
    x = x / x.norm(dim=-1, keepdim=True)
    y = y / y.norm(dim=-1, keepdim=True)
    return 0.5 * (x - y).square().sum(-1)


def _margin(z: Tensor) -> Tensor:
    if z.shape[-1] == 1:
        return torch.full_like(z[..., 0], float("inf"))
    first, second = z.topk(2, -1).values.unbind(-1)
    return first - second


def _top_tokens(a: Tensor, b: Tensor, log_p: Tensor, log_q: Tensor, k: int) -> dict[str, Tensor]:
    ids_a = a.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    ids_b = b.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    listed = torch.zeros_like(a, dtype=torch.bool).scatter(-1, ids_a, True)
    p, q = log_p.exp(), log_q.exp()
    tail_p, tail_q = p.masked_fill(listed, 0.0).sum(-1), q.masked_fill(listed, 0.0).sum(-1)
    coarse_p = torch.cat([p.gather(-1, ids_a), tail_p[..., None]], -1)
    coarse_q = torch.cat([q.gather(-1, ids_a), tail_q[..., None]], -1)
    shared = (ids_a[..., :, None] == ids_b[..., None, :]).any(-1)
    return {
        "ids_base": ids_a,
        "ids_other": ids_b,
        "values_base": a.gather(-1, ids_a),
        "values_other": b.gather(-1, ids_b),
        "prob_base": p.gather(-1, ids_a),
        "prob_other": q.gather(-1, ids_b),
        "cross_base": a.gather(-1, ids_b),
        "cross_other": b.gather(-1, ids_a),
        "overlap": shared.double().mean(-1),
        "mass_base": p.gather(-1, ids_a).sum(-1),
        "mass_other": q.gather(-1, ids_b).sum(-1),
        "tail_base": tail_p,
        "tail_other": tail_q,
        "kl_base_other": _kl(coarse_p, coarse_q),
        "kl_other_base": _kl(coarse_q, coarse_p),
    }


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p·ln(p/q), as Σ p·φ(ln(q/p)) plus q's mass where p is 0."""
    both = (p > 0) & (q > 0)
    ratio = torch.where(both, torch.log(q) - torch.log(p), 0.0)
    terms = torch.where(both, _divergence(p, q, ratio), torch.where(p > 0, float("inf"), q))
    return terms.sum(-1)
