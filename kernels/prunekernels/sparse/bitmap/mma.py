"""Bitmap matrix multiplication on NVIDIA's tensor cores, for few tokens: expand, multiply.

    y[m, n] = act(Σ_k x[m, k]·W[n, k] + b[n])

Four warps per program, each with a line of 16 weight rows, walk their columns in stages of 128.
The values of a stage and the x of all warps come through rings in shared memory (`cp.async`), the
bitmap words through registers. Per element there is a test, and a load if its bit is set. Where a
lane's values are, tensor cores find out, for each pair of elements that share an operand register
(`bitmap.addresses`).
Columns may be split over programs; the last to arrive adds the parts in their fixed order, so
results are bitwise repeatable.

Inline assembly names shared memory by Triton's symbol for it, so the ring must start there: the
kernel makes one allocation, a test sees that it is all there is, and a self-test decides per GPU.
Format: `bitmap.layout`. Instruction: PTX ISA, `mma.m16n8k16`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.runtime import capability, processors
from prunekernels.sparse.bitmap.addresses import (
    addresses,
    lane_masks,
    offsets,
    parts_of,
    quad_masks,
)
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.layout import line_blocks, meta_parts
from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig, bitmap_mma
from prunekernels.sparse.fragments import axis, finish, x_layout
from prunekernels.sparse.gluon_compat import barrier
from prunekernels.sparse.launching import difference, padded_rows, room_for_parts, split_columns
from prunekernels.sparse.stacking import ROWS

#: Where the kernel compiles. It has not run on a GPU yet: the self-test decides on each.
CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
WARPS = 4
#: Columns of a stage, and the bytes of its values if none is zero.
STAGE_K, STAGE_BYTES = 128, 4096


@gluon.constexpr_function
def _ring_slots(ring, tiles, token_tiles):
    """Slots of 2048·token_tiles bytes that x and the values of `tiles` lines take."""
    return ring + -(-ring * tiles * STAGE_BYTES // (2048 * token_tiles))


def ring_bytes(config: BitmapMmaConfig) -> int:
    """Bytes of shared memory that the rings take."""
    tiles = WARPS * config.row_tiles
    slots = _ring_slots(config.stages, tiles, config.token_tiles)
    return int(slots) * 2048 * config.token_tiles


@gluon.constexpr_function
def _mma_text(kind, half):
    b = "{$8,$9}" if half == 0 else "{$10,$11}"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {b}, {{$12,$13,$14,$15}};"
    )


@gluon.constexpr_function
def _expand_text(step):
    """$0..$3 = the lane's operand of a step: word $4; $8, $12, $16, $20: where each register's
    second value is, the first before it."""
    lines = ["{", ".reg .pred p;", ".reg .b32 lo, hi;"]
    for register in range(4):
        for half, offset in (("lo", -2), ("hi", 0)):
            bit = 8 * step + 2 * register + (half == "hi")
            # where the bit is not set, what the test left is the zero to multiply with
            lines += [
                f"and.b32 {half}, $4, {1 << bit};",
                f"setp.ne.b32 p, {half}, 0;",
                f"@p ld.shared.u16 {half}, [${8 + 4 * register} + {offset}];",
            ]
        lines.append(f"prmt.b32 ${register}, lo, hi, 0x5410;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _copy_text():
    """Copy 16 bytes from $1 to shared $3, and so on 512 bytes apart, while chunks $4 are left.

    The address of the fifth, $2, is not a sum that the assembler knows: offsets from $1 would not
    fit its instructions, and it would add anew for each.
    """
    lines = ["{", ".reg .pred p;"]
    for chunk in range(8):
        source = f"${1 + chunk // 4} + {512 * (chunk % 4)}"
        lines += [
            f"setp.gt.s32 p, $4, {32 * chunk};",
            f"@p cp.async.cg.shared.global [$3 + {512 * chunk}], [{source}], 16;",
        ]
    return "\n".join([*lines, "mov.b32 $0, 0;", "}"])


@gluon.jit
def _copy_values(values_ptr, begin, end, slot, LANES: gl.constexpr):
    """Start the copy of units begin .. end − 1 of each line to shared memory at `slot`.

    begin, end, slot: int32 (tiles, 32), the same for all lanes of a tile.
    """
    lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
    fifth = gl.inline_asm_elementwise(
        "or.b32 $0, $1, 128;", "=r,r", [lane], dtype=gl.int32, is_pure=True, pack=1
    )
    gl.inline_asm_elementwise(
        _copy_text(),
        "=r,l,l,r,r",
        [
            values_ptr + (begin + lane).to(gl.int64) * 4,
            values_ptr + (begin + fifth).to(gl.int64) * 4,
            slot + lane * 16,
            end - begin - lane,
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _to_registers(x, NW: gl.constexpr, MT: gl.constexpr, ACC: gl.constexpr):
    """A number of each lane and tile, (tiles, 32), beside the accumulators."""
    return gl.convert_layout(gl.reshape(x, [NW, MT, 1, 32, 1]), ACC)


@gluon.jit
def _multiply(acc, word, a0, a1, a2, a3, b, STEP: gl.constexpr, KIND: gl.constexpr,
              ACC: gl.constexpr):  # fmt: skip
    """acc + A·B for a step of 16 columns.

    word: (tiles, 32); a0 … a3: (tiles, 32), the addresses for the operand registers; b: (8·token
    tiles, 16) words of x, whose half STEP % 2 is used.
    """
    NW: gl.constexpr = acc.shape[0]
    MT: gl.constexpr = acc.shape[1]
    NT: gl.constexpr = acc.shape[2]
    a = gl.inline_asm_elementwise(
        _expand_text(STEP),
        "=&r,=&r,=&r,=&r" + ",r" * 24,
        [
            _to_registers(word, NW, MT, ACC),
            _to_registers(a0, NW, MT, ACC),
            _to_registers(a1, NW, MT, ACC),
            _to_registers(a2, NW, MT, ACC),
            _to_registers(a3, NW, MT, ACC),
            axis(4, 4, ACC),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )
    # word = 4·register + thread of the quad, token = quad
    b = gl.permute(gl.reshape(b, [NT, 8, 4, 4]), [0, 1, 3, 2])
    b = gl.convert_layout(gl.reshape(b, [1, 1, NT, 32, 4]), ACC)
    return gl.inline_asm_elementwise(
        _mma_text(KIND, STEP % 2),
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,0,1,2,3",
        [a, b, acc],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit(do_not_specialize=["M", "N", "lines", "stages", "per_split"])
def _bitmap_mma_fwd_kernel(
    x_ptr,  # (M, columns padded to 128) as 32-bit words, rows stride_xm words apart
    bitmap_ptr,  # int32 (lines, blocks, 32)
    starts_ptr,  # int32 (lines·blocks + 1,)
    values_ptr,  # the values as 32-bit words
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # as for `sum_parts`, if SPLIT
    counter_ptr,  # int32 (token blocks·row blocks), zero before and after, if SPLIT
    stride_xm,
    M,
    N,
    lines,
    blocks,
    stages,  # of 128 columns
    per_split,  # stages of a split
    KIND: gl.constexpr,  # "bf16" or "f16"
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SPLIT: gl.constexpr,
    NW: gl.constexpr,  # warps
    MT: gl.constexpr,  # lines per warp
    NT: gl.constexpr,  # tiles of 8 tokens
    RING: gl.constexpr,  # slots of the rings
    COUNT: gl.constexpr,  # tensor cores count bits, else they add bytes
):
    TILES: gl.constexpr = NW * MT
    LANES: gl.constexpr = gl.BlockedLayout([MT, 1], [1, 32], [NW, 1], [1, 0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [NW, 1], [1, 0])
    X: gl.constexpr = x_layout(NT, NW)
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, MT, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    # eight rows of 16-byte chunks, rotated: ldmatrix then meets every bank once
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    # slots of x first, then as many as the values fill
    X_BYTES: gl.constexpr = 2048 * NT
    SLOTS: gl.constexpr = _ring_slots(RING, TILES, NT)
    # blocks of tokens first: those that read the same rows of the weight run together
    block = gl.program_id(1)
    token0 = gl.program_id(0) * (8 * NT)
    first = gl.program_id(2) * per_split
    count = gl.minimum(per_split, stages - first)

    # tokens past the last are read as the last and not stored: a mask would live through the loop
    # in a predicate register, and the expansion fills all seven at once
    token = gl.minimum(token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, COPY))[:, None], M - 1)
    x_word = gl.arange(0, 64, gl.SliceLayout(0, COPY))[None, :]
    x_ptrs = x_ptr + token.to(gl.int64) * stride_xm + x_word
    memory = gl.allocate_shared_memory(gl.int32, [SLOTS, 8 * NT, 64], SWIZZLE)

    lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
    tile = gl.arange(0, TILES, gl.SliceLayout(1, LANES))[:, None]
    # lines past the last are read as the last and not stored
    line = gl.minimum(block * TILES + tile, lines - 1).to(gl.int64)
    word_ptrs = bitmap_ptr + line * (32 * blocks) + lane
    start_ptrs = starts_ptr + line * blocks + lane * 0
    values = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [lane], dtype=gl.int32, is_pure=True, pack=1
    )
    values += RING * X_BYTES + tile * 4096

    begin = gl.load(start_ptrs + first * 2)
    for ahead in gl.static_range(RING - 1):
        # past the slice there is nothing to copy; past the last stage x is read again
        at = gl.minimum(first + ahead, stages - 1)
        async_copy.async_copy_global_to_shared(memory.index(ahead), x_ptrs + at * 64)
        end = gl.load(start_ptrs + gl.minimum((first + ahead) * 2 + 2, blocks))
        _copy_values(values_ptr, begin, end, values + ahead * (TILES * 4096), LANES)
        async_copy.commit_group()
        begin = end
    end = gl.load(start_ptrs + gl.minimum((first + RING - 1) * 2 + 2, blocks))
    word0 = gl.load(word_ptrs + first * 64)
    word1 = gl.load(word_ptrs + first * 64 + 32, mask=first * 2 + 1 < blocks, other=0)
    units = gl.load(start_ptrs + first * 2 + 1) - gl.load(start_ptrs + first * 2)
    quads = quad_masks(lane, COUNT)
    lanes = (
        lane_masks(lane, 0, COUNT), lane_masks(lane, 1, COUNT),
        lane_masks(lane, 2, COUNT), lane_masks(lane, 3, COUNT),
    )  # fmt: skip
    acc = gl.zeros([NW, MT, NT, 32, 4], gl.float32, ACC)
    slot = 0
    for stage in range(first, first + count):
        async_copy.wait_group(RING - 2)
        # every warp is done with the slot that is filled next
        barrier()
        coming = stage + RING - 1
        free = gl.where(slot == 0, RING - 1, slot - 1)
        at = gl.minimum(coming, stages - 1)
        async_copy.async_copy_global_to_shared(memory.index(free), x_ptrs + at * 64)
        _copy_values(values_ptr, begin, end, values + free * (TILES * 4096), LANES)
        async_copy.commit_group()
        begin = end
        end = gl.load(start_ptrs + gl.minimum(coming * 2 + 4, blocks))
        xs = memory.index(slot)
        base0 = values + slot * (TILES * 4096)
        base1 = base0 + units * 16
        parts = parts_of(word0, word1, COUNT)
        numbers = offsets(parts, quads, COUNT)
        for step in gl.static_range(4):
            p0, p2, q0, q2, p1, p3, q1, q3 = addresses(
                numbers, parts, base0, base1, lanes[step], COUNT
            )
            if step % 2 == 0:
                b0 = xs.slice(8 * step, 16, dim=1).load(X)
                b1 = xs.slice(32 + 8 * step, 16, dim=1).load(X)
            acc = _multiply(acc, word0, p0, p1, p2, p3, b0, step, KIND, ACC)
            acc = _multiply(acc, word1, q0, q1, q2, q3, b1, step, KIND, ACC)
        following = gl.minimum(stage + 1, stages - 1)
        word0 = gl.load(word_ptrs + following * 64)
        word1 = gl.load(word_ptrs + following * 64 + 32, mask=following * 2 + 1 < blocks, other=0)
        units = gl.load(start_ptrs + following * 2 + 1) - gl.load(start_ptrs + following * 2)
        slot = gl.where(slot == RING - 1, 0, slot + 1)
    async_copy.wait_group(0)
    finish(acc, bias_ptr, y_ptr, parts_ptr, counter_ptr, block, token0, M, N,
           ACTIVATION, HAS_BIAS, False, SPLIT, ACC)  # fmt: skip


def configuration(x: Tensor, rows: int) -> BitmapMmaConfig:
    """What the table says for x (M, K) and N = rows on the GPU that x is on."""
    tokens, columns = x.shape
    return bitmap_mma(tokens, rows, columns, processors(x.device), capability(x.device))


def prepared(
    x: Tensor,
    bitmap: Tensor,
    starts: Tensor,
    values: Tensor,
    rows: int,
    bias: Tensor | None,
    activation: str,
) -> Launch | None:
    """`forward` as a call to keep, or None if x has to be copied first."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    call = product(x, bitmap, starts, values, bias, y, activation, configuration(x, rows))
    return call if call.arguments[0].data_ptr() == x.data_ptr() else None


def forward(
    x: Tensor,
    bitmap: Tensor,
    starts: Tensor,
    values: Tensor,
    rows: int,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Launch for x (M, K) with M > 0."""
    config = configuration(x, rows)
    return launch(x, bitmap, starts, values, rows, bias, activation, config)


def launch(
    x: Tensor,
    bitmap: Tensor,
    starts: Tensor,
    values: Tensor,
    rows: int,
    bias: Tensor | None,
    activation: str,
    config: BitmapMmaConfig,
) -> Tensor:
    """`forward` with a given configuration."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    product(x, bitmap, starts, values, bias, y, activation, config).run()
    return y


def product(
    x: Tensor,
    bitmap: Tensor,
    starts: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
    config: BitmapMmaConfig,
) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device."""
    (tokens, columns), rows = x.shape, y.shape[1]
    lines, blocks = line_blocks(rows, columns)
    stages = triton.cdiv(columns, STAGE_K)
    x = padded_rows(x, STAGE_K * stages)
    per_split, splits = split_columns(stages, config.splits)
    row_blocks = triton.cdiv(lines, WARPS * config.row_tiles)
    token_blocks = triton.cdiv(tokens, 8 * config.token_tiles)
    block = 8 * config.token_tiles, WARPS * config.row_tiles * ROWS
    parts, counter = room_for_parts(y, token_blocks, row_blocks, splits, *block)
    return Launch(
        _bitmap_mma_fwd_kernel,
        (token_blocks, row_blocks, splits),
        (
            x.view(torch.int32),
            bitmap,
            starts,
            values.view(torch.int32),
            y if bias is None else bias,
            y,
            parts,
            counter,
            x.stride(0) // 2,
            tokens,
            rows,
            lines,
            blocks,
            stages,
            per_split,
        ),
        {
            "KIND": "bf16" if x.dtype == torch.bfloat16 else "f16",
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "SPLIT": splits > 1,
            "NW": WARPS,
            "MT": config.row_tiles,
            "NT": config.token_tiles,
            "RING": config.stages,
            "COUNT": config.count_bits,
        },
        num_warps=WARPS,
    )


def self_test(device: torch.device) -> str | None:
    """Compare with the dense product on small integers, where every sum is exact.

    Args:
        device: The CUDA device to test.

    Returns:
        None if all results are equal, else what differed.
    """
    random = torch.Generator().manual_seed(0)
    for dtype, tokens, splits in ((torch.bfloat16, 5, 3), (torch.float16, 20, 1)):
        weight = torch.randint(-2, 3, (200, 1088), generator=random)
        # rows of all sparsities, from empty to full
        weight *= torch.rand(200, 1088, generator=random) < torch.linspace(0, 1, 200)[:, None]
        weight = weight.to(device, dtype)
        x = torch.randint(-2, 3, (tokens, 1088), generator=random).to(device, dtype)
        packed = bitmap_pack(weight)
        config = configuration(x, 200)._replace(splits=splits)
        parts = packed.bitmap, packed.starts, packed.values, 200, None, "none", config
        if problem := difference(launch(x, *parts), x, weight):
            return problem
    return None


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    every = (80, 89, 90)
    return [
        *(_case(kind, tokens, True, every) for kind in ("bf16", "f16") for tokens in (1, 64)),
        *(_case("bf16", tokens, True, every) for tokens in (16, 32)),
        _case("bf16", 1, False, every),
        *(_case("bf16", tokens, True, (100, 120)) for tokens in (1, 64)),
    ]


def _case(kind: str, tokens: int, split: bool, archs: Sequence[int]) -> KernelCase:
    rows, columns = 14336, 4096
    config = bitmap_mma(tokens, rows, columns, 132, divmod(archs[0], 10))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    call = product(
        meta((tokens, columns), dtype),
        *meta_parts(rows, columns, dtype),
        meta((rows,), dtype, aligned=False),
        meta((tokens, rows), dtype),
        "none",
        config if split else config._replace(splits=1),
    )
    return call.case(
        f"bitmap/mma/{kind}/t{8 * config.token_tiles}{'/split' * split}",
        opcodes=("HMMA.16816.F32" + (".BF16" if kind == "bf16" else ""), "LDSM", "LDGSTS"),
        elements_per_iteration=config.row_tiles * ROWS * STAGE_K,
        per_iteration=("HMMA.16816", 8 * config.row_tiles * config.token_tiles),
        archs=archs,
    )
