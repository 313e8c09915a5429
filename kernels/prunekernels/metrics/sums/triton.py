"""Triton helpers shared by the metric kernels: the sums of a pair of logit rows, and their moves.

Exponents are in base 2: w = 2^y, v = 2^z with y = k·a−A, z = k·b−B, k = log2(e)/T. The core level
takes each by one fused multiply-add, so that a rounded reference A shifts a row but never bends
it. The precise level's references are logits, α and β: y = k·(a−α), z = k·(b−β). z−y would have
the roundings of both, which are large against a small x: so x = (b−a)−K in logits, K near β−α
(`gap`), and `to_states` makes the finished sums those of a state: x = z−y, or (b−β−a+α)/T if
precise. ρ = v−w, d = b−a. A bundle of sums is a tuple:
    W0 W1 W2 Wy V0 V1 Vy R0 S0 C0 Q1 Q2 Pw P2 U1 U2 L1 Z2 Zd D2 ZZ B2 n A Φp Φq V2
named as in `closed_form`; Q1, Q2 = Σ{x, x²}·w², or ·v² if the estimates are weighted by the other
row, which alone has V2 = Σv·x²; the precise level alone has A = Σρ, Φp = Σw·φ(t), Φq = Σv·φ(−t),
with φ(t) = eᵗ−1−t (METRICS, "One pass"), and t = ((b−β)−(a−α))/T, whose roundings ρ shares.
A constant SUMS has bit i set where sum i is wanted; the others stay 0, and the compiler drops them
with all that only they need. W0, W1, V0 and V1 are always wanted.
Where nothing is masked, four sums are left to `complete`, which takes them from the others, and
`thin` says where that would cancel.
"""

# ruff: noqa: RUF005, SIM108  (Triton compiles neither starred tuples nor every ternary)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"

from __future__ import annotations

import os
from collections.abc import Iterable

import triton
import triton.language as tl

#: Triton decides the same way, when a kernel's module is imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
#: How far max b may lie above its reference, in base-2 units: 20 nats.
FAR = tl.constexpr(28.853900817779268)
#: Floor of exponents: 2^−10000 is 0 and 0·−10000 is not NaN.
LOWEST = tl.constexpr(-1.0e30)

BUNDLE: tuple[str, ...] = (
    "W0",
    "W1",
    "W2",
    "Wy",
    "V0",
    "V1",
    "Vy",
    "R0",
    "S0",
    "C0",
    "Q1",
    "Q2",
    "Pw",
    "P2",
)
BUNDLE += ("U1", "U2", "L1", "Z2", "Zd", "D2", "ZZ", "B2", "n", "A", "Fp", "Fq", "V2")
#: Names of `closed_form` that share a place.
_SHARED = {"R1": "Q1", "S1": "Q1", "R2": "Q2", "S2": "Q2"}


def wanted(sums: Iterable[str]) -> int:
    """The constant SUMS for names of `closed_form`."""
    names = {_SHARED.get(name, name) for name in (*sums, "W0", "W1", "V0", "V1")}
    return sum(1 << i for i, name in enumerate(BUNDLE) if name in names)


def bundle(sums: int) -> tuple[str, ...]:
    """Names of the sums that a constant SUMS wants, in order."""
    return tuple(name for i, name in enumerate(BUNDLE) if sums >> i & 1)


@triton.jit
def add(left, right):
    """Elementwise sum of two tuples."""
    out = ()
    for i in tl.static_range(len(left)):
        out = out + (left[i] + right[i],)
    return out


@triton.jit
def zeros(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """An empty bundle."""
    out = ()
    for _ in tl.static_range(27):
        out = out + (tl.zeros(SHAPE, DTYPE),)
    return out


@triton.jit
def choose(old, new, SUMS: tl.constexpr):
    """The sums of `new` that are wanted, and the rest of `old`."""
    out = ()
    for i in tl.static_range(len(old)):
        if (SUMS >> i) & 1:
            out = out + (new[i],)
        else:
            out = out + (old[i],)
    return out


@triton.jit
def add_columns(s, terms, SUMS: tl.constexpr):
    """Add to each wanted sum of rows what a block of terms (rows, columns) makes."""
    out = ()
    for i in tl.static_range(len(s)):
        if (SUMS >> i) & 1:
            out = out + (s[i] + tl.sum(terms[i], 1),)
        else:
            out = out + (s[i],)
    return out


@triton.jit
def fma(a, b, c):
    """a·b+c rounded once; the interpreter's own `tl.fma` rounds twice."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def halves(words):
    """The two bfloat16 in each int32, lower half first, as float32."""
    low = (words << 16).to(tl.float32, bitcast=True)
    return low, (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def larger_halves(x, y):
    """Per half of int32 words the larger bfloat16, a number rather than a NaN (NVIDIA's only)."""
    if INTERPRETED:
        low_x, high_x = halves(x)
        low_y, high_y = halves(y)
        low = tl.where((low_y > low_x) | (low_x != low_x), low_y, low_x).to(tl.int32, bitcast=True)
        high = tl.where((high_y > high_x) | (high_x != high_x), high_y, high_x)
        return (high.to(tl.int32, bitcast=True) & -65536) | ((low >> 16) & 65535)
    else:
        return tl.inline_asm_elementwise(
            "max.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def gap(size, ref_a, ref_b, unit, HALF: tl.constexpr):
    """The parts of K that x = ((b−Kb)−(a−Ka))−K0 subtracts, two of them 0.

    b−a is exact for logits of 16 bits (unless one is some thousand times the other), and for
    float32 logits that differ by less than a factor of 2. Where K is so large that those near the
    references do not, it comes off the larger of the two first, which is then exact.

    size: K, near β−α; not finite where a row holds nothing but −inf yet, and then 0 will do.
    unit: of the references, in logits.
    """
    size = tl.where(tl.abs(size) < float("inf"), size, 0.0)
    none = tl.zeros_like(size)
    if HALF:
        return (none, none, size)
    else:
        apart = tl.abs(size) * unit > 0.49 * tl.maximum(tl.abs(ref_a), tl.abs(ref_b))
        on_b = tl.abs(ref_b) > tl.abs(ref_a)
        return (
            tl.where(apart & ~on_b, -size, none),
            tl.where(apart & on_b, size, none),
            tl.where(apart, none, size),
        )


@triton.jit
def whole_gap(parts):
    """K from its parts."""
    return parts[1] - parts[0] + parts[2]


@triton.jit
def exponents(a, b, ref_a, ref_b, parts, k, inverse_t, PRECISE: tl.constexpr, FLOOR: tl.constexpr):
    """y, z, x and t of logits a and b; with FLOOR, y and z of −inf or nearly so are finite.

    parts: of K, from `gap`. t: of the precise level alone.
    """
    x = ((b - parts[1]) - (a - parts[0])) - parts[2]
    if PRECISE:
        low_a = a - ref_a
        low_b = b - ref_b
        y = low_a * k
        z = low_b * k
        t = (low_b - low_a) * inverse_t
    else:
        y = fma(a, k, -ref_a)
        z = fma(b, k, -ref_b)
        t = x
    if FLOOR:
        y = tl.maximum(y, LOWEST)
        z = tl.maximum(z, LOWEST)
    return y, z, x, t


@triton.jit
def accumulate(
    s,
    a,
    b,
    y,
    z,
    x,
    t,
    whole_a,
    whole_b,
    keep,
    SUMS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISE: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Add the terms of one block of logits to a bundle of the same shape.

    a, b: logits. y, z, x, t: from `exponents`. With MASKED, whole_a and whole_b say where each is a
    finite number and keep where at least one is; elsewhere a, b are 0 and y, z at their floor.
    """
    w = tl.exp2(y)
    v = tl.exp2(z)
    d = b - a
    s0, c0, zz, b2 = s[8], s[9], s[20], s[21]
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
        q1 = s[10] + vx * v
        q2 = s[11] + vx * vx
    else:
        q1 = s[10] + wx * w
        q2 = s[11] + wx * wx
    n = s[22]
    if MASKED:
        n = n + tl.where(keep, 1.0, 0.0)
    out = (
        s[0] + w,
        s[1] + wx,
        s[2] + wx * x,
        s[3] + w * y,
        s[4] + v,
        s[5] + vx,
        s[6] + v * z,
        s[7] + w * w,
        s0,
        c0,
        q1,
        q2,
        s[12] + w * rho,
        s[13] + rho * rho,
        s[14] + x,
        s[15] + x * x,
        s[16] + tl.abs(d),
        s[17] + a * a,
        s[18] + a * d,
        s[19] + d * d,
        zz,
        b2,
        n,
        s[23] + rho,
        s[24] + phi_p,
        s[25] + phi_q,
        s[26] + vx * x,
    )
    return choose(s, out, SUMS)


@triton.jit
def complete(s, SUMS: tl.constexpr, OTHER: tl.constexpr):
    """The sums that unmasked blocks leave out: Σv², Σwv, Σab and Σb² from those with ρ and d."""
    s0 = s[8]
    if not OTHER:
        s0 = s[7] + 2.0 * s[12] + s[13]
    out = ()
    for i in tl.static_range(len(s)):
        if i == 8:
            out = out + (s0,)
        elif i == 9:
            out = out + (s[7] + s[12],)
        elif i == 20:
            out = out + (s[17] + s[18],)
        elif i == 21:
            out = out + (s[17] + 2.0 * s[18] + s[19],)
        else:
            out = out + (s[i],)
    return choose(s, out, SUMS)


@triton.jit
def thin(s):
    """Whether Σv² is small against Σw², or Σb² against Σa²: then `complete` loses digits."""
    return (tl.sum(s[8] - 0.125 * s[7], 0) < 0.0) | (tl.sum(s[21] - 0.25 * s[17], 0) < 0.0)


@triton.jit
def moves(old_a, new_a, old_b, new_b, unit, DTYPE: tl.constexpr):
    """What moving the references from old to new does (−inf: nothing summed yet).

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
    # ra·expm1(−t), ra·φ(−t) and rb·φ(t), each from what neither cancels nor overflows.
    if tl.float64 == DTYPE:
        small = tl.abs(t) < 1e-3
    else:
        small = tl.abs(t) < 0.25
    even = t2 * (0.5 + t2 * (1.0 / 24.0 + t2 * (1.0 / 720.0)))
    odd = t2 * t * (1.0 / 6.0 + t2 * (1.0 / 120.0 + t2 * (1.0 / 5040.0)))
    e = tl.where(small, ra * (even - odd - t), rb - ra)
    phi_p = tl.where(small, ra * (even - odd), rb - ra + ra * t)
    phi_q = tl.where(small, rb * (even + odd), ra - rb - rb * t)
    return (da, db, db - da, ra, rb, e, phi_p, phi_q, t)


@triton.jit
def rebase(s, m, x, DTYPE: tl.constexpr, SUMS: tl.constexpr, OTHER: tl.constexpr):
    """A bundle relative to new references; `m` from `moves`, broadcastable to the sums.

    x: by how much the reference of x grows, in the units of x.
    """
    da = m[0].to(DTYPE)
    db = m[1].to(DTYPE)
    x = x.to(DTYPE)
    ra = m[3].to(DTYPE)
    rb = m[4].to(DTYPE)
    e = m[5].to(DTYPE)
    if OTHER:
        q0 = s[8]
        rq = rb * rb
    else:
        q0 = s[7]
        rq = ra * ra
    out = (
        ra * s[0],
        ra * (s[1] - x * s[0]),
        ra * (s[2] - x * (2.0 * s[1] - x * s[0])),
        ra * (s[3] - da * s[0]),
        rb * s[4],
        rb * (s[5] - x * s[4]),
        rb * (s[6] - db * s[4]),
        ra * ra * s[7],
        rb * rb * s[8],
        ra * rb * s[9],
        rq * (s[10] - x * q0),
        rq * (s[11] - x * (2.0 * s[10] - x * q0)),
        ra * (e * s[7] + rb * s[12]),
        e * (e * s[7] + 2.0 * rb * s[12]) + rb * rb * s[13],
        s[14] - x * s[22],
        s[15] - x * (2.0 * s[14] - x * s[22]),
        s[16],
        s[17],
        s[18],
        s[19],
        s[20],
        s[21],
        s[22],
        e * s[0] + rb * s[23],
        ra * s[24] + m[6].to(DTYPE) * s[0] + e * s[23],
        rb * s[25] + m[7].to(DTYPE) * s[0] - rb * m[8].to(DTYPE) * s[23],
        rb * (s[26] - x * (2.0 * s[5] - x * s[4])),
    )
    return choose(s, out, SUMS)


@triton.jit
def move(
    s,
    old,  # references of a and b, and the parts of K
    new,  # references of a and b, and K
    unit,  # of the references, in logits
    step,  # of the references, in exponents
    DTYPE: tl.constexpr,
    SUMS: tl.constexpr,
    OTHER: tl.constexpr,
    HALF: tl.constexpr,
):
    """A float32 bundle relative to new references, and the parts of K: see `moves` and `gap`."""
    m = moves(old[0], new[0], old[1], new[1], step, DTYPE)
    parts = gap(new[2], new[0], new[1], unit, HALF)
    x = whole_gap(parts).to(DTYPE) - whole_gap(old[2]).to(DTYPE)
    return rebase(s, m, x, tl.float32, SUMS, OTHER), parts


@triton.jit
def to_states(
    s,
    ref_a,
    ref_b,
    parts,
    k,
    inverse_t,
    SUMS: tl.constexpr,
    PRECISE: tl.constexpr,
    OTHER: tl.constexpr,
):
    """A bundle of x = d−K in logits, with the x of a state: relative to the references."""
    if PRECISE:
        scale = inverse_t
        rest = (ref_b.to(tl.float64) - ref_a.to(tl.float64)) * tl.cast(inverse_t, tl.float64)
    else:
        scale = k
        rest = ref_b.to(tl.float64) - ref_a.to(tl.float64)
    rest = rest - whole_gap(parts).to(tl.float64) * tl.cast(scale, tl.float64)
    rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
    scaled = ()
    for i in tl.static_range(len(s)):
        if i == 1 or i == 5 or i == 10 or i == 14:
            scaled = scaled + (s[i] * scale,)
        elif i == 2 or i == 11 or i == 15 or i == 26:
            scaled = scaled + (s[i] * scale * scale,)
        else:
            scaled = scaled + (s[i],)
    stay = moves(ref_a, ref_a, ref_b, ref_b, 1.0, tl.float32)
    return rebase(scaled, stay, rest, tl.float32, SUMS, OTHER)


@triton.jit
def tanh(x):
    """tanh of float32, from its series near 0 and from e^{−2|x|} elsewhere."""
    x2 = x * x
    series = 0.33333333 - x2 * (0.13333333 - x2 * (0.053968254 - x2 * 0.021869489))
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.25, x - x * x2 * series, tl.where(x < 0.0, -far, far))


@triton.jit
def log1p(x):
    """ln(1+x) of float64 without losing a small x (Kahan's quotient)."""
    u = 1.0 + x
    step = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.log(u) * (x / step))


@triton.jit
def angles(z2, zd, d2, zz, b2):
    """cosine, 1−cosine, alpha, ‖d⊥‖/‖a‖ as `closed_form.angle_fields` defines them, in float64."""
    same = d2 == 0.0
    cosine = zz / tl.sqrt(z2 * b2)
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    cosine = tl.where((z2 == 0.0) | (b2 == 0.0), 0.0, cosine)
    cosine = tl.where(same, 1.0, cosine)
    alpha = tl.where(same, 0.0, zd / z2)
    across2 = d2 - alpha * zd
    across2 = tl.where(across2 < 0.0, 0.0, across2)
    one_minus = tl.where(d2 < b2, across2 / (b2 * (1.0 + cosine)), 1.0 - cosine)
    orthogonal = tl.where(same, 0.0, tl.sqrt(across2 / z2))
    return cosine, one_minus, alpha, orthogonal


@triton.jit
def count(s, elements, SUMS: tl.constexpr):
    """Add to n, the elements that each lane has seen."""
    out = ()
    for i in tl.static_range(len(s)):
        if i == 22:
            out = out + (s[i] + elements,)
        else:
            out = out + (s[i],)
    return choose(s, out, SUMS)
