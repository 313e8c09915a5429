"""Elementwise functions that Triton lacks or rounds otherwise in its interpreter."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton decides the same way, when a kernel's module is imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


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
def both_halves(x):
    """A float32 that is a bfloat16, in both halves of an int32 word."""
    word = x.to(tl.int32, bitcast=True)
    return (word & -65536) | ((word >> 16) & 65535)


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
def smaller_halves(x, y):
    """`larger_halves` for minima."""
    if INTERPRETED:
        signs = -2147450880  # 0x80008000
        return signs ^ larger_halves(signs ^ x, signs ^ y)
    else:
        return tl.inline_asm_elementwise(
            "min.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def at_most(x, bound):
    """The smaller of x and a bound, which is the bound where x is NaN."""
    return tl.where(x < bound, x, bound)


@triton.jit
def log2(x, NVIDIA: tl.constexpr):
    """log₂ of float32 as one instruction (`tl.log2` adds a correction for subnormal numbers)."""
    if INTERPRETED or not NVIDIA:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


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
