"""2:4 matrix multiplication on Hopper's sparse `wgmma`, x by TMA, for some to many tokens.

    y[m, n] = act(Σ_k x[m, k]·W[n, k] + b[n]),  or with two weights  silu(x·Wgᵀ)·(x·Wuᵀ)

A program is two or four warpgroups, each with 64 weight rows. They share a ring of x tiles (tokens
× 64 columns) in shared memory, which TMA fills: it reports to a `full` barrier per slot, and every
warp reports to an `empty` barrier that its `wgmma`s have read the slot. Nothing else joins the
warpgroups: while one waits for sums or packed words, the others keep the tensor cores busy.

The packed words are the registers of the sparse operand. Blocks of 64 columns go in pairs, four
`wgmma`s to a group; while a pair multiplies, the words of the next are loaded into the other half
of the operand registers, and TMA's prefetch brings those of the unit after the next two into the
L2 cache. No barrier, fence of the async proxy or wait for a load stands in the loop.

Columns may be split over programs, whose sums are added in a fixed order (`fragments.sum_parts`):
results are bitwise repeatable. Gated, half of the warps have rows of the gate and half the same
rows of up; they meet in the epilogue.

It has not run on a GPU: machine code is checked and emulated (warpgroups and copies at random
speeds), the numerics are not proven, so `impl="auto"` does not take it. Two assumptions hold by
test only: the ring is the first allocation of shared memory, and parameters have the names that
`warpgroup_asm` gives.
Format: `two_four.layout`. Instruction: PTX ISA, `wgmma.mma_async.sp`, A in registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
# Triton compiles tuple + tuple, not (*tuple, item): RUF005 is waived where that matters.

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.runtime import processors
from prunekernels.sparse.epilogue import activate
from prunekernels.sparse.fragments import axis, sum_parts
from prunekernels.sparse.gluon_compat import barrier
from prunekernels.sparse.launching import difference, padded_rows, room_for_parts, split_columns
from prunekernels.sparse.two_four import warpgroup_asm as asm
from prunekernels.sparse.two_four.expand import sparse24_unpack
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.layout import ROWS, line_blocks, packed_shape
from prunekernels.sparse.two_four.tuning import WgmmaConfig, sparse24_wgmma

#: Compute capabilities that have the instruction (Blackwell's sparse tensor cores are others).
CAPABILITIES = ((9, 0),)
#: Slots of the ring, a power of two, and how many of them are not filled ahead.
STAGES, LAG = 8, 4


@gluon.jit
def _operand(words, ACC: gl.constexpr):
    """Words (warps, 128) as the sparse operand's registers."""
    return gl.convert_layout(gl.reshape(words, [words.shape[0], 1, 1, 32, 4]), ACC)


@gluon.jit
def _metadata_operand(words, ACC: gl.constexpr):
    return gl.convert_layout(gl.expand_dims(words, 4), ACC)


@gluon.jit
def _store_tile(acc, bias_ptr, y_ptr, row0, token0, M, N, ACTIVATION: gl.constexpr,
                HAS_BIAS: gl.constexpr, GATED: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """Bias and activation, or gate times up; then whole rows of y through shared memory."""
    NW: gl.constexpr = acc.shape[0]
    NT: gl.constexpr = acc.shape[2]
    WIDTH: gl.constexpr = 8 * NW if GATED else 16 * NW
    if HAS_BIAS:
        row = row0 + axis(NW, 0, ACC) * 16 + axis(32, 3, ACC) // 4 + axis(4, 4, ACC) // 2 * 8
        acc += gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
    PAIRS: gl.constexpr = gl.BlockedLayout(
        [1, 8, 2], [256 // WIDTH, WIDTH // 8, 1], [NW, 1, 1], [2, 1, 0]
    )
    FLAT: gl.constexpr = gl.SliceLayout(2, PAIRS)
    if GATED:
        # (gate or up, warp, token tile, row, token / 2, row / 8, token % 2) as (token, row, which)
        both = gl.permute(gl.reshape(acc, [2, NW // 2, NT, 8, 4, 2, 2]), [2, 4, 6, 1, 5, 3, 0])
        gate, up = gl.split(gl.convert_layout(gl.reshape(both, [8 * NT, WIDTH, 2]), PAIRS))
        y = (activate(gate, ACTIVATION) * up).to(y_ptr.dtype.element_ty)
    else:
        y = activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty)
        y = gl.permute(gl.reshape(y, [NW, NT, 8, 4, 2, 2]), [1, 3, 5, 0, 4, 2])
        y = gl.convert_layout(gl.reshape(y, [8 * NT, WIDTH]), FLAT)
    token = token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, FLAT))[:, None]
    row = row0 + gl.arange(0, WIDTH, gl.SliceLayout(0, FLAT))[None, :]
    gl.store(y_ptr + token.to(gl.int64) * N + row, y, mask=(token < M) & (row < N))


@gluon.jit(do_not_specialize=["M", "lines", "units", "tails", "units_per_split"])
def _wgmma24_tma_fwd_kernel(
    x_desc,  # (M, K) in tiles of (8·NT, 64)
    M,  # the second, as `warpgroup_asm.TOKENS_PARAMETER` says
    packed_ptr,  # int32 (lines, words): the weight, or the gate's
    up_ptr,  # int32 (lines, words), read if GATED
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # as for `sum_parts`, if SPLIT
    counter_ptr,
    N,
    lines,
    words,  # words in a line
    units,
    tails,
    units_per_split,
    KIND: gl.constexpr,  # "bf16" or "f16"
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,  # whether programs share a tile's columns
    NW: gl.constexpr,  # warps: 8 or 16
    NT: gl.constexpr,  # tiles of 8 tokens
    GROUP: gl.constexpr,  # row blocks that run together (0: the grid's order)
    TAILS: gl.constexpr,  # whether there are tails
    STAGES: gl.constexpr,
    LAG: gl.constexpr,
):
    TOKENS: gl.constexpr = 8 * NT
    LINES: gl.constexpr = NW // 2 if GATED else NW
    W: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [NW, 1], [1, 0])
    # two metadata words of each lane's four
    HALF: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [NW, 1], [1, 0])
    THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, 1, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    token_block = gl.program_id(0)
    row_block = gl.program_id(1)
    if GROUP > 0:
        # bands of GROUP row blocks, row blocks fastest within a band: what runs at the same time
        # shares tiles of x and lines of the weight in the L2 cache
        number = row_block * gl.num_programs(0) + token_block
        band = number // (GROUP * gl.num_programs(0))
        height = gl.minimum(GROUP, gl.num_programs(1) - band * GROUP)
        within = number - band * (GROUP * gl.num_programs(0))
        row_block = band * GROUP + within % height
        token_block = within // height
    token0 = token_block * TOKENS
    if SPLIT:
        first = gl.program_id(2) * units_per_split
        count = gl.minimum(units_per_split, units - first)
        rest = gl.where(first + units_per_split >= units, tails, 0)
    else:
        first = 0
        count = units
        rest = tails
    blocks = 4 * count + rest if TAILS else 4 * count
    column0 = first * 256

    warp = gl.arange(0, NW, gl.SliceLayout(1, W))[:, None]
    m_warp = gl.arange(0, NW, gl.SliceLayout(1, HALF))[:, None]
    # lines past the last are read as the last and not stored
    line = gl.minimum(row_block * LINES + warp % LINES, lines - 1).to(gl.int64) * words
    m_line = gl.minimum(row_block * LINES + m_warp % LINES, lines - 1).to(gl.int64) * words
    if GATED:
        line_ptrs = gl.where(warp < LINES, packed_ptr + line, up_ptr + line)
        m_line_ptrs = gl.where(m_warp < LINES, packed_ptr + m_line, up_ptr + m_line)
    else:
        line_ptrs = packed_ptr + line
        m_line_ptrs = packed_ptr + m_line
    word = gl.arange(0, 128, gl.SliceLayout(0, W))[None, :]
    m_word = gl.arange(0, 64, gl.SliceLayout(0, HALF))[None, :]
    w_ptrs = line_ptrs + first * 1152 + word
    m_ptrs = m_line_ptrs + first * 1152 + (1024 + m_word // 2 * 4 + m_word % 2)
    a = ()
    for step in gl.static_range(4):
        a = a + (asm.words(w_ptrs + step * 128, count > 0),)  # noqa: RUF005
    # some token blocks bring the words of later units into L2: two at the start, then one by one
    leads = token_block % 8 == 0
    meta = asm.metadata(m_ptrs, count > 0, leads & (count > 2), 512, 2 * 4608)

    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, 64], x_desc.layout)
    # x has come, then x is used
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    base = asm.shared_base(gl.zeros([NW, 1, 1, 32, 4], gl.int32, ACC))
    x = asm.matrix_descriptor(base)
    bars = base + STAGES * TOKENS * 128
    smem = asm.shared_base(gl.zeros([32 * NW], gl.int32, THREADS))
    thread_bars = smem + STAGES * TOKENS * 128
    asm.init_barriers(thread_bars, STAGES, NW)
    fence_async_shared()
    barrier()
    # the first tile by Triton, which keeps the allocations in place
    mbarrier.expect(full.index(0), TOKENS * 128)
    tma.async_copy_global_to_shared(x_desc, [token0, column0], full.index(0), ring.index(0))
    for i in gl.static_range(1, STAGES - LAG):
        asm.fill(smem, thread_bars, i, blocks, column0, token0, STAGES, TOKENS)

    acc = gl.zeros([NW, 1, NT, 32, 4], gl.float32, ACC)
    for unit in range(0, count):
        more = unit + 1 < count
        for j in gl.static_range(0, 4, 2):
            # a pair of blocks: its words are here; those of the next come while it multiplies
            block = 4 * unit + j
            e0, e1 = gl.split(gl.reshape(meta, [NW, 1, 1, 32, 2]))
            operands = [
                _operand(a[0], ACC),
                _operand(a[1], ACC),
                _metadata_operand(e0, ACC),
                _operand(a[2], ACC),
                _operand(a[3], ACC),
                _metadata_operand(e1, ACC),
            ]
            acc = asm.multiply(acc, operands, x, bars, block, KIND, STAGES, 2)
            for i in gl.static_range(2):
                new = block + i + (STAGES - LAG)
                asm.fill(smem, thread_bars, new, blocks, column0, token0, STAGES, TOKENS)
            following = ()
            if j == 0:
                for i in gl.static_range(4):
                    word_ptrs = w_ptrs + (512 + i * 128)
                    following = following + (asm.words(word_ptrs, unit < count),)  # noqa: RUF005
                # unit + 3 begins 3·1152 − 1026 words on
                fetch = leads & (unit + 3 < count)
                meta = asm.metadata(m_ptrs + 2, unit < count, fetch, 9720, 4608)
            else:
                for i in gl.static_range(4):
                    word_ptrs = w_ptrs + (1152 + i * 128)
                    following = following + (asm.words(word_ptrs, more),)  # noqa: RUF005
                meta = asm.metadata(m_ptrs + 1152, more, leads, 0, 0)
            a = following
            acc = asm.settle(acc, operands, bars, block, STAGES, 2)
        w_ptrs += 1152
        m_ptrs += 1152
    if TAILS:
        tail_ptrs = line_ptrs + units * 1152
        for tail in range(0, rest):
            # one metadata word per lane, loaded for each of its four value words
            e = gl.load(tail_ptrs + (256 + word // 4))
            operands = [
                _operand(gl.load(tail_ptrs + word), ACC),
                _operand(gl.load(tail_ptrs + (128 + word)), ACC),
                _operand(e, ACC),
            ]
            block = 4 * count + tail
            new = block + (STAGES - LAG)
            asm.fill(smem, thread_bars, new, blocks, column0, token0, STAGES, TOKENS)
            acc = asm.multiply(acc, operands, x, bars, block, KIND, STAGES, 1)
            acc = asm.settle(acc, operands, bars, block, STAGES, 1)
            tail_ptrs += 288
    # every warp is done with the ring: the epilogue uses its shared memory again
    barrier()
    row0 = row_block * (LINES * 16)
    if SPLIT:
        acc, last = sum_parts(acc, parts_ptr, counter_ptr, token0, M, ACC)
        if last:
            _store_tile(acc, bias_ptr, y_ptr, row0, token0, M, N, ACTIVATION, HAS_BIAS, GATED, ACC)
    else:
        _store_tile(acc, bias_ptr, y_ptr, row0, token0, M, N, ACTIVATION, HAS_BIAS, GATED, ACC)


@dataclass(frozen=True)
class _Address:
    """What a descriptor needs of a tensor, without keeping its memory."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _x_layout(token_tiles: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    block = [8 * token_tiles, 64]
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return block, gl.NVMMASharedLayout.get_default_for(block, kind)


@lru_cache(maxsize=1024)
def x_descriptor(
    address: int, shape: tuple[int, int], stride: int, dtype: torch.dtype, token_tiles: int
) -> TensorDescriptor:
    """Tiles of x (M, K) as the kernel reads them; rows are multiples of 16 bytes apart."""
    block, layout = _x_layout(token_tiles, dtype)
    return TensorDescriptor(_Address(address, dtype), list(shape), [stride, 1], block, layout)


def forward(
    x: Tensor, packed: Tensor, up: Tensor | None, rows: int, bias: Tensor | None, activation: str
) -> Tensor:
    """Launch for x (M, K) with M > 0; `up` selects the gated form."""
    config = sparse24_wgmma(x.shape[0], rows, x.shape[1], up is not None, processors(x.device))
    return launch(x, packed, up, rows, bias, activation, config)


def launch(
    x: Tensor,
    packed: Tensor,
    up: Tensor | None,
    rows: int,
    bias: Tensor | None,
    activation: str,
    config: WgmmaConfig,
) -> Tensor:
    """`forward` with a given configuration."""
    # TMA takes rows of whole 16 bytes; the call does not keep what it reads through the descriptor
    x = padded_rows(x, -(-x.shape[1] // 8) * 8)
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    product(x, packed, up, bias, y, activation, config).run()
    return y


def product(
    x: Tensor,
    packed: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
    config: WgmmaConfig,
) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device.

    K may be rounded up to a multiple of eight: the kernel reads zeros past the last column of x.
    """
    tokens, rows = y.shape
    lines, units, tails = line_blocks(rows, x.shape[1])
    per_split, splits = split_columns(units, config.splits)
    token_blocks = triton.cdiv(tokens, 8 * config.token_tiles)
    row_blocks = triton.cdiv(lines, config.warps // 2 if up is not None else config.warps)
    block = 8 * config.token_tiles, 16 * config.warps
    parts, counter = room_for_parts(y, token_blocks, row_blocks, splits, *block)
    shape = x.shape[0], x.shape[1]
    descriptor = x_descriptor(x.data_ptr(), shape, x.stride(0), x.dtype, config.token_tiles)
    return Launch(
        _wgmma24_tma_fwd_kernel,
        (token_blocks, row_blocks, splits),
        (
            descriptor,
            tokens,
            packed,
            packed if up is None else up,
            y if bias is None else bias,
            y,
            parts,
            counter,
            rows,
            lines,
            packed.shape[1],
            units,
            tails,
            per_split,
        ),
        {
            "KIND": "bf16" if x.dtype == torch.bfloat16 else "f16",
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "GATED": up is not None,
            "SPLIT": splits > 1,
            "NW": config.warps,
            "NT": config.token_tiles,
            "GROUP": config.group,
            "TAILS": tails > 0,
            "STAGES": STAGES,
            "LAG": LAG,
        },
        num_warps=config.warps,
        options={"maxnreg": 128},
    )


def self_test(device: torch.device) -> str | None:
    """Compare with the expanded weight on small integers, where every sum is exact.

    Every tile that `sparse24_wgmma` chooses is tried with tails and in both forms, on a weight
    whose programs keep a device busy, and each several times: a race need not show at once.

    Args:
        device: The CUDA device to test.

    Returns:
        None if all results are equal, else what differed.
    """
    random = torch.Generator().manual_seed(0)
    for config, dtype, tokens, columns in _SELF_TESTS:
        groups = torch.randint(-2, 3, (_SELF_TEST_ROWS, columns // 4, 4), generator=random)
        kept = torch.rand(groups.shape, generator=random).argsort(2) < 2
        weight = (groups * kept).view(_SELF_TEST_ROWS, -1).to(device, dtype)
        x = torch.randint(-3, 4, (tokens, columns), generator=random).to(device, dtype)
        packed = sparse24_pack(weight).packed
        dense = sparse24_unpack(packed, _SELF_TEST_ROWS, columns, dtype)
        # without activation, gate and up of one weight make squares
        for up, power in ((None, 1), (packed, 2)):
            got = launch(x, packed, up, _SELF_TEST_ROWS, None, "none", config)
            if problem := difference(got, x, dense, power):
                return f"{config}, gated {up is not None}: {problem}"
            for _ in range(_SELF_TEST_REPEATS):
                again = launch(x, packed, up, _SELF_TEST_ROWS, None, "none", config)
                if not torch.equal(got, again):
                    return f"{config}, gated {up is not None}: results differ between calls"
    return None


_SELF_TESTS = (
    (WgmmaConfig(16, 16, 1, 8), torch.bfloat16, 300, 2112),
    (WgmmaConfig(16, 16, 2, 0), torch.bfloat16, 131, 1024),
    (WgmmaConfig(8, 8, 2, 0), torch.float16, 60, 1088),
    (WgmmaConfig(8, 4, 4, 0), torch.bfloat16, 20, 2048),
)
_SELF_TEST_ROWS, _SELF_TEST_REPEATS = 4008, 20


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    many, few = WgmmaConfig(16, 16, 1, 8), WgmmaConfig(8, 8, 2, 0)
    return [
        _case("bf16", many),
        _case("bf16", many, gated=True),
        _case("f16", many, tails=True),
        _case("bf16", many._replace(splits=4, group=0), tails=True),
        _case("bf16", few),
        _case("f16", few, gated=True, tails=True),
        _case("bf16", few._replace(token_tiles=4, splits=4)),
    ]


def _case(kind: str, config: WgmmaConfig, gated: bool = False, tails: bool = False) -> KernelCase:
    rows, columns = 14336, 4160 if tails else 4096
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    x, y = meta((512, columns), dtype), meta((512, rows), dtype)
    packed = meta(packed_shape(rows, columns, dtype), torch.int32)
    bias = None if gated else meta((rows,), dtype)
    up, activation = (packed, "silu") if gated else (None, "none")
    return product(x, packed, up, bias, y, activation, config).case(
        f"sparse24/wgmma_tma/{kind}/{16 * config.warps}x{8 * config.token_tiles}"
        + "/gated" * gated
        + "/tails" * tails
        + f"/split{config.splits}" * (config.splits > 1),
        opcodes=(f"HGMMA.SP.64x{8 * config.token_tiles}x32.F32", "UTMALDG"),
        # without tails the epilogue stands between the loop and the branch back
        elements_per_iteration=ROWS * 256 if tails else 0,
        per_iteration=("HGMMA.SP", 8),
        archs=(90,),
    )
