"""Codes of quantised values as operands of `mma.sp`, and what scales their sums.

A code's bits go into the mantissas of pairs of 16-bit floats by one logical instruction, and one
`fma` for each pair makes them numbers; both are exact. In float16 8-bit codes need no `fma`: as
subnormal numbers they already are what the tensor cores multiply, and e4m3 values are converted by
an instruction where there is one. Tensors are (warps, row tiles, token tiles, 32 lanes, registers)
in the accumulators' layout. Format: `two_four.quantized.layout`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from prunekernels.sparse.fragments import axis


@gluon.jit
def _of_three(text: gl.constexpr, first, second, third):
    """An instruction that makes $0 of three registers, $1 to $3, for each element."""
    return gl.inline_asm_elementwise(
        text,
        "=r,r,r,r",
        [first, second, third],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _fma(a, factor, addend, KIND: gl.constexpr):
    """a·factor + addend of pairs of 16-bit floats, each rounded once (and here exact)."""
    return _of_three("fma.rn." + KIND + "x2 $0, $1, $2, $3;", a, factor, addend)


@gluon.jit
def _placed(word, mask, offset):
    """word & mask | offset, as one instruction: the compiler takes two where both are constant."""
    return _of_three("lop3.b32 $0, $1, $2, $3, 0xEA;", word, mask, offset)


@gluon.jit
def _selected(mask, one, other):
    """The bits of `one` where the mask has ones, else those of `other`."""
    return _of_three("lop3.b32 $0, $1, $2, $3, 0xCA;", mask, one, other)


@gluon.jit
def permuted(low, high, selector):
    """Bytes of two words, chosen by the nibbles of the selector."""
    return _of_three("prmt.b32 $0, $1, $2, $3;", low, high, selector)


@gluon.jit
def halves(words, WEIGHT: gl.constexpr):
    """f16 registers of words of e4m3 values that stand twice each: low half, high half.

    Of a weight's word bytes 1 and 3 are the first register, bytes 0 and 2 the second.
    """
    select: gl.constexpr = "prmt.b32 w, $2, $2, 0x2031;" if WEIGHT else "mov.b32 w, $2;"
    return gl.inline_asm_elementwise(
        "{ .reg .b32 w; .reg .b16 low, high;" + select + "mov.b32 {low, high}, w;"
        "cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        "=r,=r,r,r",
        [words],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def operand(w, minus, BITS: gl.constexpr, FP8: gl.constexpr, CONVERTS: gl.constexpr,
            KIND: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """The four registers of A in a lane (NW, MT, 1, 32, 4), of the words of one step.

    w: one word or two, int32 (NW, MT, 1, 32, 1); minus: addend of 4-bit codes, or anything;
    CONVERTS: whether there is an instruction that makes e4m3 values f16. The numbers are
    `step_of` times smaller than the codes.
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
        if CONVERTS and KIND == "f16":
            return halves(word, True)
        # exponent and mantissa to the lowest bits of the exponent: a power of two too small. Signs
        # are masked for two registers at once: the other's fall where the magnitude is selected
        signs = word & -0x7F7F7F80
        signs = gl.where(odd, signs << 8, signs)
        if KIND == "f16":
            moved = gl.where(odd, word << 7, word >> 1)
            return _selected(gl.full(all_four, 0x3F803F80, gl.int32, ACC), moved, signs)
        moved = gl.where(odd, word << 4, word >> 4)
        held = _selected(gl.full(all_four, 0x07F007F0, gl.int32, ACC), moved, signs)
        factor = gl.full(all_four, 0x7B807B80, gl.int32, ACC)
    else:
        # sign and magnitude as a subnormal number, which counts in steps without an offset
        turned = (word >> 8) & 0xFFFFFF | word << 24
        held = gl.where(odd, turned, word) & -0x7F807F81
        if KIND == "f16":
            return held
        # the largest power of two
        factor = gl.full(all_four, 0x7F007F00, gl.int32, ACC)
    return _fma(held, factor, gl.zeros(all_four, gl.int32, ACC), KIND)


@gluon.constexpr_function
def step_of(bits, fp8, converts, kind):
    """What `operand`'s numbers have to be multiplied by to be the codes: a power of two."""
    if bits == 4:
        return 1.0
    if fp8:
        return 1.0 if kind == "bf16" or converts else 2.0**8
    return 2.0**6 if kind == "bf16" else 2.0**24


@gluon.jit
def minus_of(zero, KIND: gl.constexpr, ACC: gl.constexpr):
    """−(offset + zero) in pairs: what `operand` adds to offset + code.

    zero: zero points 0 … 15 of the operand's rows, int16 (NW, MT, 1, 32, 1): g, and g + 8 above it.
    """
    zero = gl.convert_layout(zero, ACC).to(gl.int32)
    odd = axis(4, 4, ACC) % 2 == 1
    # −128 − zero, whose bits are the lowest of the mantissa; −1024 − zero
    upper = gl.full([1, 1, 1, 1, 4], -0x3CFF3D00 if KIND == "bf16" else -0x1BFF1C00, gl.int32, ACC)
    if KIND == "f16":
        # in odd registers −64 − zero, four bits higher
        zero = gl.where(odd, zero << 4, zero)
        upper = gl.where(odd, -0x2BFF2C00, upper)
    return permuted(zero, upper, gl.where(odd, 0x7171, 0x7070))


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
def add_scaled(acc, part, pair, ACC: gl.constexpr):
    """acc + part·scale."""
    return acc + part * scales_of_rows(pair, ACC)
