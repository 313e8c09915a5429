"""Triton helpers shared by the metric kernels: the sums of a pair of logit rows, and their moves.

Exponents are in base 2: w = 2^y, v = 2^z with y = k·a−A, z = k·b−B, k = log2(e)/T. The core level
takes each by one fused multiply-add, so that a rounded reference A shifts a row but never bends
it. The precise level's references are logits, α and β: y = k·(a−α), z = k·(b−β). z−y would have
the roundings of both, which are large against a small x: so x = (b−a)−K in logits, K near β−α
(`Gap`), and `to_states` makes the finished sums those of a state: x = z−y, or (b−β−a+α)/T if
precise. ρ = v−w, d = b−a, φ(t) = eᵗ−1−t with t = ((b−β)−(a−α))/T, whose roundings ρ shares.

`bundle_triton` names the sums. Where nothing is masked, four of them are left to `complete`, which
takes them from the others, and `thin` says where that would cancel. docs/metrics.md ("Moving the
references", "From sums to fields") derives what is done with them.
"""

# ruff: noqa: RUF005  (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, call-arg"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prunekernels.metrics.sums.bundle_triton import (
    B2,
    C0,
    COUNT,
    LINEAR,
    S0,
    SQUARE,
    ZZ,
    Sums,
    choose,
    replaced,
)
from prunekernels.metrics.sums.elementwise_triton import LN2, fma

#: How far max b may lie above its reference, in base-2 units: 20 nats.
FAR = tl.constexpr(28.853900817779268)
#: Floor of exponents: 2^−10000 is 0 and 0·−10000 is not NaN.
LOWEST = tl.constexpr(-1.0e30)


class Gap(NamedTuple):
    """The parts of K = other−base+rest, in logits: x = ((b−other)−(a−base))−rest."""

    base: Any
    other: Any
    rest: Any


class Reference(NamedTuple):
    """What exponents of a and b are relative to (−inf: nothing summed yet), and K."""

    a: Any
    b: Any
    gap: Any


class Scales(NamedTuple):
    """Numbers that the temperature gives: see `scales`."""

    k: Any
    inverse_t: Any
    unit: Any
    far: Any
    step: Any


class Exponents(NamedTuple):
    """y, z, x and t of logits; t is x unless precise."""

    y: Any
    z: Any
    x: Any
    t: Any


class Moves(NamedTuple):
    """What moving the references does to a bundle: see `moves`."""

    da: Any
    db: Any
    ra: Any
    rb: Any
    e: Any
    phi_p: Any
    phi_q: Any
    t: Any


@triton.jit
def scales(k, inverse_t, PRECISE: tl.constexpr):
    """k = log2(e)/T and 1/T, and what depends on the unit of references.

    Precise references are logits: `unit` is 1 and `step` k; else they are exponents: `unit` is k
    and `step` 1. `unit` leads from logits to references, `step` from those to exponents; `far` is
    20 nats in the units of references.
    """
    if PRECISE:
        return Scales(k=k, inverse_t=inverse_t, unit=1.0, far=20.0 / inverse_t, step=k)
    else:
        return Scales(k=k, inverse_t=inverse_t, unit=k, far=FAR, step=1.0)


@triton.jit
def gap(size, ref_a, ref_b, unit, HALF: tl.constexpr):
    """The parts of a K of some size, two of them 0.

    b−a is exact for logits of 16 bits (unless one is some thousand times the other), and for
    float32 logits that differ by less than a factor of 2. Where K is so large that those near the
    references do not, it comes off the larger of the two first, which is then exact.

    size: K, near β−α; not finite where a row holds nothing but −inf yet, and then 0 will do.
    unit: of the references, in logits.
    """
    size = tl.where(tl.abs(size) < float("inf"), size, 0.0)
    none = tl.zeros_like(size)
    if HALF:
        return Gap(base=none, other=none, rest=size)
    else:
        apart = tl.abs(size) * unit > 0.49 * tl.maximum(tl.abs(ref_a), tl.abs(ref_b))
        on_b = tl.abs(ref_b) > tl.abs(ref_a)
        return Gap(
            base=tl.where(apart & ~on_b, -size, none),
            other=tl.where(apart & on_b, size, none),
            rest=tl.where(apart, none, size),
        )


@triton.jit
def whole_gap(parts):
    """K from its parts."""
    return parts.other - parts.base + parts.rest


@triton.jit
def nowhere(SHAPE: tl.constexpr, unit, HALF: tl.constexpr):
    """References of some shape before anything is summed."""
    lowest = tl.full(SHAPE, float("-inf"), tl.float32)
    return Reference(a=lowest, b=lowest, gap=gap(tl.zeros_like(lowest), lowest, lowest, unit, HALF))


@triton.jit
def exponents(a, b, ref, scale, PRECISE: tl.constexpr, FLOOR: tl.constexpr):
    """`Exponents` of logits a and b; with FLOOR, y and z of −inf or nearly so are finite."""
    x = ((b - ref.gap.other) - (a - ref.gap.base)) - ref.gap.rest
    if PRECISE:
        low_a = a - ref.a
        low_b = b - ref.b
        y = low_a * scale.k
        z = low_b * scale.k
        t = (low_b - low_a) * scale.inverse_t
    else:
        y = fma(a, scale.k, -ref.a)
        z = fma(b, scale.k, -ref.b)
        t = x
    if FLOOR:
        y = tl.maximum(y, LOWEST)
        z = tl.maximum(z, LOWEST)
    return Exponents(y=y, z=z, x=x, t=t)


@triton.jit
def accumulate_logits(
    s, a, b, ref, scale, SUMS: tl.constexpr, PRECISE: tl.constexpr, OTHER: tl.constexpr
):
    """Add the terms of a block of logits, each finite or −inf, to a bundle of the same shape."""
    whole_a = a != float("-inf")
    whole_b = b != float("-inf")
    e = exponents(a, b, ref, scale, PRECISE, True)
    e = Exponents(y=tl.where(whole_a, e.y, LOWEST), z=tl.where(whole_b, e.z, LOWEST), x=e.x, t=e.t)
    a = tl.where(whole_a, a, 0.0)
    b = tl.where(whole_b, b, 0.0)
    return accumulate(s, a, b, e, whole_a, whole_b, SUMS, True, PRECISE, OTHER)


@triton.jit
def accumulate(
    s,
    a,
    b,
    e,
    whole_a,
    whole_b,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISE: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Add the terms of one block of logits to a bundle of the same shape.

    a, b: logits. e: their `exponents`. With MASKED, whole_a and whole_b say where each is a finite
    number; elsewhere a, b are 0 and y, z at their floor.
    """
    x = e.x
    t = e.t
    w = tl.exp2(e.y)
    v = tl.exp2(e.z)
    d = b - a
    s0 = s.S0
    c0 = s.C0
    zz = s.ZZ
    b2 = s.B2
    n = s.n
    if MASKED:
        w = tl.where(whole_a, w, 0.0)
        v = tl.where(whole_b, v, 0.0)
        both = whole_a & whole_b
        x = tl.where(both, x, 0.0)
        t = tl.where(both, t, 0.0)
        d = tl.where(both, d, 0.0)
        a = tl.where(both, a, 0.0)
        b = tl.where(both, b, 0.0)
        s0 = s0 + v * v
        c0 = c0 + w * v
        zz = zz + a * b
        b2 = b2 + b * b
        n = n + tl.where(whole_a | whole_b, 1.0, 0.0)
    elif OTHER:
        s0 = s0 + v * v
    rho = v - w
    phi_p = rho
    phi_q = rho
    if PRECISE:
        t2 = t * t
        even = t2 * (0.5 + t2 * (0.041666667 + t2 * 0.0013888889))
        odd = t * t2 * (0.16666667 + t2 * (0.0083333333 + t2 * 0.0001984127))
        wt = w * t
        near = tl.abs(t) < 0.25
        if MASKED:
            near = near & both
        wphi = w * (even + odd)
        rho = tl.where(near, wt + wphi, rho)
        phi_p = tl.where(near, wphi, rho - wt)
        phi_q = tl.where(near, v * (even - odd), v * t - rho)
    wx = w * x
    vx = v * x
    if OTHER:
        q1 = s.Q1 + vx * v
        q2 = s.Q2 + vx * vx
    else:
        q1 = s.Q1 + wx * w
        q2 = s.Q2 + wx * wx
    added = Sums(
        W0=s.W0 + w,
        W1=s.W1 + wx,
        W2=s.W2 + wx * x,
        Wy=s.Wy + w * e.y,
        V0=s.V0 + v,
        V1=s.V1 + vx,
        Vy=s.Vy + v * e.z,
        R0=s.R0 + w * w,
        S0=s0,
        C0=c0,
        Q1=q1,
        Q2=q2,
        Pw=s.Pw + w * rho,
        P2=s.P2 + rho * rho,
        U1=s.U1 + x,
        U2=s.U2 + x * x,
        L1=s.L1 + tl.abs(d),
        Z2=s.Z2 + a * a,
        Zd=s.Zd + a * d,
        D2=s.D2 + d * d,
        ZZ=zz,
        B2=b2,
        n=n,
        A=s.A + rho,
        Fp=s.Fp + phi_p,
        Fq=s.Fq + phi_q,
        V2=s.V2 + vx * x,
    )
    return choose(s, added, SUMS)


@triton.jit
def complete(s, SUMS: tl.constexpr, OTHER: tl.constexpr):
    """The sums that unmasked blocks leave out: Σv², Σwv, Σab and Σb² from those with ρ and d."""
    out = replaced(s, C0, s.R0 + s.Pw)
    if not OTHER:
        out = replaced(out, S0, s.R0 + 2.0 * s.Pw + s.P2)
    out = replaced(out, ZZ, s.Z2 + s.Zd)
    out = replaced(out, B2, s.Z2 + 2.0 * s.Zd + s.D2)
    return choose(s, out, SUMS)


@triton.jit
def thin(s):
    """Whether Σv² is small against Σw², or Σb² against Σa²: then `complete` loses digits."""
    return (tl.sum(s.S0 - 0.125 * s.R0, 0) < 0.0) | (tl.sum(s.B2 - 0.25 * s.Z2, 0) < 0.0)


@triton.jit
def spoiled(s):
    """Whether −inf, NaN or +inf has made a sum of lanes other than finite."""
    sign = tl.sum((s.W1 + s.V1) + (s.U1 + s.Wy + s.Vy), 0)
    return (sign - sign) != 0.0


@triton.jit
def moves(old_a, new_a, old_b, new_b, unit, DTYPE: tl.constexpr):
    """What moving the references from old to new does (−inf: nothing summed yet).

    With δ in exponents, `ra` = 2^−δa and `rb` = 2^−δb scale w and v. t = ln(ra/rb), and `e`,
    `phi_p` and `phi_q` are ra·expm1(−t), ra·φ(−t) and rb·φ(t), each from what neither cancels nor
    overflows.

    unit: k where the references are logits (precise), 1 where they are exponents.
    """
    unit = tl.cast(unit, DTYPE)
    da = (new_a.to(DTYPE) - old_a.to(DTYPE)) * unit
    db = (new_b.to(DTYPE) - old_b.to(DTYPE)) * unit
    da = tl.where(old_a == float("-inf"), 0.0, da)
    db = tl.where(old_b == float("-inf"), 0.0, db)
    t = (db - da) * LN2
    ra = tl.exp2(-da)
    rb = tl.exp2(-db)
    t2 = t * t
    small = tl.abs(t) < (1e-3 if tl.float64 == DTYPE else 0.25)
    even = t2 * (0.5 + t2 * (1.0 / 24.0 + t2 * (1.0 / 720.0)))
    odd = t2 * t * (1.0 / 6.0 + t2 * (1.0 / 120.0 + t2 * (1.0 / 5040.0)))
    return Moves(
        da=da,
        db=db,
        ra=ra,
        rb=rb,
        e=tl.where(small, ra * (even - odd - t), rb - ra),
        phi_p=tl.where(small, ra * (even - odd), rb - ra + ra * t),
        phi_q=tl.where(small, rb * (even + odd), ra - rb - rb * t),
        t=t,
    )


@triton.jit
def rebase(s, m, x, DTYPE: tl.constexpr, SUMS: tl.constexpr, OTHER: tl.constexpr):
    """A bundle relative to new references; `m` from `moves`, broadcastable to the sums.

    x: by how much the reference of x grows, in the units of x.
    """
    da = m.da.to(DTYPE)
    db = m.db.to(DTYPE)
    x = x.to(DTYPE)
    ra = m.ra.to(DTYPE)
    rb = m.rb.to(DTYPE)
    e = m.e.to(DTYPE)
    if OTHER:
        q0 = s.S0
        rq = rb * rb
    else:
        q0 = s.R0
        rq = ra * ra
    moved = Sums(
        W0=ra * s.W0,
        W1=ra * (s.W1 - x * s.W0),
        W2=ra * (s.W2 - x * (2.0 * s.W1 - x * s.W0)),
        Wy=ra * (s.Wy - da * s.W0),
        V0=rb * s.V0,
        V1=rb * (s.V1 - x * s.V0),
        Vy=rb * (s.Vy - db * s.V0),
        R0=ra * ra * s.R0,
        S0=rb * rb * s.S0,
        C0=ra * rb * s.C0,
        Q1=rq * (s.Q1 - x * q0),
        Q2=rq * (s.Q2 - x * (2.0 * s.Q1 - x * q0)),
        Pw=ra * (e * s.R0 + rb * s.Pw),
        P2=e * (e * s.R0 + 2.0 * rb * s.Pw) + rb * rb * s.P2,
        U1=s.U1 - x * s.n,
        U2=s.U2 - x * (2.0 * s.U1 - x * s.n),
        L1=s.L1,
        Z2=s.Z2,
        Zd=s.Zd,
        D2=s.D2,
        ZZ=s.ZZ,
        B2=s.B2,
        n=s.n,
        A=e * s.W0 + rb * s.A,
        Fp=ra * s.Fp + m.phi_p.to(DTYPE) * s.W0 + e * s.A,
        Fq=rb * s.Fq + m.phi_q.to(DTYPE) * s.W0 - rb * m.t.to(DTYPE) * s.A,
        V2=rb * (s.V2 - x * (2.0 * s.V1 - x * s.V0)),
    )
    return choose(s, moved, SUMS)


@triton.jit
def next_reference(ref, rises, top_a, at_top, top_b, scale, HALF: tl.constexpr):
    """Where references go once a larger logit has turned up.

    rises: whether base's largest logit, top_a, is new; at_top is b there. top_b: the largest b so
    far, which becomes b's reference where it is more than 20 nats above it.
    """
    new_a = tl.where(rises, top_a * scale.unit, ref.a)
    new_b = tl.where(rises, at_top * scale.unit, ref.b)
    size = tl.where(rises, at_top - top_a, whole_gap(ref.gap))
    away = top_b * scale.unit > new_b + scale.far
    new_b = tl.where(away, top_b * scale.unit, new_b)
    size = tl.where(away, (new_b - new_a) / scale.unit, size)
    return Reference(a=new_a, b=new_b, gap=gap(size, new_a, new_b, scale.unit, HALF))


@triton.jit
def move(s, old, new, scale, DTYPE: tl.constexpr, SUMS: tl.constexpr, OTHER: tl.constexpr):
    """A float32 bundle relative to new references, by factors of type DTYPE."""
    m = moves(old.a, new.a, old.b, new.b, scale.step, DTYPE)
    x = whole_gap(new.gap).to(DTYPE) - whole_gap(old.gap).to(DTYPE)
    return rebase(s, m, x, tl.float32, SUMS, OTHER)


@triton.jit
def to_states(s, ref, scale, SUMS: tl.constexpr, PRECISE: tl.constexpr, OTHER: tl.constexpr):
    """A bundle of x = d−K in logits, with the x of a state: relative to the references."""
    factor = scale.inverse_t if PRECISE else scale.k
    rest = ref.b.to(tl.float64) - ref.a.to(tl.float64)
    if PRECISE:
        rest = rest * tl.cast(factor, tl.float64)
    rest = rest - whole_gap(ref.gap).to(tl.float64) * tl.cast(factor, tl.float64)
    rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
    scaled = ()
    for i in tl.static_range(COUNT):
        if (LINEAR >> i) & 1:
            scaled = scaled + (s[i] * factor,)
        elif (SQUARE >> i) & 1:
            scaled = scaled + (s[i] * factor * factor,)
        else:
            scaled = scaled + (s[i],)
    stay = moves(ref.a, ref.a, ref.b, ref.b, 1.0, tl.float32)
    return rebase(Sums(*scaled), stay, rest, tl.float32, SUMS, OTHER)
