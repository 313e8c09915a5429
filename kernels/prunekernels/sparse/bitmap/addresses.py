"""Where each lane of a warp finds its values of a packed bitmap: counted by tensor cores.

A lane holds the words of two tiles side by side. For each operand register, two elements of a run,
it needs the shared address that its value for the second of them would have; the value for the
first lies before it. That address is the tile's, and for each value before 2 bytes more:

    values of the runs before + values of the run in quads before      `offsets`
    + values of the run in lanes of the quad before, and of the lane    `addresses`

Both are sums of counts that different lanes hold, so both are products with constant matrices of
zeros and weights, and what one product gives a lane is what the next wants from it. Lane 4·g + t
brings its words as columns t of row g (left operand) or as rows t of column g (right operand).

*Counting bits*, up to Hopper: `mma.m16n8k256.and.popc` counts the bits that a word shares with a
mask. *Adding bytes*, everywhere (Blackwell has no such instruction, and the assembler's stand-in
is long): the lanes count their bits, and `mma.m16n8k32.u8` adds bytes. Runs 0, 2, 4, 6 of a word
are the bytes of its even part, runs 1, 3, 5, 7 those of its odd part. Format: `bitmap.layout`.
Source of the operands' order: PTX ISA, "Matrix fragments for mma.m16n8k32", "... mma.m16n8k256".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_COUNT = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
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
def _block(names, lines):
    declared = [f".reg .b32 {', '.join(_registers(name))};" for name in names]
    return "\n".join(
        ["{", ".reg .b32 z, one;", *declared, "mov.b32 z, 0;", "mov.b32 one, 1;", *lines, "}"]
    )


@gluon.constexpr_function
def _spread_text(c, r, even, odd):
    """Lines: $0 … $3 from registers with the counts of the runs, and of the runs before.

    c, r: per tile, the registers of quads 2·t and 2·t + 1, for run g.
    """
    lines, zero = [], ["z"] * 4
    for sums, runs, before in zip(("o", "p"), c, r, strict=True):
        sums = _registers(sums)
        lines += [
            _product(_SUM, sums, [even, "z", odd, "z"], runs, zero),
            _product(_SUM, sums, ["one", "z", "one", "z"], before, sums),
        ]
    # bytes low, high, high, high: see the weights in `lane_masks`
    spread = (
        f"prmt.b32 ${i}, {sums}, z, 0x1110;" for i, sums in enumerate(("o0", "p0", "o1", "p1"))
    )
    return [*lines, *spread]


@gluon.constexpr_function
def _count_offsets_text():
    zero = ["z"] * 4
    lines = [
        _product(_COUNT, _registers("c"), ["$6", "z", "z", "$6"], ["$4", "$5"], zero),
        _product(_COUNT, _registers("r"), ["$7", "z", "z", "$7"], ["$4", "$5"], zero),
        *_spread_text((["c0", "c1"], ["c2", "c3"]), (["r0", "r1"], ["r2", "r3"]), "$8", "$9"),
    ]
    return _block("crop", lines)


@gluon.constexpr_function
def _sum_offsets_text():
    zero, masks = ["z"] * 4, ["$8", "$9", "$10", "$11"]
    lines = [
        _product(_SUM, _registers("c"), masks, ["$4", "$5"], zero),
        _product(_SUM, _registers("r"), masks, ["$6", "$7"], zero),
        *_spread_text((["c0", "c1"], ["r0", "r1"]), (["c2", "c3"], ["r2", "r3"]), "$12", "$13"),
    ]
    return _block("crop", lines)


@gluon.constexpr_function
def _count_addresses_text():
    offsets, words, d = (
        [f"${i}" for i in range(8, 12)],
        ["$16", "$17", "$16", "$17"],
        _registers("d"),
    )
    lines = [
        _product(_SUM, d, offsets, ["$12", "$13"], ["$14", "$14", "$15", "$15"]),
        _product(_COUNT, [f"${i}" for i in range(4)], words, ["$18", "$18"], d),
        _product(_COUNT, [f"${i}" for i in range(4, 8)], words, ["$19", "$19"], d),
    ]
    return _block("d", lines)


@gluon.constexpr_function
def _sum_addresses_text():
    groups = [[f"${i}" for i in range(first, first + 4)] for first in (0, 4, 8, 16, 20, 24)]
    second, fourth, offsets, counts, upto_second, upto_fourth = groups
    d = _registers("d")
    lines = [
        _product(_SUM, d, offsets, ["$12", "$13"], ["$14", "$14", "$15", "$15"]),
        _product(_SUM, d, counts, ["$28", "$29"], d),
        _product(_SUM, second, upto_second, ["$30", "$31"], d),
        _product(_SUM, fourth, upto_fourth, ["$30", "$31"], d),
    ]
    return _block("d", lines)


@gluon.jit
def _kept(x):
    """x, held in a register: what the assembler can compute it would compute in every stage."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def quad_masks(lane, COUNT: gl.constexpr):
    """The constant operands of `offsets`; lane = 4·g + t, of a warp."""
    g = lane >> 2
    t = lane & 3
    # rows are quads, and so are columns, quads 2·t and 2·t + 1 in lane t: those before quad g
    even = _kept((2 * t < g).to(gl.int32))
    odd = _kept((2 * t + 1 < g).to(gl.int32))
    # rows are runs: those of number g, and those before
    if COUNT:
        return _kept(15 << 4 * g), _kept((1 << 4 * g) - 1), even, odd
    else:
        run = 1 << 8 * (g >> 1)
        return (
            _kept(gl.where(g % 2 == 0, run, 0)), _kept(_ones(g + 1 >> 1)),
            _kept(gl.where(g % 2 == 1, run, 0)), _kept(_ones(g >> 1)), even, odd,
        )  # fmt: skip


@gluon.jit
def _ones(count):
    """So many bytes of one, up to 4."""
    return gl.where(count == 0, 0, 0x01010101 >> 32 - 8 * count)


@gluon.jit
def lane_masks(lane, STEP: gl.constexpr, COUNT: gl.constexpr):
    """The constant operands of `addresses` for a step of 16 columns; lane = 4·g + t, of a warp."""
    g = lane >> 2
    t = lane & 3
    # columns are lanes of the quad, two for each: the step's two runs. Lane STEP brings how many
    # values come before them, as bytes; 2 and 255 + 255 + 2 = 512 are their weights
    holds = gl.where(t == STEP, 0x02FFFF02, 0)
    first = g % 2 == 0
    even = _kept(gl.where(first, holds, 0))
    odd = _kept(gl.where(first, 0, holds))
    own = t == g >> 1
    if COUNT:
        # all bits of lanes before, and those before the second or the fourth element
        lanes = gl.where(t < g >> 1, 15, 0)
        shift = 8 * STEP + 4 * (g % 2)
        return (
            even,
            odd,
            _kept(gl.where(own, 1, lanes) << shift),
            _kept(gl.where(own, 7, lanes) << shift),
        )
    else:
        before = gl.where(t < g >> 1, 2 << 8 * STEP, 0)
        mine = gl.where(own, 2 << 8 * STEP, 0)
        return (
            even, odd, _kept(gl.where(first, before, 0)), _kept(gl.where(first, 0, before)),
            _kept(gl.where(first, mine, 0)), _kept(gl.where(first, 0, mine)),
        )  # fmt: skip


@gluon.jit
def parts_of(word0, word1, COUNT: gl.constexpr):
    """What `offsets` and `addresses` take for the words of two tiles.

    If bytes are added: e, o are those of even and odd runs, 0, 1 the tiles; s, f count what a run
    has before its second and its fourth element.
    """
    if COUNT:
        return word0, word1
    else:
        e0, o0, se0, so0, fe0, fo0 = _byte_counts(word0)
        e1, o1, se1, so1, fe1, fo1 = _byte_counts(word1)
        return e0, o0, e1, o1, se0, so0, se1, so1, fe0, fo0, fe1, fo1


@gluon.jit
def _byte_counts(word):
    """Bits in each run of a word, even and odd; in its first element; and in all but its last."""
    count = word - (word >> 1 & 0x55555555)
    count = (count & 0x33333333) + (count >> 2 & 0x33333333)
    most = count - (word >> 3 & 0x11111111)
    return (
        count & 0x0F0F0F0F, count >> 4 & 0x0F0F0F0F, word & 0x01010101, word >> 4 & 0x01010101,
        most & 0x0F0F0F0F, most >> 4 & 0x0F0F0F0F,
    )  # fmt: skip


@gluon.jit
def offsets(parts, masks, COUNT: gl.constexpr):
    """How many values of a tile come before each quad's in each run, as operand of `addresses`.

    First, with words as columns g and masks as rows: how many values quad g has in run r, and in
    the runs before. These are rows of the next right operand; the left one says which quads count,
    those before quad g for the first, all for the second.

    Returns four (tiles, 32): bytes low, high, high, high of the numbers of run 2·t in both tiles,
    and of run 2·t + 1.
    """
    if COUNT:
        word0, word1 = parts
        run, before, even, odd = masks
        return gl.inline_asm_elementwise(
            _count_offsets_text(),
            "=&r,=&r,=&r,=&r" + ",r" * 6,
            [word0, word1, run, before, even, odd],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        e0, o0, e1, o1 = parts[0], parts[1], parts[2], parts[3]
        run0, before0, run1, before1, even, odd = masks
        return gl.inline_asm_elementwise(
            _sum_offsets_text(),
            "=&r,=&r,=&r,=&r" + ",r" * 10,
            [e0, o0, e1, o1, run0, before0, run1, before1, even, odd],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )


@gluon.jit
def addresses(numbers, parts, base0, base1, masks, COUNT: gl.constexpr):
    """Shared addresses of the values of a step, for each operand register.

    First the quads' numbers, as bytes, are handed to the four lanes, twice them for bytes, and
    added to the tiles' addresses. Then the bits of the run are added that come before.

    numbers: what `offsets` gives; base0, base1: (tiles, 32), where the tiles' values are. Returns
    eight (tiles, 32): the address of a value for the second element of the step's first run in tile
    0, of its second run in tile 0, and so in tile 1; then the same for the fourth element.
    """
    n0, n1, n2, n3 = numbers
    if COUNT:
        word0, word1 = parts
        even, odd, second, fourth = masks
        return gl.inline_asm_elementwise(
            _count_addresses_text(),
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r" + ",r" * 12,
            [n0, n1, n2, n3, even, odd, base0, base1, word0, word1, second, fourth],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        e0, o0, e1, o1, se0, so0, se1, so1, fe0, fo0, fe1, fo1 = parts
        even, odd, before0, before1, own0, own1 = masks
        return gl.inline_asm_elementwise(
            _sum_addresses_text(),
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r" + ",r" * 24,
            [
                n0, n1, n2, n3, even, odd, base0, base1, e0, e1, o0, o1, se0, se1, so0, so1,
                fe0, fe1, fo0, fo1, before0, before1, own0, own1,
            ],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )  # fmt: skip
