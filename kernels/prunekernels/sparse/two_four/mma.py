"""2:4 matrix multiplication on NVIDIA's sparse tensor cores (`mma.sp`), for few to some tokens.

    y[m, n] = act(Σ_k x[m, k]·W[n, k] + b[n]),  or with two weights  silu(x·Wgᵀ)·(x·Wuᵀ)

Each warp of a program has its own tiles of 16 weight rows. The packed words already are
the operands of the instruction, so a warp loads the next unit of 256 columns from global memory
straight into registers while it multiplies the current one; x goes through a ring in shared memory
that the warps share. Columns may be split over programs: each stores its float32 part, and the
last to arrive adds the parts in their fixed order, so results are bitwise repeatable.

Triton has no sparse `dot`. Here one inline-assembly call is one instruction: the layout's last
dimension is the four accumulators of a lane, and all operands have four registers per lane.
Format: `two_four.layout`. Instruction: PTX ISA, `mma.sp::ordered_metadata.m16n8k32`.
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
from prunekernels.sparse.fragments import finish, x_layout, x_registers
from prunekernels.sparse.gluon_compat import barrier
from prunekernels.sparse.launching import difference, padded_rows, room_for_parts, split_columns
from prunekernels.sparse.two_four.expand import sparse24_unpack
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.layout import ROWS, line_blocks, packed_shape
from prunekernels.sparse.two_four.tuning import MmaConfig, sparse24_mma

#: Where the kernel compiles. It is right on an H200; the self-test decides on each.
CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))


@gluon.constexpr_function
def _mma_text(kind, selector):
    columns = 64 if kind == "e4m3" else 32
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{columns}.row.col.f32."
        f"{kind}.{kind}.f32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, "
        f"{{$12,$13,$14,$15}}, $16, {selector};"
    )


@gluon.jit
def _multiply(acc, a, b, e, SELECTOR: gl.constexpr, KIND: gl.constexpr, ACC: gl.constexpr):
    """acc + A·B. a: (tiles, 128) words, b: (8·token tiles, 16) words, e: (tiles, 32 or 128)."""
    a = gl.convert_layout(gl.reshape(a, [acc.shape[0], acc.shape[1], 1, 32, 4]), ACC)
    return multiply_fragments(acc, a, b, e, SELECTOR, KIND, ACC)


@gluon.jit
def multiply_fragments(acc, a, b, e, SELECTOR: gl.constexpr, KIND: gl.constexpr, ACC: gl.constexpr):
    """acc + A·B with A as the lanes hold it, (warps, row tiles, 1, 32, 4) in the layout ACC."""
    NW: gl.constexpr = acc.shape[0]
    MT: gl.constexpr = acc.shape[1]
    PER_LANE: gl.constexpr = e.shape[1] // 32
    b = x_registers(b, acc.shape[2], ACC)
    e = gl.convert_layout(gl.reshape(e, [NW, MT, 1, 32, PER_LANE]), ACC)
    return multiply_registers(acc, a, b, e, SELECTOR, KIND, ACC)


@gluon.jit
def multiply_registers(acc, a, b, e, SELECTOR: gl.constexpr, KIND: gl.constexpr, ACC: gl.constexpr):
    """acc + A·B of what the lanes hold, (warps, row tiles, token tiles, 32, registers) in ACC."""
    return gl.inline_asm_elementwise(
        _mma_text(KIND, SELECTOR),
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,0,1,2,3,r,r,r,r",
        [a, b, acc, e],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _unit(
    acc, a, meta, xs, w_ptrs, NEXT: gl.constexpr, KIND: gl.constexpr, ACC: gl.constexpr,
    X: gl.constexpr,
):  # fmt: skip
    """Multiply one unit of 256 columns held in registers; load the next if NEXT.

    a: 8 steps of (tiles, 128) value words; meta: (tiles, 128) metadata words;
    xs: (tokens, 128) words of x in shared memory; w_ptrs: (tiles, 128) pointers to the next unit.
    """
    TILES: gl.constexpr = meta.shape[0]
    even, odd = gl.split(gl.reshape(meta, [TILES, 32, 2, 2]))
    e0, e2 = gl.split(even)
    e1, e3 = gl.split(odd)
    e = (e0, e1, e2, e3)
    following = ()
    for step in gl.static_range(8):
        b = xs.slice(step * 16, 16, dim=1).load(X)
        acc = _multiply(acc, a[step], b, e[step // 2], step % 2, KIND, ACC)
        if NEXT:
            following = following + (gl.load(w_ptrs + step * 128),)  # noqa: RUF005
    if NEXT:
        a = following
        meta = gl.load(w_ptrs + 1024)
    return acc, a, meta


@gluon.jit(do_not_specialize=["M", "N", "lines", "units", "tails", "units_per_split"])
def _mma24_fwd_kernel(
    x_ptr,  # (M, columns padded to 64) as 32-bit words, rows stride_xm words apart
    packed_ptr,  # int32 (lines, words): the weight, or the gate's
    up_ptr,  # int32 (lines, words), read if GATED
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # as for `sum_parts`, if SPLIT
    counter_ptr,
    stride_xm,
    M,
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
    SPLIT: gl.constexpr,
    NW: gl.constexpr,  # warps
    MT: gl.constexpr,  # tiles of 16 rows per warp; gated: the gate's tile and the up's
    NT: gl.constexpr,  # tiles of 8 tokens
    STAGES: gl.constexpr,  # of the ring, a power of two
):
    TILES: gl.constexpr = NW * MT
    W: gl.constexpr = gl.BlockedLayout([MT, 4], [1, 32], [NW, 1], [1, 0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [NW, 1], [1, 0])
    X: gl.constexpr = x_layout(NT, NW)
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, MT, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
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
    if GATED:
        line = gl.minimum(block * NW + tile // 2, lines - 1).to(gl.int64)
        line_ptrs = gl.where(tile % 2 == 0, packed_ptr + line * words, up_ptr + line * words)
    else:
        line_ptrs = packed_ptr + gl.minimum(block * TILES + tile, lines - 1).to(gl.int64) * words
    acc = gl.zeros([NW, MT, NT, 32, 4], gl.float32, ACC)
    if count > 0:
        token = token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, COPY))[:, None]
        x_word = gl.arange(0, 128, gl.SliceLayout(0, COPY))[None, :]
        x_ok = token < M
        x_ptrs = x_ptr + token.to(gl.int64) * stride_xm + x_word
        ring = gl.allocate_shared_memory(gl.int32, [STAGES, 8 * NT, 128], RING)
        for stage in gl.static_range(STAGES - 1):
            # past the slice, and past the last unit, something readable that nobody uses
            at = gl.minimum(first + stage, units - 1) * 128
            async_copy.async_copy_global_to_shared(ring.index(stage), x_ptrs + at, mask=x_ok)
            async_copy.commit_group()
        w_ptrs = line_ptrs + first * 1152 + word
        a = ()
        for step in gl.static_range(8):
            a = a + (gl.load(w_ptrs + step * 128),)  # noqa: RUF005
        meta = gl.load(w_ptrs + 1024)
        for unit in range(0, count - 1):
            async_copy.wait_group(STAGES - 2)
            # every warp is done with the slot that is filled next
            barrier()
            ahead = unit + STAGES - 1
            at = gl.minimum(first + ahead, units - 1) * 128
            slot = ring.index(ahead & (STAGES - 1))
            async_copy.async_copy_global_to_shared(slot, x_ptrs + at, mask=x_ok)
            async_copy.commit_group()
            w_ptrs += 1152
            slot = ring.index(unit & (STAGES - 1))
            acc, a, meta = _unit(acc, a, meta, slot, w_ptrs, True, KIND, ACC, X)
        async_copy.wait_group(0)
        barrier()
        slot = ring.index((count - 1) & (STAGES - 1))
        acc, a, meta = _unit(acc, a, meta, slot, w_ptrs, False, KIND, ACC, X)

    if first + units_per_split >= units:
        token = token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, X))[:, None]
        x_word = gl.arange(0, 16, gl.SliceLayout(0, X))[None, :]
        x_ptrs = x_ptr + token.to(gl.int64) * stride_xm + units * 128 + x_word
        w_ptrs = line_ptrs + units * 1152
        for _ in range(0, tails):
            # one metadata word per lane, loaded for each of its four value words
            meta = gl.load(w_ptrs + 256 + word // 4)
            for step in gl.static_range(2):
                b = gl.load(x_ptrs + step * 16, mask=token < M, other=0)
                acc = _multiply(acc, gl.load(w_ptrs + step * 128 + word), b, meta, step, KIND, ACC)
            x_ptrs += 32
            w_ptrs += 288

    finish(acc, bias_ptr, y_ptr, parts_ptr, counter_ptr, block, token0, M, N,
           ACTIVATION, HAS_BIAS, GATED, SPLIT, ACC)  # fmt: skip


def forward(
    x: Tensor, packed: Tensor, up: Tensor | None, rows: int, bias: Tensor | None, activation: str
) -> Tensor:
    """Launch for x (M, K) with M > 0; `up` selects the gated form."""
    config = configuration(x, rows, up is not None)
    return launch(x, packed, up, rows, bias, activation, config)


def configuration(x: Tensor, rows: int, gated: bool) -> MmaConfig:
    """What the table says for x (M, K) and N = rows on the GPU that x is on."""
    device = x.device
    return sparse24_mma(x.shape[0], rows, x.shape[1], gated, processors(device), capability(device))


def prepared(
    x: Tensor, packed: Tensor, up: Tensor | None, rows: int, bias: Tensor | None, activation: str
) -> Launch | None:
    """`forward` as a call to keep, or None if x has to be copied first."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    config = configuration(x, rows, up is not None)
    call = product(x, packed, up, bias, y, activation, config)
    return call if call.arguments[0].data_ptr() == x.data_ptr() else None


def launch(
    x: Tensor,
    packed: Tensor,
    up: Tensor | None,
    rows: int,
    bias: Tensor | None,
    activation: str,
    config: MmaConfig,
) -> Tensor:
    """`forward` with a given configuration."""
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
    config: MmaConfig,
) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device."""
    tokens, rows = y.shape
    lines, units, tails = line_blocks(rows, x.shape[1])
    x = padded_rows(x, 256 * units + 64 * tails)
    per_split, splits = split_columns(units, config.splits)
    blocks = triton.cdiv(lines, config.warps * (1 if up is not None else config.row_tiles))
    token_blocks = triton.cdiv(tokens, 8 * config.token_tiles)
    block = 8 * config.token_tiles, config.warps * config.row_tiles * ROWS
    parts, counter = room_for_parts(y, token_blocks, blocks, splits, *block)
    return Launch(
        _mma24_fwd_kernel,
        (token_blocks, blocks, splits),
        (
            x.view(torch.int32),
            packed,
            packed if up is None else up,
            y if bias is None else bias,
            y,
            parts,
            counter,
            x.stride(0) // 2,
            tokens,
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
    random = torch.Generator().manual_seed(0)
    for dtype, tokens, splits in ((torch.bfloat16, 5, 3), (torch.float16, 20, 1)):
        groups = torch.randint(-2, 3, (200, 272, 4), generator=random)
        kept = torch.rand(200, 272, 4, generator=random).argsort(2) < 2
        weight = (groups * kept).view(200, -1).to(device, dtype)
        x = torch.randint(-3, 4, (tokens, 1088), generator=random).to(device, dtype)
        packed = sparse24_pack(weight).packed
        config = MmaConfig(2, 1 if tokens <= 8 else 4, 4, splits)
        got = launch(x, packed, None, 200, None, "none", config)
        dense = sparse24_unpack(packed, 200, 1088, dtype)
        if problem := difference(got, x, dense):
            return problem
    return None


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    every: Sequence[Arch] = (80, 89, 90)
    return [
        *(
            _case(kind, tokens, False, True, every)
            for kind in ("bf16", "f16")
            for tokens in (1, 64)
        ),
        *(_case("bf16", tokens, False, True, every) for tokens in (16, 32)),
        _case("bf16", 1, False, False, every),
        _case("bf16", 1, True, True, every),
        _case("bf16", 64, True, True, every),
        _case("bf16", 1, False, True, (120,)),
    ]


def _case(kind: str, tokens: int, gated: bool, split: bool, archs: Sequence[Arch]) -> KernelCase:
    rows, columns = 14336, 4096
    config = sparse24_mma(tokens, rows, columns, gated, 132)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    x, y = meta((tokens, columns), dtype), meta((tokens, rows), dtype)
    packed = meta(packed_shape(rows, columns, dtype), torch.int32)
    call = product(
        x,
        packed,
        packed if gated else None,
        None if gated else meta((rows,), dtype, aligned=False),
        y,
        "silu" if gated else "none",
        config._replace(splits=4 if split else 1),
    )
    return call.case(
        f"sparse24/mma_sp/{kind}/t{8 * config.token_tiles}" + "/gated" * gated + "/split" * split,
        opcodes=("HMMA.SP.16832.F32" + (".BF16" if kind == "bf16" else ""), "LDSM", "LDGSTS"),
        elements_per_iteration=config.row_tiles * ROWS * 256,
        per_iteration=("HMMA.SP", 8 * config.row_tiles * config.token_tiles),
        archs=archs,
    )
