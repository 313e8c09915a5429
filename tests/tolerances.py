"""How far a metric may be from float64 truth, for every implementation of the metric ops.

The figures are those found in fp32 emulation of the one-pass sums with realistic and flat rows
(V = 152064 and 262144). Two things come on top of them: results are returned in float32, so a
value v carries 2⁻²⁴·|v| of its own; and rounding of single terms averages out over the
vocabulary, so what was found at V = 152064 is √(152064/V) larger on shorter rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any
from unittest import mock

import torch
from prunekernels import pair_stats, reference
from prunekernels.metrics.sums import eager as eager_sums
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
    if field == "hellinger":  # the root of a sum that rounds as the variances do
        return (0.0 if exact else 2e-6 * short) * value + output + 1e-12
    if field in ("margin_base", "margin_other"):
        return output + 1e-12
    raise KeyError(field)


def precise_kl_rounding(base: Tensor, other: Tensor, *, temperature: float, tile: int) -> Tensor:
    """Rounding of both KLs that the float32 sums of one precise pass leave.

    Six roundings of 2⁻²⁴ (exponent 2, polynomial 2, product, addition) of the largest term of the
    sum that cancels. With t = (b−a)/T and c a top token, KL(p‖q) = Φ/W0 − (ā − log1p ā), where
    Φ/W0 = E_p φ(t − t_c): centred on a token and not on the mean, it exceeds KL. Terms enter
    relative to the top of their tile, or of all tiles so far, and move to the row's: c is whichever
    of the three makes most. Where ā or KL is large, KL = ln(V0/W0) − E_p(t − t_c) instead, of
    terms as large as E|t − t_c| and as the distance to other's top token.
    (Measured on adversarial rows: no sum was off by more than 3.3·2⁻²⁴.)

    Args:
        base: logits `(N, V)`.
        other: logits `(N, V)`.
        temperature: T.
        tile: columns that share a centre.

    Returns:
        `(2, N)` float64, in nats: for KL(p‖q) and KL(q‖p).
    """
    a, b = base.double() / temperature, other.double() / temperature
    # a column that both rows lack weighs nothing
    lacking = torch.isneginf(a) & torch.isneginf(b)
    a, b = a.masked_fill(lacking, -1e9), b.masked_fill(lacking, -1e9)
    t = b - a
    weights = torch.stack([a.softmax(1), b.softmax(1)])
    block = torch.arange(a.shape[1], device=a.device) // tile
    tops = torch.stack([part.amax(1) for part in a.split(tile, 1)], 1)
    curved = torch.zeros_like(weights[..., 0])
    for top in (tops, tops.cummax(1).values, tops.amax(1, keepdim=True).expand_as(tops)):
        x = t - t.gather(1, _first_places(a, top))[:, block]
        phi = torch.stack([x.expm1() - x, x + (-x).expm1()])
        curved = torch.maximum(curved, (weights * phi).sum(-1).nan_to_num(math.inf))
    # x is now centred on the row's top token
    kl = (weights * t).sum(-1) - (b.logsumexp(1) - a.logsumexp(1))
    mean = (b.logsumexp(1) - a.logsumexp(1) - (t - x)[:, 0]).expm1()
    moved = b.amax(1) - b.gather(1, a.argmax(1, keepdim=True)).squeeze(1)
    straight = (weights * x.abs()).sum(-1) + moved
    plain = (kl.abs().amax(0) >= 1.0) | (mean.abs() >= 0.5)
    return 6 * OUTPUT * torch.where(plain, straight, curved)


def _first_places(rows: Tensor, values: Tensor) -> Tensor:
    """`(N, K)` first columns at which `rows` `(N, V)` have `values` `(N, K)`."""
    columns = [(rows == value[:, None]).int().argmax(1) for value in values.unbind(1)]
    return torch.stack(columns, 1)


def mismatches(
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    *,
    level: str = "core",
    vocab: int = _MEASURED_VOCAB,
    temperature: float = 1.0,
    slack: float = 1.0,
    extra: dict[str, Tensor] | None = None,
) -> list[str]:
    """One line for every field that is off by more than `allowed`, or not the same at all.

    `slack` multiplies what is allowed, for results that round more often than whole rows do;
    `extra` is added to what a field is allowed, per row.

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
        limit = limit + (extra or {}).get(name, 0.0)
        wanted, got = truth[name], value.double()
        special = ~torch.isfinite(wanted)
        same = torch.where(wanted.isnan(), got.isnan(), got == wanted)
        fine = same | (~special & ((got - wanted).abs() <= limit))
        for index in (~fine).nonzero()[:3].tolist():
            at = tuple(index)
            lines.append(
                f"{name}{list(at)}: got {float(got[at]):.9e}, truth {float(wanted[at]):.9e}, "
                f"error {float((got - wanted)[at].abs()):.2e}, allowed {float(limit[at]):.2e}"
            )
    return lines


def worse_than_allowed(
    got: dict[str, Tensor],
    base: Tensor,
    other: Tensor,
    names: Collection[str] | None = None,
    *,
    tile: int = 4096,
    approximate: bool = False,
    **options: Any,
) -> list[tuple[str, int, float, float, float]]:
    """Fields of a kernel off by more than the table and twice what eager's core sums are off.

    Eager's without the runs in which it adds weights: what is meant is one float32 sum, as a lane
    has it.

    Kernels sum in float32 at every level, hence core's part of the table; the KLs of precise are
    held to its precise part, and to `precise_kl_rounding` alone on top of it.

    Far rows have terms of another size than those for which the table was found: where other's top
    token lies m nats (of logits over T) above its logit at base's top token, which is the
    reference β, z reaches m and its three roundings (k, difference, product) are 3·2⁻²⁴·m of V0;
    beyond 20 nats β is other's maximum, and x of all other tokens is −m, so that V0 or W1/W0 brings
    the same to each KL: six in all. Var = W2/W0 − (W1/W0)² is then left of two numbers m², each of
    whose sums rounds up to three times. (Float64 analysis of single terms at m = 3…300: at most
    1.3, 4.9 and 0.2 times 2⁻²⁴ of m, m and m² for log-normaliser, KLs and variances. Up to m = 2
    the table covers it.)

    Args:
        got: fields by name, of `pair_stats`.
        base: logits `(N, V)`.
        other: logits `(N, V)`.
        names: fields to look at (None: all).
        tile: columns that share a reference in the kernel.
        approximate: whether exponentials are a GPU's: see `approximate_exponentials`.
        options: of `pair_stats`.

    Returns:
        Name, row, error, what was allowed, and the truth, of each field and row that is off.
    """
    level = options.setdefault("level", "core")
    with mock.patch.object(eager_sums, "_sums_of_runs", lambda x: x.sum(-1, keepdim=True)):
        eager = pair_stats(base, other, impl="eager", **{**options, "level": "core"}).as_dict()
    exact = reference.pair_stats(base.double(), other.double(), **options)
    temperature, vocab = options.get("temperature", 1.0), base.shape[-1]
    moved = other.amax(1) - other.gather(1, base.argmax(1, keepdim=True)).squeeze(1)
    moved = moved.double() / temperature
    straight = torch.where(moved > 2, moved, 0.0)
    powers = dict.fromkeys(
        ("entropy_other", "lse_other", "kl_other_base", "kl_base_other"), straight
    )
    squared = torch.where(moved > 20, moved, 0.0).square()
    powers |= dict.fromkeys(
        ("kl_estimate", "one_minus_cos_prob_estimate", "uniform_variance"), squared
    )
    rounding = precise_kl_rounding(base, other, temperature=temperature, tile=tile)
    own = dict(zip(("kl_base_other", "kl_other_base"), rounding, strict=True))
    moves = {}
    if approximate:
        moves = approximate_exponentials(base, other, temperature=temperature, tile=tile)
    worse = []
    for name, value in got.items():
        if names is not None and name not in names:
            continue
        want = exact[name]
        if not value.is_floating_point():
            assert torch.equal(value, want), name
            continue
        if name in own and level != "core":
            limit = allowed(name, exact, level=level, vocab=vocab, temperature=temperature)
            limit = limit + own[name]
        else:
            limit = allowed(name, exact, vocab=vocab, temperature=temperature)
            if name in eager:
                limit = limit + 2 * (eager[name].double() - want).abs()
            limit = limit + 6 * OUTPUT * powers.get(name, torch.zeros_like(moved))
        precise = f"precise.{name}" if level != "core" and name in own else name
        if precise in moves:
            limit = limit + moves[precise] * (want.abs() if name in OF_VALUE else 1.0)
        off = (value.double() - want).abs()
        same = torch.where(want.isnan(), value.isnan(), value.double() == want)
        for row in (~((off <= limit) | same)).nonzero().flatten().tolist():
            worse.append((name, row, off[row].item(), limit[row].item(), want[row].item()))
    return worse


#: How far ex2.approx.ftz.f32, by which GPUs compute w and v, may be from the correctly rounded
#: result: 2 ulp by the PTX ISA, section ex2 (docs/metrics.md, "What a GPU's exponentials do").
EX2 = 2.0**-22


def approximate_exponentials(
    base: Tensor, other: Tensor, *, temperature: float, tile: int
) -> dict[str, Tensor]:
    """How far fields move where each exponential is off by `EX2`, in whatever direction is worst.

    docs/metrics.md ("What a GPU's exponentials do") derives each line: the derivatives of a field
    by the weights w and v, times `EX2`, summed without regard to sign.

    Args:
        base: logits `(N, V)`.
        other: logits `(N, V)`.
        temperature: T.
        tile: columns that share a centre.

    Returns:
        Per field `(N,)` float64; "precise.…" for the KLs of the levels above core. Fields that
        are not there do not move.
    """
    a, b = base.double() / temperature, other.double() / temperature
    lacking = torch.isneginf(a) & torch.isneginf(b)
    a, b = a.masked_fill(lacking, -1e9), b.masked_fill(lacking, -1e9)
    p, q = a.softmax(1), b.softmax(1)
    moved: dict[str, Tensor] = {}

    def spread(weights: Tensor, values: Tensor) -> Tensor:
        mean = (weights * values).nan_to_num(0.0).sum(1, keepdim=True)
        return (weights * (values - mean).abs()).nan_to_num(0.0).sum(1)

    t = b - a
    for side, weights, row in (("base", p, a), ("other", q, b)):
        moved[f"entropy_{side}"] = EX2 * (1.0 + spread(weights, row))
        moved[f"lse_{side}"] = moved[f"nll_{side}"] = torch.full_like(p[:, 0], EX2)
    moved["kl_base_other"] = EX2 * (2.0 + spread(p, t))
    moved["kl_other_base"] = EX2 * (2.0 + spread(q, t))
    squares = [(2 * a).softmax(1), (2 * b).softmax(1), (a + b).softmax(1)]
    apart = sum((squares[2] - one).abs().sum(1) for one in squares[:2])
    moved["cos_prob"] = moved["one_minus_cos_prob"] = EX2 * apart
    moved["prob_delta"] = torch.full_like(p[:, 0], 2 * EX2)
    # the normalisers shift ln(q/p) of all tokens by 2ε, beside what terms have of their own
    variation = 0.5 * (p - q).abs().sum(1)
    distance2 = 0.5 * (p.sqrt() - q.sqrt()).square().sum(1)
    moved["total_variation"] = EX2 * (2.0 + 4.0 * variation)
    moved["hellinger"] = EX2 * (1.0 + 4.0 * distance2.sqrt())
    moved["js"] = EX2 * (2.0 * variation + 23.0 * distance2)  # JS ≤ 2·ln 2·Hellinger²
    for name, relative in (("kl_estimate", 2), ("one_minus_cos_prob_estimate", 4)):
        moved[name] = torch.full_like(p[:, 0], relative * EX2)  # of the value
    moved |= _of_precise_kls(a, b, p, q, tile)
    return moved


#: Fields of which `approximate_exponentials` has the relative change.
OF_VALUE = ("kl_estimate", "one_minus_cos_prob_estimate")


def _of_precise_kls(a: Tensor, b: Tensor, p: Tensor, q: Tensor, tile: int) -> dict[str, Tensor]:
    """Of both KLs from φ: below |t| = 1/4 a term has one factor, w or v; beyond, it has both.

    Where masses differ by half or KL ≥ 1, the kernel takes the KLs of core.
    """
    t = b - a
    block = torch.arange(a.shape[1], device=a.device) // tile
    tops = torch.stack([part.amax(1) for part in a.split(tile, 1)], 1)
    worst = torch.zeros(2, len(a), dtype=torch.float64, device=a.device)
    for top in (tops, tops.cummax(1).values, tops.amax(1, keepdim=True).expand_as(tops)):
        x = t - t.gather(1, _first_places(a, top))[:, block]
        near = x.abs() < 0.25
        grown = (p * x.exp()).nan_to_num(0.0)  # v/W0
        phi = p * (x.expm1() - x)
        shrunk = (q * (-x).exp()).nan_to_num(0.0)  # w/V0
        phi_back = q * ((-x).expm1() + x)
        mass = torch.where(near, p * x.expm1().abs(), grown + p).nan_to_num(0.0).sum(1)
        mean = (grown - p).sum(1)
        mass = (mass + mean.abs()) * (mean / (1 + mean)).abs()
        forth = torch.where(near, phi, p * (1 + x).abs() + grown) + phi
        back = torch.where(near, phi_back, q * (x - 1).abs() + shrunk) + phi_back
        found = torch.stack([forth.nan_to_num(0.0).sum(1), back.nan_to_num(0.0).sum(1)])
        worst = torch.maximum(worst, EX2 * (found + mass))
    kl = torch.stack([(p * -t).nan_to_num(0.0).sum(1), (q * t).nan_to_num(0.0).sum(1)])
    shift = b.logsumexp(1) - a.logsumexp(1)
    kl = torch.stack([kl[0] + shift, kl[1] - shift])
    spreads = torch.stack(
        [(p * t.abs()).nan_to_num(0.0).sum(1), (q * t.abs()).nan_to_num(0.0).sum(1)]
    )
    plain = (kl.abs().amax(0) >= 1.0) | (mean.abs() >= 0.5)
    worst = torch.where(plain, torch.maximum(worst, EX2 * (2 + 2 * spreads)), worst)
    return {"precise.kl_base_other": worst[0], "precise.kl_other_base": worst[1]}
