"""Bitmap matrix multiplication on NVIDIA's tensor cores, for few tokens: expand, multiply.

    y[m, n] = act(Σ_k x[m, k]·W[n, k] + b[n])

Each warp walks its columns of a line of 16 weight rows in stages of 128, one record each, by a ring
of its own (`bitmap.records`): no barrier and no shared x stand between it and the memory. x comes
from the L1 cache by 16-byte loads: the format puts a lane's columns side by side. For each element
there is a test, and a load if its bit is set; where a lane's values are, tensor cores find out
(`bitmap.addresses`). The warps of a program share the columns of a line and add up in shared
memory, in order. Columns may be split over programs too; the last to arrive adds the parts in their
fixed order, so results are bitwise repeatable.

The gated form multiplies with gate and up in one launch, half of the warps for each.

A record that is larger than the slots would be cut: `chunks` says how large they are, and results
are NaN where it is too small. Inline assembly names shared memory by Triton's symbol for it: the
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

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.runtime import capability, processors
from prunekernels.sparse.bitmap.addresses import (
    addresses,
    bases,
    kept,
    lane_masks,
    offsets,
    quad_masks,
    run_masks,
)
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.layout import TILE_K, lines_tiles, meta_parts
from prunekernels.sparse.bitmap.records import arrived, copy, make_barriers, say, slot_bytes
from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig, bitmap_mma
from prunekernels.sparse.fragments import axis, dense_text, finish
from prunekernels.sparse.gluon_compat import barrier
from prunekernels.sparse.launching import difference, padded_rows, room_for_parts, split_columns
from prunekernels.sparse.stacking import ROWS

#: Where the kernel compiles: Blackwell's tensor cores do not count bits. It has not run on a GPU
#: yet: the self-test decides on each.
CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0))


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
        # a multiplication: other units are busier
        lines.append(f"mad.lo.u32 ${register}, hi, 65536, lo;")
    return "\n".join([*lines, "}"])


@gluon.jit
def _to_registers(x, ACC: gl.constexpr):
    """A number of each lane, (warps, 32), beside the accumulators."""
    return gl.convert_layout(gl.reshape(x, [x.shape[0], 1, 1, 32, 1]), ACC)


@gluon.jit
def _multiply(acc, word, a0, a1, a2, a3, b, STEP: gl.constexpr, KIND: gl.constexpr,
              ACC: gl.constexpr):  # fmt: skip
    """acc + A·B for a step of 16 columns.

    word: (warps, 32); a0 … a3: (warps, 32), the addresses for the operand registers; b: the words
    of x of two steps, beside the accumulators, of which half STEP % 2 is used.
    """
    a = gl.inline_asm_elementwise(
        _expand_text(STEP),
        "=&r,=&r,=&r,=&r" + ",r" * 24,
        [
            _to_registers(word, ACC),
            _to_registers(a0, ACC),
            _to_registers(a1, ACC),
            _to_registers(a2, ACC),
            _to_registers(a3, ACC),
            axis(4, 4, ACC),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )
    return gl.inline_asm_elementwise(
        dense_text(KIND, STEP % 2),
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,0,1,2,3",
        [a, b, acc],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _largest(start_ptrs, first, limit, per_warp, lane):
    """The most units of a record of the warp's range, (warps, 32), the same in all lanes."""
    units = first * 0
    for ahead in range(0, per_warp, 32):
        begin = gl.load(start_ptrs + gl.minimum(first + ahead + lane, limit))
        end = gl.load(start_ptrs + gl.minimum(first + ahead + lane + 1, limit))
        units = gl.maximum(units, end - begin)
    return gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, -1;", "=r,r", [units], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _added(room, FIRST: gl.constexpr, COUNT: gl.constexpr, NT: gl.constexpr, NW: gl.constexpr):
    """Sum of COUNT warps' accumulators in shared memory, in order: float32 (NT, 128)."""
    PART: gl.constexpr = gl.BlockedLayout([NT, 4], [1, 32], [1, NW], [1, 0])
    total = gl.zeros([NT, 128], gl.float32, PART)
    for other in gl.static_range(FIRST, FIRST + COUNT):
        total += room.slice(other * NT, NT, dim=0).load(PART)
    return total


@gluon.jit(do_not_specialize=["M", "N", "stages", "per_warp"])
def _bitmap_mma_fwd_kernel(
    x_ptr,  # (M, columns padded to 128) as 32-bit words, rows stride_xm words apart
    records_ptr,  # as 32-bit words
    starts_ptr,  # int32 (lines·stages + 1,)
    up_records_ptr,  # the same of a second weight, read if GATED
    up_starts_ptr,
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # as for `sum_parts`, if SPLIT
    counter_ptr,  # int32 (token blocks·lines), zero before and after, if SPLIT
    stride_xm,
    M,
    N,
    stages,  # of 128 columns
    per_warp,  # stages of a warp
    KIND: gl.constexpr,  # "bf16" or "f16"
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,  # y = act(gate)·up: each has half of the warps
    SPLIT: gl.constexpr,
    NW: gl.constexpr,  # warps, which share the columns
    NT: gl.constexpr,  # tiles of 8 tokens
    RING: gl.constexpr,  # slots, 2 or 3
    CHUNKS: gl.constexpr,  # of 512 bytes: room for a record
    EVEN: gl.constexpr,  # all warps have per_warp stages
    BULK: gl.constexpr,  # copies by the engine (9.0 and later), else by the warp
    DEPENDENT: gl.constexpr,  # starts while the kernel before ends (9.0 and later)
):
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [NW, 1], [1, 0])
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, 1, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SLOT: gl.constexpr = slot_bytes(CHUNKS)
    ROOM: gl.constexpr = (RING * SLOT + 512 * NT - 1) // (512 * NT)
    SHARE: gl.constexpr = NW // 2 if GATED else NW
    token0 = gl.program_id(0) * (8 * NT)
    line = gl.program_id(1)
    memory = gl.allocate_shared_memory(gl.float32, [ROOM, NW * NT, 128], FLAT)

    # what is the same in all lanes stays in each lane's registers: a move to the uniform ones would
    # wait for loads
    lane = kept(gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :])
    zero = lane >> 5
    if DEPENDENT:
        say("griddepcontrol.launch_dependents;", lane)
    warp = gl.arange(0, NW, gl.SliceLayout(1, LANES))[:, None]
    first = (gl.program_id(2) * SHARE + warp % SHARE) * per_warp + zero
    # where the warp's range ends
    limit = gl.minimum(stages, first + per_warp)
    count = gl.minimum(per_warp, stages - gl.program_id(2) * (SHARE * per_warp))

    if GATED:
        records_ptr = gl.where(warp < SHARE, records_ptr, up_records_ptr)
        starts_ptr = gl.where(warp < SHARE, starts_ptr, up_starts_ptr)
    start_ptrs = starts_ptr + line.to(gl.int64) * stages + zero
    base = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [lane], dtype=gl.int32, is_pure=True, pack=1
    )
    base += warp * (RING * SLOT) + zero

    # x: lane 4·g + t reads the columns 32·p + 8·t … of token g, in pieces of 8. Tokens past the
    # last are read as the last and not stored
    quad = axis(32, 3, ACC)
    token = gl.minimum(token0 + axis(NT, 2, ACC) * 8 + quad // 4, M - 1)
    stage = (gl.program_id(2) * SHARE + axis(NW, 0, ACC) % SHARE) * per_warp
    xs = x_ptr + token.to(gl.int64) * stride_xm + quad % 4 * 4 + axis(4, 4, ACC)
    xs += gl.minimum(stage, stages - 1) * 64

    begin0 = gl.load(start_ptrs + gl.minimum(first, limit))
    begin1 = gl.load(start_ptrs + gl.minimum(first + 1, limit))
    begin2 = gl.load(start_ptrs + gl.minimum(first + 2, limit))
    begin3 = gl.load(start_ptrs + gl.minimum(first + 3, limit))
    slot = base
    if BULK:
        make_barriers(lane, base, RING, CHUNKS)
    copy(records_ptr, begin0, begin1, base, lane, CHUNKS, BULK)
    if RING == 3:
        copy(records_ptr, begin1, begin2, base + SLOT, lane, CHUNKS, BULK)
    # a record that does not fit is cut: nothing of the range is read, and its sums are made NaN
    fits = _largest(start_ptrs, first, limit, per_warp, lane) <= 32 * CHUNKS
    read = kept(gl.where(fits, -1, 0))
    if DEPENDENT:
        # nothing of the kernel before is read, and nothing written, above
        say("griddepcontrol.wait;", lane)
    phase = zero + warp * 0
    last = base + (RING - 1) * SLOT
    free = last
    at = first + RING + 1
    quads = quad_masks(lane)
    runs = run_masks(lane, 0), run_masks(lane, 1), run_masks(lane, 2), run_masks(lane, 3)
    lanes = lane_masks(lane)
    acc = gl.zeros([NW, 1, NT, 32, 4], gl.float32, ACC)
    for _ in range(0, count):
        record = slot + (begin0 & 7) * 16
        words = arrived(record, slot, lane, phase, RING - 2, CHUNKS, BULK)
        # every lane is done with the slot that is filled next
        if RING == 2:
            copy(records_ptr, begin1, begin2, free, lane, CHUNKS, BULK)
        else:
            copy(records_ptr, begin2, begin3, free, lane, CHUNKS, BULK)
        if BULK:
            # of the next slot: another one when the ring starts again
            phase = gl.where(slot == last, phase ^ 1, phase)
        coming = gl.load(start_ptrs + gl.minimum(at, limit))
        at += 1
        word0 = words[0] & read
        word1 = words[1] & read
        if not EVEN:
            # past the end of the range nothing is copied, and nothing must be added
            used = begin1 > begin0
            word0 = gl.where(used, word0, 0)
            word1 = gl.where(used, word1, 0)
        # two tiles of tokens leave no registers for what is hidden
        starts = bases(word0, record + 256, zero, NT == 1)
        numbers = offsets(word0, word1, quads, lanes)
        for step in gl.static_range(4):
            p0, p2, q0, q2, p1, p3, q1, q3 = addresses(
                numbers, words, starts, runs[step], lanes, step
            )
            if step % 2 == 0:
                b0 = gl.load(xs + 8 * step)
                b1 = gl.load(xs + 32 + 8 * step)
            acc = _multiply(acc, word0, p0, p1, p2, p3, b0, step, KIND, ACC)
            acc = _multiply(acc, word1, q0, q1, q2, q3, b1, step, KIND, ACC)
        if EVEN:
            xs += 64
        else:
            stage += 1
            xs += gl.where(stage < stages, 64, 0)
        if RING == 2:
            free, slot = slot, free
        else:
            free = slot
            slot = gl.where(slot == last, base, slot + SLOT)
        begin0 = begin1
        begin1 = begin2
        if RING == 2:
            begin2 = coming
        else:
            begin2 = begin3
            begin3 = coming
    # bulk copies have all been waited for: past the range nothing is copied
    say("cp.async.wait_group 0;", lane)
    acc = gl.where(_to_registers(read, ACC) == 0, float("nan"), acc)
    # every lane is done with its warp's ring: the warps' sums meet there
    if NW > 1:
        barrier()
    else:
        say("bar.warp.sync -1;", lane)
    # by one warp too: without a store there would be no allocation
    room = memory.index(0)
    room.store(gl.reshape(acc, [NW * NT, 128]))
    if NW > 1:
        ONE: gl.constexpr = gl.BlockedLayout(
            [1, 2 if GATED else 1, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
        )
        total = _added(room, 0, SHARE, NT, NW)
        if GATED:
            total = gl.join(total, _added(room, SHARE, SHARE, NT, NW))
            total = gl.permute(gl.reshape(total, [1, NT, 32, 4, 2]), [0, 4, 1, 2, 3])
        else:
            total = gl.reshape(total, [1, 1, NT, 32, 4])
        acc = gl.convert_layout(total, ONE)
    finish(acc, bias_ptr, y_ptr, parts_ptr, counter_ptr, line, token0, M, N,
           ACTIVATION, HAS_BIAS, GATED, SPLIT, ACC if NW == 1 else ONE)  # fmt: skip


def configuration(x: Tensor, rows: int, chunks: int, gated: bool = False) -> BitmapMmaConfig:
    """What the table says for x (M, K) and N = rows on the GPU that x is on."""
    tokens, columns = x.shape
    where = processors(x.device), capability(x.device)
    return bitmap_mma(tokens, rows, columns, chunks, *where, gated=gated)


def prepared(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    rows: int,
    bias: Tensor | None,
    activation: str,
    up: tuple[Tensor, Tensor] | None = None,
) -> Launch | None:
    """`forward` as a call to keep, or None if x has to be copied first."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    config = configuration(x, rows, chunks, up is not None)
    call = product(x, records, starts, chunks, bias, y, activation, config, up)
    return call if call.arguments[0].data_ptr() == x.data_ptr() else None


def forward(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    rows: int,
    bias: Tensor | None,
    activation: str,
    up: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Launch for x (M, K) with M > 0.

    up: records and starts of a second weight, whose records take as many chunks at most; the
    result is then act(x·Wᵀ)·(x·Wuᵀ), without bias.
    """
    config = configuration(x, rows, chunks, up is not None)
    return launch(x, records, starts, chunks, rows, bias, activation, config, up)


def launch(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    rows: int,
    bias: Tensor | None,
    activation: str,
    config: BitmapMmaConfig,
    up: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`forward` with a given configuration."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    product(x, records, starts, chunks, bias, y, activation, config, up).run()
    return y


def product(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
    config: BitmapMmaConfig,
    up: tuple[Tensor, Tensor] | None = None,
) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device."""
    (tokens, columns), rows = x.shape, y.shape[1]
    lines, stages = lines_tiles(rows, columns)
    warps, token_tiles, gated = config.warps, config.token_tiles, up is not None
    x = padded_rows(x, TILE_K * stages)
    share = warps // 2 if gated else warps
    per_warp, _ = split_columns(stages, config.splits * share)
    splits = triton.cdiv(stages, per_warp * share)
    token_blocks = triton.cdiv(tokens, 8 * token_tiles)
    block = 8 * token_tiles, 2 * ROWS if gated else ROWS
    parts, counter = room_for_parts(y, token_blocks, lines, splits, *block)
    options = {"maxnreg": config.registers} if config.registers else {}
    if config.dependent:
        options["launch_pdl"] = True
    return Launch(
        _bitmap_mma_fwd_kernel,
        (token_blocks, lines, splits),
        (
            x.view(torch.int32),
            records,
            starts,
            *(up or (records, starts)),
            y if bias is None else bias,
            y,
            parts,
            counter,
            x.stride(0) // 2,
            tokens,
            rows,
            stages,
            per_warp,
        ),
        {
            "KIND": "bf16" if x.dtype == torch.bfloat16 else "f16",
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "GATED": gated,
            "SPLIT": splits > 1,
            "NW": warps,
            "NT": token_tiles,
            "RING": config.slots,
            "CHUNKS": chunks,
            "EVEN": share * splits * per_warp == stages,
            "BULK": config.bulk,
            "DEPENDENT": config.dependent,
        },
        num_warps=warps,
        options=options,
    )


def self_test(device: torch.device) -> str | None:
    """Compare with the dense product on small integers, where every sum is exact.

    Args:
        device: The CUDA device to test.

    Returns:
        None if all results are equal, else what differed.
    """
    random = torch.Generator().manual_seed(0)
    for dtype, tokens, splits in ((torch.bfloat16, 5, 2), (torch.float16, 20, 1)):
        weight = torch.randint(-2, 3, (192, 1088), generator=random)
        # rows of all sparsities, from empty to full
        weight *= torch.rand(192, 1088, generator=random) < torch.linspace(0, 1, 192)[:, None]
        weight = weight.to(device, dtype)
        x = torch.randint(-2, 3, (tokens, 1088), generator=random).to(device, dtype)
        packed = bitmap_pack(weight)
        parts = packed.records, packed.starts, packed.chunks
        config = configuration(x, 192, packed.chunks)._replace(splits=splits)
        if problem := difference(launch(x, *parts, 192, None, "none", config), x, weight):
            return problem
        config = configuration(x, 192, packed.chunks, gated=True)._replace(splits=splits)
        got = launch(x, *parts, 192, None, "relu", config, parts[:2])
        half = x.cpu().double() @ weight.cpu().double().T
        if not torch.equal(got.cpu(), (half.relu() * half).to(dtype)):
            return f"results of the gated form differ ({dtype}, {tokens} tokens)"
    return None


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU: at 50 % zeros, unless they say."""
    every = (80, 89, 90)
    one = bitmap_mma(1, 14336, 4096, 5, 132, (9, 0))
    return [
        _case("bf16", 1, archs=every),
        _case("f16", 1, archs=every),
        *(_case("bf16", tokens, archs=every) for tokens in (16, 32)),
        _case("bf16", 1, "chunks4", chunks=4),
        _case("bf16", 1, "chunks9", chunks=9),
        _case("bf16", 1, "gated", gated=True),
        _case("bf16", 1, "split ragged", one._replace(splits=2), columns=4224),
        _case("bf16", 1, "bulk", one._replace(bulk=True)),
        _case("bf16", 1, "dependent", one._replace(dependent=True)),
    ]


def _case(
    kind: str,
    tokens: int,
    what: str = "",
    config: BitmapMmaConfig | None = None,
    *,
    chunks: int = 5,
    gated: bool = False,
    columns: int = 4096,
    archs: Sequence[int] = (90,),
) -> KernelCase:
    rows = 14336
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    config = config or bitmap_mma(tokens, rows, columns, chunks, 132, (9, 0), gated=gated)
    parts = meta_parts(rows, columns)
    call = product(
        meta((tokens, columns), dtype),
        *parts,
        chunks,
        None,
        meta((tokens, rows), dtype),
        "silu" if gated else "none",
        config,
        parts if gated else None,
    )
    return call.case(
        "/".join([f"bitmap/mma/{kind}/t{8 * config.token_tiles}", *what.split()]),
        opcodes=("HMMA.16816.F32", "LDG.E.128", "UBLKCP" if config.bulk else "LDGSTS"),
        # bulk copies are a loop of their own, which would be counted
        elements_per_iteration=0 if config.bulk else ROWS * TILE_K,
        per_iteration=("HMMA", 8 * config.token_tiles),
        archs=archs,
    )
