"""Where each lane of a warp finds its values in a tile of the bitmap: tensor cores count for it.

A lane's value lies behind the values of the runs before, of its run in the quads before (four lanes
each), of its run in its quad's lanes before, and its own before. A sum over other lanes' numbers is
a product with a constant matrix of zeros and ones, so tensor cores form it, for both blocks of a
tile at once where they can:

1. `mma.m16n8k128.and.popc`, one for each block: the lanes' words, as they are, and a mask for each
   row. Rows 0-7 count the values that each quad has in run g, rows 8-15 those in the runs before.
2. `mma.m16n8k32.u8`, one for each block: the counts of a quad are two bytes of the right operand,
   and the left one says which quads lie before each.
3. `mma.m16n8k32.u8`, one for each step of 16 columns: the sums, which lie in one lane of each quad
   as bytes, to its four lanes; the shared addresses of the blocks are added on the way.
4. `mma.m16n8k256.and.popc`, two for each step: the bits of the quad's lanes before and the lane's
   own, before the second and before the fourth element of a run. Each word comes twice, because a
   value is two bytes.

That is 16 products for the 64 weights that a lane has in a tile. A number that is not below 256 is
split in two bytes on the way: 2 and 255 + 255 + 2 = 512 are their weights.
Format: `bitmap.layout`. Source: PTX ISA, "Matrix fragments for mma.m16n8k32", "... mma.m16n8k128",
"... mma.m16n8k256".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_COUNT128 = "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc"
_COUNT256 = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
_SUM = "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32"


@gluon.constexpr_function
def _product(instruction, d, a, b, c):
    """d = a·b + c, each given by its registers."""
    d, a, b, c = ("{" + ", ".join(x) + "}" for x in (d, a, b, c))
    return f"{instruction} {d}, {a}, {b}, {c};"


@gluon.constexpr_function
def _registers(name):
    return [f"{name}{i}" for i in range(4)]


@gluon.constexpr_function
def _offsets_text():
    """$0 … $3 from words $4, $5 and masks: $6, $7 of the runs, $8, $9 of the quads before.

    $10, $11 are any registers: rows 8-15 of the sums are not used.
    """
    zero = ["z"] * 4
    lines = ["{", ".reg .b32 z, m0, m1;"]
    lines += [f".reg .b32 {', '.join(_registers(name))};" for name in "crop"]
    lines.append("mov.b32 z, 0;")
    for word, counts, sums in (("$4", "c", "o"), ("$5", "r", "p")):
        lines += [
            _product(_COUNT128, _registers(counts), ["$6", "$7"], [word], zero),
            f"prmt.b32 m0, {counts}0, {counts}2, 0x1140;",
            f"prmt.b32 m1, {counts}1, {counts}3, 0x1140;",
            _product(_SUM, _registers(sums), ["$8", "$10", "$9", "$11"], ["m0", "m1"], zero),
        ]
    # bytes low, high, high, high: see the weights in `run_masks`
    spread = enumerate(("o0", "p0", "o1", "p1"))
    return "\n".join([*lines, *(f"prmt.b32 ${i}, {n}, z, 0x1110;" for i, n in spread), "}"])


@gluon.constexpr_function
def _addresses_text(step):
    """$0 … $7 from offsets $8 … $11, run masks $12, $13, bases $14 … $17 and words $18 … $21.

    $22, $23 are the lane masks of step 0.
    """
    words, d = ["$18", "$19", "$20", "$21"], _registers("d")
    return "\n".join([
        "{", f".reg .b32 {', '.join(d)}, second, fourth;",
        f"shl.b32 second, $22, {8 * step};",
        f"shl.b32 fourth, $23, {8 * step};",
        _product(_SUM, d, ["$8", "$9", "$10", "$11"], ["$12", "$13"], ["$14", "$15", "$16", "$17"]),
        _product(_COUNT256, [f"${i}" for i in range(4)], words, ["second"] * 2, d),
        _product(_COUNT256, [f"${i}" for i in range(4, 8)], words, ["fourth"] * 2, d),
        "}",
    ])  # fmt: skip


@gluon.constexpr_function
def _bases_text(hidden):
    lines = ["{", ".reg .b32 n;", "popc.b32 n, $4;", "redux.sync.add.s32 n, n, -1;"]
    lines.append("mad.lo.u32 $2, n, 2, $5;")
    # the assembler would copy again for each product what it knows to be equal
    lines += ["add.u32 $3, $2, $6;", "mov.b32 $0, $5;", "add.u32 $1, $5, $6;"] if hidden else [
        "mov.b32 $3, $2;", "mov.b32 $0, $5;", "mov.b32 $1, $5;",
    ]  # fmt: skip
    return "\n".join([*lines, "}"])


@gluon.jit
def kept(x):
    """x, held in a register: what the assembler can compute it would compute in every stage."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def quad_masks(lane):
    """The constant operands of `offsets`: bits of run g and of those before, and quads before g.

    Columns of the second are the quads 2·t and 2·t + 1 in lane t, two bytes each: how many values
    the quad has in the run, and in the runs before, which count whatever the quad.
    """
    g = lane >> 2
    t = lane & 3
    even = kept((2 * t < g).to(gl.int32) | 256)
    odd = kept((2 * t + 1 < g).to(gl.int32) | 256)
    return kept(15 << 4 * g), kept((1 << 4 * g) - 1), even, odd


@gluon.jit
def run_masks(lane, STEP: gl.constexpr):
    """A constant operand of `addresses`: columns are lanes of the quad, two for each, the step's
    two runs. Lane STEP brings how many values come before them, as bytes."""
    holds = gl.where((lane & 3) == STEP, 0x02FFFF02, 0)
    first = (lane >> 2) % 2 == 0
    return kept(gl.where(first, holds, 0)), kept(gl.where(first, 0, holds))


@gluon.jit
def lane_masks(lane):
    """The other one, of step 0: all bits of lanes before, and those before the second or the
    fourth element of the lane's own run."""
    g = lane >> 2
    t = lane & 3
    lanes = gl.where(t < g >> 1, 15, 0)
    own = t == g >> 1
    shift = 4 * (g % 2)
    return kept(gl.where(own, 1, lanes) << shift), kept(gl.where(own, 7, lanes) << shift)


@gluon.jit
def bases(word, values, zero, HIDDEN: gl.constexpr):
    """Where the values of both blocks start, each twice: a sum's operand.

    word: of block 0; values: where its values start; zero: a zero that the assembler does not know
    of; HIDDEN: use it, which saves instructions and takes two registers.
    """
    return gl.inline_asm_elementwise(
        _bases_text(HIDDEN),
        "=&r,=&r,=&r,=&r,r,r,r",
        [word, values, zero],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def offsets(word0, word1, masks, lanes):
    """How many values of a block come before each quad's in each run, as operand of `addresses`.

    word0, word1: (warps, 32), a lane's bits in both blocks; masks: what `quad_masks` gives; lanes:
    what `lane_masks` gives, registers that hold anything. Returns four (warps, 32): bytes low,
    high, high, high of the numbers of run 2·t in both blocks, and of run 2·t + 1.
    """
    run, before, even, odd = masks
    second, fourth = lanes
    return gl.inline_asm_elementwise(
        _offsets_text(),
        "=&r,=&r,=&r,=&r" + ",r" * 8,
        [word0, word1, run, before, even, odd, second, fourth],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def addresses(numbers, words, starts, runs, lanes, STEP: gl.constexpr):
    """Shared addresses of the values of a step, for each operand register.

    numbers: what `offsets` gives; words: four (warps, 32), those of block 0 and 1, and again;
    starts: what `bases` gives. Returns eight (warps, 32): the address of a value for the second
    element of the step's first run in block 0, of its second run in block 0, and so in block 1;
    then the same for the fourth element.
    """
    n0, n1, n2, n3 = numbers
    w0, w1, w2, w3 = words
    b0, b1, b2, b3 = starts
    even, odd = runs
    second, fourth = lanes
    return gl.inline_asm_elementwise(
        _addresses_text(STEP),
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r" + ",r" * 16,
        [n0, n1, n2, n3, even, odd, b0, b1, b2, b3, w0, w1, w2, w3, second, fourth],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
