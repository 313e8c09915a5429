"""The sums over a vocabulary that all fields of a pair of rows come of: named tuples in Triton.

A constant SUMS has bit i set where sum i is wanted; the others stay 0, and the compiler drops them
with all that only they need. W0, W1, V0 and V1 are always wanted. w, v, x, … are those of `triton`.
"""

# ruff: noqa: RUF005, SIM108  (Triton compiles neither starred tuples nor every ternary)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, call-arg"

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sums(NamedTuple):
    """The sums over a vocabulary (or a lane's part of it) that all fields come of."""

    W0: Any  # Σw
    W1: Any  # Σw·x
    W2: Any  # Σw·x²
    Wy: Any  # Σw·y
    V0: Any  # Σv
    V1: Any  # Σv·x
    Vy: Any  # Σv·z
    R0: Any  # Σw²
    S0: Any  # Σv²
    C0: Any  # Σw·v
    Q1: Any  # Σw²·x, or Σv²·x if estimates are weighted by other
    Q2: Any  # Σw²·x², or Σv²·x²
    Pw: Any  # Σw·ρ
    P2: Any  # Σρ²
    U1: Any  # Σx
    U2: Any  # Σx²
    L1: Any  # Σ|d|
    Z2: Any  # Σa²
    Zd: Any  # Σa·d
    D2: Any  # Σd²
    ZZ: Any  # Σa·b
    B2: Any  # Σb²
    n: Any  # how many
    A: Any  # Σρ, precise alone
    Fp: Any  # Σw·φ(t), precise alone
    Fq: Any  # Σv·φ(−t), precise alone
    V2: Any  # Σv·x², if estimates are weighted by other


BUNDLE: tuple[str, ...] = Sums._fields
#: Names of `closed_form` that share a place.
_SHARED = {"R1": "Q1", "S1": "Q1", "R2": "Q2", "S2": "Q2"}


def _bits(*names: str) -> Any:
    return tl.constexpr(sum(1 << BUNDLE.index(name) for name in names))


COUNT = tl.constexpr(len(BUNDLE))
#: Places of the sums that `complete` writes.
S0 = tl.constexpr(BUNDLE.index("S0"))
C0 = tl.constexpr(BUNDLE.index("C0"))
ZZ = tl.constexpr(BUNDLE.index("ZZ"))
B2 = tl.constexpr(BUNDLE.index("B2"))
_N = tl.constexpr(BUNDLE.index("n"))
#: Sums that are of first and of second order in x.
LINEAR = _bits("W1", "V1", "Q1", "U1")
SQUARE = _bits("W2", "V2", "Q2", "U2")
#: Sums that `accumulate` leaves alone where nothing is masked (and S0, unless estimates need it).
_LEFT = _bits("C0", "ZZ", "B2", "n")


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
def filled(value):
    """A bundle that holds one value everywhere."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (value,)
    return Sums(*out)


@triton.jit
def zeros(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """An empty bundle."""
    return filled(tl.zeros(SHAPE, DTYPE))


@triton.jit
def choose(old, new, SUMS: tl.constexpr):
    """The sums of `new` that are wanted, and the rest of `old`."""
    out = ()
    for i in tl.static_range(COUNT):
        if (SUMS >> i) & 1:
            out = out + (new[i],)
        else:
            out = out + (old[i],)
    return Sums(*out)


@triton.jit
def replaced(s, PLACE: tl.constexpr, value):
    """A bundle with another value in one place."""
    out = ()
    for i in tl.static_range(COUNT):
        if i == PLACE:
            out = out + (value,)
        else:
            out = out + (s[i],)
    return Sums(*out)


@triton.jit
def add_columns(s, terms, SUMS: tl.constexpr):
    """Add to each wanted sum of rows what a block of terms (rows, columns) makes."""
    out = ()
    for i in tl.static_range(COUNT):
        if (SUMS >> i) & 1:
            out = out + (s[i] + tl.sum(terms[i], 1),)
        else:
            out = out + (s[i],)
    return Sums(*out)


@triton.jit
def add_tile(s, tile, SUMS: tl.constexpr, OTHER: tl.constexpr):
    """Add the sums that `accumulate` takes of an unmasked tile to the rest."""
    out = ()
    for i in tl.static_range(COUNT):
        if ((_LEFT >> i) & 1) or (i == S0 and not OTHER):
            out = out + (s[i],)
        else:
            out = out + (s[i] + tile[i],)
    return choose(s, Sums(*out), SUMS)


@triton.jit
def totals(s):
    """The sums of all lanes."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.sum(s[i], 0),)
    return Sums(*out)


@triton.jit
def count(s, elements, SUMS: tl.constexpr):
    """Add to n, the elements that each lane has seen."""
    return choose(s, replaced(s, _N, s.n + elements), SUMS)
