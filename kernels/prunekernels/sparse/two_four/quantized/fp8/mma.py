"""Product of e4m3 2:4 weights with e4m3 activations on NVIDIA's sparse tensor cores.

    y[m, n] = act(t[m]·s[n]·Σ_k c[m, k]·w[n, k] + b[n])

Codes and token scales come from `tokens_triton`. The walk over units of 256 columns is that of
`quantized.mma`: weights into registers in two sets that take turns, x through a ring in shared
memory. What multiplies 128 columns, four steps of the format, depends on the architecture:

"e4m3" (sm_89, sm_120): `mma.sp.m16n8k64` of e4m3 values. A lane's words hold groups of four columns
    that lie 16, 32 or 64 columns apart, where the instruction wants two neighbours in a register;
    so a product's columns are counted in another order. Instruction i takes word i of every step: a
    register is one byte permutation of two words, 64 columns apart. The metadata of its four
    groups stand in nibbles of two words, of this lane or of its neighbour: nine instructions, one
    of them a shuffle, for two products. x is written in that order by the kernel that rounds it.
    The adder keeps about 13 bits of a sum, so each unit's sums, of 128 products, start from zero
    and are added to float32 sums.
"f16" (sm_90, sm_100): those have no such instruction; their assembler makes it of some 90 others,
    twelve of them shuffles. Here both operands become f16 by conversions, which is exact, and
    `mma.sp.m16n8k32` sums in float32; the metadata serve as they are. x is written so that one
    word of a lane makes two of its registers.

Sources: PTX ISA, "Matrix Fragments for sparse mma.m16n8k64"; the adder: arXiv 2411.10958 (13 bits)
and arXiv 2412.19437 (14 bits). Format: `two_four.quantized.layout`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"
# Triton compiles tuple + tuple, not (*tuple, item): RUF005 is waived where that matters.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.runtime import capability, processors
from prunekernels.sparse.fragments import axis, finish, x_layout, x_registers
from prunekernels.sparse.gluon_compat import barrier
from prunekernels.sparse.launching import difference, room_for_parts, split_columns
from prunekernels.sparse.two_four.mma import multiply_registers
from prunekernels.sparse.two_four.quantized.codes import (
    halves,
    permuted,
    quarters,
    scales_of_rows,
)
from prunekernels.sparse.two_four.quantized.fp8.tokens import Tokens
from prunekernels.sparse.two_four.quantized.fp8.tokens_triton import ordered_tokens
from prunekernels.sparse.two_four.quantized.layout import ROWS, line_blocks
from prunekernels.sparse.two_four.quantized.portable import case_parts
from prunekernels.sparse.two_four.quantized.tuning import fp8_tokens_mma
from prunekernels.sparse.two_four.tuning import MmaConfig

#: Where e4m3 values are multiplied, and where they are converted first. The self-test decides.
NATIVE = ((8, 9), (12, 0), (12, 1))
CAPABILITIES = (*NATIVE, (9, 0), (10, 0), (10, 3))


@gluon.jit
def _metadata(a, b, ACC: gl.constexpr):
    """Metadata of both instructions of 128 columns, of a lane's words for the first and last 64.

    Lane t of a quad has nibbles of groups 4·t … of each. Threads 2·(t mod 2) and the next multiply
    four of the groups that its word of an instruction describes: for the first instruction those of
    the even lane, for the second those of the odd one, nibbles of `a` and `b` in turn.
    """
    low = a & 0x0F0F0F0F | (b << 4) & -0x0F0F0F10
    high = (a >> 4) & 0x0F0F0F0F | b & -0x0F0F0F10
    even = axis(32, 3, ACC) % 2 == 0
    kept = permuted(low, high, gl.where(even, 0x6240, 0x7351))
    sent = permuted(low, high, gl.where(even, 0x7351, 0x6240))
    got = gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;",
        "=r,r",
        [sent],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    return gl.where(even, kept, got), gl.where(even, got, kept)


@gluon.jit
def _halves_of_x(b, NT: gl.constexpr, ACC: gl.constexpr):
    """f16 operands of two steps, of (8·NT, 16) words of their columns."""
    # word = 8·step + 4·(half of its registers) + thread of the quad
    b = gl.permute(gl.reshape(b, [NT, 8, 2, 2, 4]), [0, 1, 3, 4, 2])
    first, second = gl.split(b)
    first = gl.permute(gl.join(first, first), [0, 1, 3, 2, 4])
    second = gl.permute(gl.join(second, second), [0, 1, 3, 2, 4])
    first = gl.convert_layout(gl.reshape(first, [1, 1, NT, 32, 4]), ACC)
    second = gl.convert_layout(gl.reshape(second, [1, 1, NT, 32, 4]), ACC)
    return halves(first, False), halves(second, False)


@gluon.jit
def _multiply(acc, words, e, b, ORDER: gl.constexpr, ACC: gl.constexpr):
    """acc + A·B of 128 columns.

    words: two of each step, (NW, MT, 1, 32, 1); e: metadata of the first and the last 64 columns,
    likewise; b: two times (tokens, 16) words of x.
    """
    NT: gl.constexpr = acc.shape[2]
    register = axis(4, 4, ACC)
    if ORDER == "e4m3":
        # an even register holds bytes 1 and 3 of words, an odd one bytes 0 and 2
        selector = gl.where(register % 2 == 0, 0x7531, 0x6420)
        e = _metadata(e[0], e[1], ACC)
        for i in gl.static_range(2):
            low = gl.where(register < 2, words[i], words[2 + i])
            high = gl.where(register < 2, words[4 + i], words[6 + i])
            a = permuted(low, high, selector)
            acc = multiply_registers(acc, a, x_registers(b[i], NT, ACC), e[i], 0, ORDER, ACC)
    else:
        for i in gl.static_range(2):
            x = _halves_of_x(b[i], NT, ACC)
            for half in gl.static_range(2):
                two = words[4 * i + 2 * half], words[4 * i + 2 * half + 1]
                a = halves(gl.where(register < 2, two[0], two[1]), True)
                acc = multiply_registers(acc, a, x[half], e[i], half, ORDER, ACC)
    return acc


@gluon.jit
def _load_unit(w_ptrs):
    """A unit's four blocks of words (tiles, 128) and its metadata."""
    blocks = ()
    for block in gl.static_range(4):
        blocks = blocks + (gl.load(w_ptrs + block * 128),)  # noqa: RUF005
    return blocks, gl.load(w_ptrs + 512)


@gluon.jit
def _unit(acc, held, xs, w_ptrs, ORDER: gl.constexpr, ACC: gl.constexpr, X: gl.constexpr):
    """Multiply one unit of 256 columns held in registers, and load the next but one."""
    NW: gl.constexpr = acc.shape[0]
    MT: gl.constexpr = acc.shape[1]
    blocks, meta = held
    e = quarters(meta, NW, MT, ACC)
    part = acc
    if ORDER == "e4m3":
        part = gl.zeros_like(acc)
    following = ()
    for half in gl.static_range(2):
        words = quarters(blocks[2 * half], NW, MT, ACC)
        words = words + quarters(blocks[2 * half + 1], NW, MT, ACC)
        b = (
            xs.slice(32 * half, 16, dim=1).load(X),
            xs.slice(32 * half + 16, 16, dim=1).load(X),
        )
        part = _multiply(part, words, (e[2 * half], e[2 * half + 1]), b, ORDER, ACC)
        for block in gl.static_range(2):
            following = following + (gl.load(w_ptrs + (2 * half + block) * 128),)  # noqa: RUF005
    if ORDER == "e4m3":
        part = acc + part
    return part, (following, gl.load(w_ptrs + 512))


@gluon.jit(do_not_specialize=["M", "N", "lines", "units", "tails", "units_per_split"])
def _mma24_fp8_fwd_kernel(
    codes_ptr,  # int32 (M, columns padded to 128 / 4), four e4m3 codes each, contiguous
    tokens_ptr,  # float32 (M,): scales of tokens
    packed_ptr,  # int32 (lines, words)
    scales_ptr,  # float32 (lines, 1, 16)
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # as for `sum_parts`, if SPLIT
    counter_ptr,
    stride_xm,  # words of a token
    M,
    N,
    lines,
    words,  # words in a line
    units,
    tails,
    units_per_split,
    ORDER: gl.constexpr,  # "e4m3" or "f16": what the tensor cores multiply
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SPLIT: gl.constexpr,
    NW: gl.constexpr,  # warps
    MT: gl.constexpr,  # tiles of 16 rows per warp
    NT: gl.constexpr,  # tiles of 8 tokens
    STAGES: gl.constexpr,  # of the ring, a power of two
):
    TILES: gl.constexpr = NW * MT
    UNIT: gl.constexpr = 640
    TAIL: gl.constexpr = 160
    W: gl.constexpr = gl.BlockedLayout([MT, 4], [1, 32], [NW, 1], [1, 0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [NW, 1], [1, 0])
    X: gl.constexpr = x_layout(NT, NW)
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, MT, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    ROWS_OF: gl.constexpr = gl.BlockedLayout(
        [1, MT, 1, 1, 2], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    # eight rows of 16-byte chunks, rotated: ldmatrix then meets every bank once
    RING: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    # blocks of tokens first: those that read the same rows of the weight run together
    block = gl.program_id(1)
    split = gl.program_id(2)
    token0 = gl.program_id(0) * (8 * NT)
    first = split * units_per_split
    count = gl.minimum(units_per_split, units - first)

    tile = gl.arange(0, TILES, gl.SliceLayout(1, W))[:, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, W))[None, :]
    # lines past the last are read as the last and not stored
    line_ptrs = packed_ptr + gl.minimum(block * TILES + tile, lines - 1).to(gl.int64) * words
    acc = gl.zeros([NW, MT, NT, 32, 4], gl.float32, ACC)
    if count > 0:
        token = token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, COPY))[:, None]
        x_word = gl.arange(0, 64, gl.SliceLayout(0, COPY))[None, :]
        x_ok = token < M
        x_ptrs = codes_ptr + token.to(gl.int64) * stride_xm + x_word
        ring = gl.allocate_shared_memory(gl.int32, [STAGES, 8 * NT, 64], RING)
        for stage in gl.static_range(STAGES - 1):
            # past the slice, and past the last unit, something readable that nobody uses
            x_at = gl.minimum(first + stage, units - 1) * 64
            async_copy.async_copy_global_to_shared(ring.index(stage), x_ptrs + x_at, mask=x_ok)
            async_copy.commit_group()
        w_ptrs = line_ptrs + first * UNIT + word
        one = _load_unit(w_ptrs)
        w_ptrs += gl.minimum(count - 1, 1) * UNIT
        other = _load_unit(w_ptrs)
        for pair_of_units in range(0, count // 2):
            for turn in gl.static_range(2):
                unit = 2 * pair_of_units + turn
                async_copy.wait_group(STAGES - 2)
                # every warp is done with the slot that is filled next
                barrier()
                ahead = unit + STAGES - 1
                x_at = gl.minimum(first + ahead, units - 1) * 64
                slot = ring.index(ahead & (STAGES - 1))
                async_copy.async_copy_global_to_shared(slot, x_ptrs + x_at, mask=x_ok)
                async_copy.commit_group()
                # past the last unit the last again, which is in a cache and which nobody uses
                w_ptrs += gl.where(unit + 2 < count, 1, 0) * UNIT
                slot = ring.index(unit & (STAGES - 1))
                acc, held = _unit(acc, one, slot, w_ptrs, ORDER, ACC, X)
                one, other = other, held
        async_copy.wait_group(0)
        barrier()
        if count % 2 == 1:
            slot = ring.index((count - 1) & (STAGES - 1))
            acc, one = _unit(acc, one, slot, w_ptrs, ORDER, ACC, X)

    if first + units_per_split >= units:
        token = token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, X))[:, None]
        x_word = gl.arange(0, 16, gl.SliceLayout(0, X))[None, :]
        x_ptrs = codes_ptr + token.to(gl.int64) * stride_xm + units * 64 + x_word
        w_ptrs = line_ptrs + units * UNIT
        for tail in range(0, tails, 2):
            # two tails are 128 columns; past the last, zeros with the last one's metadata
            alone = tail + 1 == tails
            next_ptrs = w_ptrs + gl.where(alone, 0, TAIL)
            after = gl.where(alone, 0, gl.load(next_ptrs + word))
            held = quarters(gl.load(w_ptrs + word), NW, MT, ACC)
            held = held + quarters(after, NW, MT, ACC)
            # each word of a lane is loaded for all four places that its words have
            e = quarters(gl.load(w_ptrs + 128 + word // 4), NW, MT, ACC)
            e_after = quarters(gl.load(next_ptrs + 128 + word // 4), NW, MT, ACC)
            b = (
                gl.load(x_ptrs, mask=token < M, other=0),
                gl.load(x_ptrs + 16, mask=token < M, other=0),
            )
            part = _multiply(gl.zeros_like(acc), held, (e[0], e_after[0]), b, ORDER, ACC)
            acc = acc + part
            x_ptrs += 32
            w_ptrs += 2 * TAIL

    line = (block * NW + axis(NW, 0, ROWS_OF)) * MT + axis(MT, 1, ROWS_OF)
    pair = axis(32, 3, ROWS_OF) // 4 * 2 + axis(2, 4, ROWS_OF)
    rows_at = gl.minimum(line, lines - 1).to(gl.int64) * 16 + pair
    acc = acc * scales_of_rows(gl.load(scales_ptr + rows_at), ACC)
    token_of = axis(32, 3, ACC) % 4 * 2 + axis(4, 4, ACC) % 2
    token_of = token0 + axis(NT, 2, ACC) * 8 + token_of
    acc = acc * gl.load(tokens_ptr + token_of, mask=token_of < M, other=0.0)
    finish(acc, bias_ptr, y_ptr, parts_ptr, counter_ptr, block, token0, M, N,
           ACTIVATION, HAS_BIAS, False, SPLIT, ACC)  # fmt: skip


def forward(
    x: Tensor, packed: Tensor, scales: Tensor, rows: int, bias: Tensor | None, activation: str
) -> Tensor:
    """Round x (M, K) with M > 0 and launch."""
    at = capability(x.device)
    native = at in NATIVE
    config = fp8_tokens_mma(x.shape[0], rows, x.shape[1], processors(x.device), at, native)
    order = "e4m3" if native else "f16"
    return launch(x, packed, scales, rows, bias, activation, config, order)


def launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    rows: int,
    bias: Tensor | None,
    activation: str,
    config: MmaConfig,
    order: str,
) -> Tensor:
    """`forward` with a given configuration, by tensor cores that multiply e4m3 or f16 values."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    tokens = ordered_tokens(x, order)
    product(tokens, packed, scales, x.shape[1], bias, y, activation, config, order).run()
    return y


def product(
    tokens: Tokens,
    packed: Tensor,
    scales: Tensor,
    columns: int,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
    config: MmaConfig,
    order: str,
) -> Launch:
    """The kernel's call for ordered tokens and y (M, N), real or on the meta device."""
    count, rows = y.shape
    lines, units, tails = line_blocks(rows, columns)
    codes = tokens.codes.view(torch.int32)
    per_split, splits = split_columns(units, config.splits)
    blocks = triton.cdiv(lines, config.warps * config.row_tiles)
    token_blocks = triton.cdiv(count, 8 * config.token_tiles)
    block = 8 * config.token_tiles, config.warps * config.row_tiles * ROWS
    room, counter = room_for_parts(y, token_blocks, blocks, splits, *block)
    return Launch(
        _mma24_fp8_fwd_kernel,
        (token_blocks, blocks, splits),
        (
            codes,
            tokens.scales,
            packed,
            scales,
            y if bias is None else bias,
            y,
            room,
            counter,
            codes.stride(0),
            count,
            rows,
            lines,
            packed.shape[1],
            units,
            tails,
            per_split,
        ),
        {
            "ORDER": order,
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "SPLIT": splits > 1,
            "NW": config.warps,
            "MT": config.row_tiles,
            "NT": config.token_tiles,
            "STAGES": config.stages,
        },
        num_warps=config.warps,
    )


def self_test(device: torch.device) -> str | None:
    """Compare with the expanded weight on small integers, where every sum is exact.

    Args:
        device: The CUDA device to test.

    Returns:
        None if all results are equal, else what differed.
    """
    from prunekernels.sparse.two_four.quantized.format import quantized24_pack

    random = torch.Generator().manual_seed(0)
    order = "e4m3" if capability(device) in NATIVE else "f16"
    for dtype, tokens, columns, splits in (
        (torch.bfloat16, 5, 1088, 3),
        (torch.float32, 20, 1216, 1),
    ):
        values = torch.randint(-8, 8, (200, columns), generator=random).to(torch.float8_e4m3fn)
        mask = torch.rand(200, columns // 4, 4, generator=random).argsort(2) < 2
        scales = torch.randint(1, 3, (200, 1), generator=random).float()
        mask = mask.view(200, -1)
        w = quantized24_pack(values, mask, scales, kind="2:4-fp8", dtype=dtype).to(device)
        # 7 is 448/64: with one in every token all small integers are e4m3 values
        x = torch.randint(-7, 8, (tokens, columns), generator=random)
        x[:, 3] = 7
        x = x.to(device, dtype)
        config = MmaConfig(2, 1 if tokens <= 8 else 4, 4, splits)
        got = launch(x, w.packed, w.scales, 200, None, "none", config, order)
        if problem := difference(got, x, w.to(dtype=torch.float32).to_dense()):
            return problem
    return None


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    native: Sequence[Arch] = (89, 120)
    return [
        *(
            _case("e4m3", torch.bfloat16, tokens, split, native)
            for tokens, split in ((1, True), (1, False), (16, True), (64, True))
        ),
        *(
            _case("f16", torch.bfloat16, tokens, split, (90,))
            for tokens, split in ((1, True), (1, False), (16, True), (32, True), (64, True))
        ),
        _case("e4m3", torch.float32, 64, True, (89,)),
        _case("f16", torch.float16, 64, True, (90,)),
    ]


def _case(
    order: str, dtype: torch.dtype, tokens: int, split: bool, archs: Sequence[Arch]
) -> KernelCase:
    rows, columns = 14336, 4096
    native = order == "e4m3"
    where = (142, (8, 9)) if native else (132, (9, 0))
    config = fp8_tokens_mma(tokens, rows, columns, *where, native)
    packed, scales, _ = case_parts(rows, columns, "2:4-fp8", 0, False)
    given = Tokens(meta((tokens, columns), torch.uint8), meta((tokens,), torch.float32))
    call = product(
        given,
        packed,
        scales,
        columns,
        meta((rows,), dtype, aligned=False),
        meta((tokens, rows), dtype),
        "none",
        config._replace(splits=4 if split else 1),
        order,
    )
    kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "fp32"}[dtype]
    opcode = "QMMA.SP.16864.F32.E4M3.E4M3" if native else "HMMA.SP.16832.F32"
    each = (4 if native else 8) * config.row_tiles * config.token_tiles
    return call.case(
        f"quantized24/fp8/{order}/{kind}/t{8 * config.token_tiles}" + "/split" * split,
        opcodes=(opcode, "LDSM", "LDGSTS"),
        elements_per_iteration=config.row_tiles * ROWS * 256,
        per_iteration=(opcode[:7], each),
        archs=archs,
    )
