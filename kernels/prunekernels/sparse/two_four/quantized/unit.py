"""A unit of 256 columns of quantised 2:4 weights: where it is, loading it, multiplying it.

Part of `quantized.mma`, whose kernel walks over the units. Format: `two_four.quantized.layout`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"
# Triton compiles tuple + tuple, not (*tuple, item): RUF005 is waived where that matters.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from prunekernels.sparse.fragments import multiply_dense
from prunekernels.sparse.two_four.mma import multiply_fragments
from prunekernels.sparse.two_four.quantized.codes import add_scaled, minus_of, operand, quarters


@gluon.jit
def at_unit(unit, w_ptrs, s_ptrs, z_ptrs, UNIT: gl.constexpr, PER_UNIT: gl.constexpr):
    """Pointers to a unit's words, scales and zeros, of those to the first unit's."""
    unit = gl.to_tensor(unit).to(gl.int64)
    return w_ptrs + unit * UNIT, s_ptrs + unit * (PER_UNIT * 16), z_ptrs + unit * (PER_UNIT * 8)


@gluon.jit
def load_scales(at, PER_UNIT: gl.constexpr):
    """Scales of a unit's groups. at: what `at_unit` gave."""
    scales = ()
    for group in gl.static_range(PER_UNIT):
        scales = scales + (gl.load(at[1] + group * 16),)  # noqa: RUF005
    return scales


@gluon.jit
def load_unit(at, P: gl.constexpr, PER_UNIT: gl.constexpr, HAS_ZEROS: gl.constexpr,
              DENSE: gl.constexpr):  # fmt: skip
    """A unit's blocks of words (tiles, 128), metadata (none if DENSE) and zeros.

    at: what `at_unit` gave.
    """
    w_ptrs, _, z_ptrs = at
    a, meta, zeros = (), (), ()
    for block in gl.static_range(2 * P):
        a = a + (gl.load(w_ptrs + block * 128),)  # noqa: RUF005
    if HAS_ZEROS:
        for group in gl.static_range(PER_UNIT):
            zeros = zeros + (gl.load(z_ptrs + group * 8),)  # noqa: RUF005
    if not DENSE:
        meta = gl.load(w_ptrs + 256 * P)
    return a, meta, zeros


@gluon.jit
def multiply_unit(
    acc, held, scales, minus, xs, at, BITS: gl.constexpr, FP8: gl.constexpr, CONVERTS: gl.constexpr,
    HAS_ZEROS: gl.constexpr, GROUP: gl.constexpr, DENSE: gl.constexpr, KIND: gl.constexpr,
    ACC: gl.constexpr, X: gl.constexpr,
):  # fmt: skip
    """Multiply one unit of eight steps held in registers, and load the next but one.

    held, scales: what `load_unit` and `load_scales` gave; minus: a row's `minus_of`, where its
    groups have none; xs: (tokens, 128, or 64 if DENSE) words of x in shared memory; at: `at_unit`
    of the unit after the next, whose scales the caller loads.
    """
    w_ptrs, _, z_ptrs = at
    NW: gl.constexpr = acc.shape[0]
    MT: gl.constexpr = acc.shape[1]
    P: gl.constexpr = BITS // 4
    STEP_K: gl.constexpr = 16 if DENSE else 32
    a, meta, zeros = held
    if not DENSE:
        even, odd = gl.split(gl.reshape(meta, [NW * MT, 32, 2, 2]))
        e0, e2 = gl.split(even)
        e1, e3 = gl.split(odd)
        e = (e0, e1, e2, e3)
    words = ()
    for block in gl.static_range(2 * P):
        words = words + quarters(a[block], NW, MT, ACC)
    next_a, next_zeros = (), ()
    part = acc
    for step in gl.static_range(8):
        if GROUP and step * STEP_K % GROUP == 0:
            part = gl.zeros_like(acc)
            if HAS_ZEROS:
                minus = minus_of(zeros[step * STEP_K // GROUP], KIND, ACC)
        if not DENSE or step % 2 == 0:
            b = xs.slice(step * STEP_K // 2, 16, dim=1).load(X)
        two = (words[step * P], words[step * P + P - 1])
        values = operand(two, minus, BITS, FP8, CONVERTS, KIND, ACC)
        if DENSE:
            part = multiply_dense(part, values, b, step % 2, KIND, ACC)
        else:
            part = multiply_fragments(part, values, b, e[step // 2], step % 2, KIND, ACC)
        if (step + 1) * P % 4 == 0:
            # a block is used up: its registers take the one that comes
            next_at = w_ptrs + step * P // 4 * 128
            next_a = next_a + (gl.load(next_at),)  # noqa: RUF005
        if GROUP and (step + 1) * STEP_K % GROUP == 0:
            acc = add_scaled(acc, part, scales[step * STEP_K // GROUP], ACC)
            if HAS_ZEROS:
                z_at = z_ptrs + step * STEP_K // GROUP * 8
                next_zeros = next_zeros + (gl.load(z_at),)  # noqa: RUF005
    if not DENSE:
        meta = gl.load(w_ptrs + 256 * P)
    if not GROUP:
        acc = part
    return acc, (next_a, meta, next_zeros)
