"""Inline assembly of `wgmma_tma`: what Gluon has no word for on Hopper.

A function `…_text` makes the instructions; `$i` is operand i, outputs first. The jitted function
of the same name gives it tensors. Gluon calls the assembly once for each `pack` elements that a
thread holds: operands that the threads of a warp share are tensors of equal elements, which cost
one register.

Two names come from the compiler: dynamic shared memory is `global_smem`, and parameter i of a
kernel is `<kernel>_param_i`. A tensor descriptor of rank two is five parameters (itself, two sizes
and two strides), so `TOKENS_PARAMETER`, which follows it, is number 5. Tests hold both.
Source: PTX ISA, "wgmma.mma_async.sp", "mbarrier", "cp.async.bulk.tensor".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# read by constexpr functions only, which are Python
_PARAMETER = "_wgmma24_tma_fwd_kernel_param_"
#: Number of the parameter that holds M, which is never negative.
TOKENS_PARAMETER = 5
# K-major rows of 128 bytes, swizzled by 128 bytes; eight rows are 1024 bytes.
_DESCRIPTOR = gl.constexpr(0x4000004000010000)


@gluon.jit
def shared_base(like):
    """Where dynamic shared memory begins, for every element of the int32 tensor `like`."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [like], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def matrix_descriptor(address):
    """Descriptor of x tiles whose first lies at a shared-memory address."""
    return ((address >> 4) & 0x3FFF).to(gl.int64) | _DESCRIPTOR


@gluon.constexpr_function
def _register(count, operand, index=0):
    """Register `index` of an operand of `count` registers; the tied sums are operands −2 and −1."""
    return f"${(2 + operand) * count + index}"


@gluon.constexpr_function
def _multiply_text(kind, tokens, blocks):
    """Operands of tokens / 2 registers: sums, (A, A, E) per block, x barrier, parity, B."""
    name = f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind}"
    count = tokens // 2
    sums = ",".join(f"${i}" for i in range(count))
    full, parity, b = (_register(count, 3 * blocks + i) for i in range(3))
    lines = ["{", ".reg .pred p;", ".reg .b64 d;"]
    for i in range(blocks):
        label = f"XWAIT{'AB'[i]}"
        lines += [
            f"{label}:",
            f"mbarrier.try_wait.parity.shared::cta.b64 p, [{full}+{8 * i}], {parity};",
            f"@!p bra.uni {label};",
        ]
    lines.append("wgmma.fence.sync.aligned;")
    for step in range(2 * blocks):
        block, half = step // 2, step % 2
        a = ",".join(_register(count, 3 * block + half, i) for i in range(4))
        e = _register(count, 3 * block + 2)
        # a slot is `tokens` rows of 128 bytes, a step 64 bytes of each; in units of 16 bytes
        lines.append(f"add.s64 d, {b}, {block * tokens * 8 + half * 4};")
        lines.append(f"{name} {{{sums}}}, {{{a}}}, d, {e}, {half}, 1, 1, 1, 0;")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])


@gluon.constexpr_function
def _settle_text(tokens, blocks):
    """Operands of tokens / 2 registers: sums, (A, A, E) per block, barrier of the first slot."""
    count = tokens // 2
    empty = _register(count, 3 * blocks)
    lines = [
        "{",
        ".reg .pred p, q;",
        ".reg .b32 t;",
        "wgmma.wait_group.sync.aligned 0;",
        f"ld.param.b32 t, [{_PARAMETER}{TOKENS_PARAMETER}];",
        "setp.lt.s32 q, t, 0;",
    ]
    for block in range(blocks):
        for operand in (3 * block, 3 * block + 1):
            words = ",".join(_register(count, operand, i) for i in range(4))
            lines.append(f"@q st.shared.v4.b32 [{empty}], {{{words}}};")
        lines.append(f"@q st.shared.b32 [{empty}], {_register(count, 3 * block + 2)};")
    lines.append("elect.sync t|p, 0xffffffff;")
    lines += [f"@p mbarrier.arrive.shared::cta.b64 _, [{empty}+{8 * i}];" for i in range(blocks)]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _constraints(tokens, words, wide):
    """Sums in and out, then `words` 32-bit and `wide` 64-bit operands of tokens / 2 registers."""
    count = tokens // 2
    tied = [str(i) for i in range(count)]
    return ",".join(["=f"] * count + tied + ["r"] * (words * count) + ["l"] * (wide * count))


@gluon.jit
def multiply(acc, operands, x, bars, block, KIND: gl.constexpr, STAGES: gl.constexpr,
             BLOCKS: gl.constexpr):  # fmt: skip
    """Wait for x, then start acc + A·B for BLOCKS blocks of 64 columns from `block` on.

    The sums, `operands` and the slots of x are in use until `settle`.

    Args:
        acc: float32 (warps, 1, token tiles, 32, 4).
        operands: (A of columns 0-31, A of columns 32-63, metadata) for each block.
        x: matrix descriptor of the ring's first slot.
        bars: address of the ring's first barrier.
        block: number of the first block in this program; the slots must follow each other.
        KIND: "bf16" or "f16".
        STAGES: slots of the ring.
        BLOCKS: 1 or 2.
    """
    NT: gl.constexpr = acc.shape[2]
    slot = block & (STAGES - 1)
    return gl.inline_asm_elementwise(
        _multiply_text(KIND, 8 * NT, BLOCKS),
        _constraints(8 * NT, 3 * BLOCKS + 2, 1),
        [acc] + operands + [bars + slot * 8, block // STAGES & 1, x + slot * (NT * 64)],  # noqa: RUF005
        dtype=gl.float32,
        is_pure=False,
        pack=4 * NT,
    )


@gluon.jit
def settle(acc, operands, bars, block, STAGES: gl.constexpr, BLOCKS: gl.constexpr):
    """Wait for the sums that `multiply` started with the same operands; report x's slots as used.

    The instructions read A and metadata until then, which neither compiler knows: ptxas would put
    the next words into the registers of the metadata. Stores that never run (if M < 0) name the
    registers after the wait, so that they keep what they hold.
    """
    NT: gl.constexpr = acc.shape[2]
    return gl.inline_asm_elementwise(
        _settle_text(8 * NT, BLOCKS),
        _constraints(8 * NT, 3 * BLOCKS + 1, 0),
        [acc] + operands + [bars + (STAGES + (block & (STAGES - 1))) * 8],  # noqa: RUF005
        dtype=gl.float32,
        is_pure=False,
        pack=4 * NT,
    )


@gluon.constexpr_function
def _init_text(stages, warps):
    lines = ["{", ".reg .pred p;", ".reg .b32 t;", "mov.u32 t, %tid.x;", "setp.eq.u32 p, t, 0;"]
    for i in range(2 * stages):
        count = 1 if i < stages else warps
        lines.append(f"@p mbarrier.init.shared::cta.b64 [$1+{8 * i}], {count};")
    return "\n".join([*lines, "mov.u32 $0, 0;", "}"])


@gluon.jit
def init_barriers(bars, STAGES: gl.constexpr, WARPS: gl.constexpr):
    """STAGES barriers "x has come" (one arrival), then STAGES "x is used" (one per warp)."""
    gl.inline_asm_elementwise(
        _init_text(STAGES, WARPS), "=r,r", [bars], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _fill_text(tile_bytes):
    """Operands: full barrier, empty barrier, its parity, slot, column, token, whether to fill."""
    return f"""{{
.reg .pred p;
.reg .b32 t;
.reg .b64 d;
mov.u32 t, %tid.x;
setp.gt.u32 p, t, 31;
@p bra.uni FILLED;
setp.eq.s32 p, $7, 0;
@p bra.uni FILLED;
FWAIT:
mbarrier.try_wait.parity.shared::cta.b64 p, [$2], $3;
@!p bra.uni FWAIT;
mov.b64 d, {_PARAMETER}0;
cvta.param.u64 d, d;
elect.sync t|p, 0xffffffff;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {tile_bytes};
@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes \
[$4], [d, {{$5, $6}}], [$1];
FILLED:
mov.u32 $0, 0;
}}"""


@gluon.jit
def fill(smem, bars, new, blocks, column0, token0, STAGES: gl.constexpr, TOKENS: gl.constexpr):
    """The first warp waits until block `new`'s slot is used up, then lets TMA fill it.

    Nothing happens from block `blocks` on. `smem` and `bars` are int32 (threads,) addresses.
    """
    slot = new & (STAGES - 1)
    gl.inline_asm_elementwise(
        _fill_text(TOKENS * 128),
        "=r,r,r,r,r,r,r,r",
        [
            bars + slot * 8,
            bars + (STAGES + slot) * 8,
            # a barrier counts the phase before its first as complete
            (new // STAGES & 1) ^ 1,
            smem + slot * (TOKENS * 128),
            column0 + new * 64,
            token0,
            (new < blocks).to(gl.int32),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


_WORDS_TEXT = gl.constexpr(
    """{
.reg .pred p;
setp.ne.s32 p, $8, 0;
@p ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];
}"""
)


@gluon.jit
def words(ptrs, wanted):
    """Four words per lane, if `wanted`.

    Registers that are not loaded are not cleared: to define an operand register by an ordinary
    instruction while `wgmma`s are in flight makes ptxas serialise them.
    """
    return gl.inline_asm_elementwise(
        _WORDS_TEXT, "=r,=r,=r,=r,l,l,l,l,r,r,r,r", [ptrs, wanted.to(gl.int32)], dtype=gl.int32,
        is_pure=False, pack=4,
    )  # fmt: skip


@gluon.constexpr_function
def _metadata_text(offset, size):
    lines = [
        "{",
        ".reg .pred p, q;",
        ".reg .b32 t;",
        "setp.ne.s32 p, $4, 0;",
        "@p ld.global.nc.v2.b32 {$0, $1}, [$2];",
    ]
    if size:
        lines += [
            "elect.sync t|q, 0xffffffff;",
            "setp.ne.and.s32 q, $6, 0, q;",
            f"@q cp.async.bulk.prefetch.L2.global [$2+{offset}], {size};",
        ]
    return "\n".join([*lines, "}"])


@gluon.jit
def metadata(ptrs, wanted, fetch, OFFSET: gl.constexpr, SIZE: gl.constexpr):
    """Two metadata words per lane, if `wanted`: those of two blocks.

    If `fetch`, SIZE bytes of the line are brought into the L2 cache, OFFSET bytes from lane 0's.
    """
    return gl.inline_asm_elementwise(
        _metadata_text(OFFSET, SIZE), "=r,=r,l,l,r,r,r,r",
        [ptrs, wanted.to(gl.int32), fetch.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
