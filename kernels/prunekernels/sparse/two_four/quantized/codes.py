"""Codes of quantised values as operands of `mma.sp`, and what scales their sums.

A code's bits go into the mantissas of pairs of 16-bit floats by one logical instruction, and one
`fma` for each pair makes them numbers; both are exact. Tensors are (warps, row tiles, token tiles,
32 lanes, registers) in the accumulators' layout. Format: `two_four.quantized.layout`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from prunekernels.sparse.fragments import axis


@gluon.jit
def _fma(a, factor, addend, KIND: gl.constexpr):
    """a·factor + addend of pairs of 16-bit floats, each rounded once (and here exact)."""
    return gl.inline_asm_elementwise(
        "fma.rn." + KIND + "x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [a, factor, addend],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _placed(word, mask, offset):
    """word & mask | offset, as one instruction: the compiler takes two where both are constant."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;",
        "=r,r,r,r",
        [word, mask, offset],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def operand(w, minus, BITS: gl.constexpr, FP8: gl.constexpr, KIND: gl.constexpr,
             ACC: gl.constexpr):  # fmt: skip
    """The four registers of A in a lane (NW, MT, 1, 32, 4), of the words of one step.

    w: one word or two, int32 (NW, MT, 1, 32, 1); minus: addend of 4-bit codes, or anything.
    """
    register = axis(4, 4, ACC)
    odd = register % 2 == 1
    all_four: gl.constexpr = [1, 1, 1, 1, 4]
    if BITS == 4:
        mask = gl.full(all_four, 0x000F000F, gl.int32, ACC)
        if KIND == "bf16":
            offset = gl.full(all_four, 0x43004300, gl.int32, ACC)
            held = _placed(w[0] >> register * 4, mask, offset)
            factor = gl.full(all_four, 0x3F803F80, gl.int32, ACC)
        else:
            # an odd register's codes count in sixteen steps of the mantissa
            mask = gl.where(odd, 0x00F000F0, mask)
            offset = gl.full(all_four, 0x64006400, gl.int32, ACC)
            held = _placed(w[0] >> register // 2 * 8, mask, offset)
            factor = gl.where(odd, 0x2C002C00, 0x3C003C00)
        return _fma(held, factor, minus, KIND)
    word = gl.where(register < 2, w[0], w[1])
    if FP8:
        # exponent and mantissa to the lowest bits of the exponent: a power of two too small
        word = gl.where(odd, word << 8, word)
        if KIND == "bf16":
            held = (word >> 4) & 0x07F007F0 | word & -0x7FFF8000
            factor = gl.full(all_four, 0x7B807B80, gl.int32, ACC)
        else:
            held = (word >> 1) & 0x3F803F80 | word & -0x7FFF8000
            factor = gl.full(all_four, 0x5C005C00, gl.int32, ACC)
    else:
        # sign and magnitude as a subnormal number, which counts in steps without an offset
        turned = (word >> 8) & 0xFFFFFF | word << 24
        held = gl.where(odd, turned, word) & -0x7F807F81
        largest: gl.constexpr = 0x7F007F00 if KIND == "bf16" else 0x78007800
        factor = gl.full(all_four, largest, gl.int32, ACC)
    return _fma(held, factor, gl.zeros(all_four, gl.int32, ACC), KIND)


@gluon.jit
def minus_of(zero, KIND: gl.constexpr, ACC: gl.constexpr):
    """−(offset + zero) in pairs: what `operand` adds to offset + code. zero: 0 … 15, int32."""
    if KIND == "bf16":
        # −128 − zero, whose bits are the lowest of the mantissa
        return zero * 0x00010001 | -0x3CFF3D00
    # −1024 − zero; in odd registers −64 − zero, four bits higher
    even = zero * 0x00010001 | -0x1BFF1C00
    return gl.where(axis(4, 4, ACC) % 2 == 1, zero * 0x00100010 | -0x2BFF2C00, even)


@gluon.jit
def quarters(words, NW: gl.constexpr, MT: gl.constexpr, ACC: gl.constexpr):
    """The four words that each lane holds of (tiles, 128), for `operand`."""
    even, odd = gl.split(gl.reshape(words, [NW * MT, 32, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        gl.convert_layout(gl.reshape(w0, [NW, MT, 1, 32, 1]), ACC),
        gl.convert_layout(gl.reshape(w1, [NW, MT, 1, 32, 1]), ACC),
        gl.convert_layout(gl.reshape(w2, [NW, MT, 1, 32, 1]), ACC),
        gl.convert_layout(gl.reshape(w3, [NW, MT, 1, 32, 1]), ACC),
    )


@gluon.jit
def scales_of_rows(pair, ACC: gl.constexpr):
    """Scales of the accumulators' rows, of (NW, MT, 1, 32, 2): rows g and g + 8 of each lane."""
    low, high = gl.split(pair)
    shape: gl.constexpr = [pair.shape[0], pair.shape[1], 1, 32, 1]
    low = gl.convert_layout(gl.reshape(low, shape), ACC)
    high = gl.convert_layout(gl.reshape(high, shape), ACC)
    return gl.where(axis(4, 4, ACC) < 2, low, high)


@gluon.jit
def zeros_of_rows(pair, ACC: gl.constexpr):
    """Zero points of the operand's rows, of int16 (NW, MT, 1, 32, 1): g, and g + 8 above it."""
    pair = gl.convert_layout(pair, ACC).to(gl.int32)
    return (pair >> axis(4, 4, ACC) % 2 * 8) & 0xFF


@gluon.jit
def add_scaled(acc, part, pair, STEP: gl.constexpr, ACC: gl.constexpr):
    """acc + part·scale. STEP: what the operand's numbers have to be multiplied by beside it."""
    if STEP != 1:
        part = part * STEP
    return acc + part * scales_of_rows(pair, ACC)
