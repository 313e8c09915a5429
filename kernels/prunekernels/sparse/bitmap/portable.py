"""Portable bitmap matrix multiplication in plain Triton: expand in registers, then `tl.dot`.

    y[m, n] = act(Σ_k x[m, k]·W[n, k] + b[n])

One program makes BLOCK_M tokens × BLOCK_N rows and walks its share of K in blocks of 64 columns,
in order. Where columns are shared between programs, each stores its float32 part and a second
kernel adds the parts in their order: results are bitwise repeatable. Runs on every GPU that Triton
supports and in the interpreter. Format: `bitmap.layout`.

A run's first value lies behind those of the runs before and of the lanes before: both counts come
from the bitmap words, four runs at once in the bytes of one sum. Within a lane a multiplication
counts: with the eight bits b₀ … b₇ of a step in the nibbles of z, nibble i of z·(16 + 16² + …) is
b₀ + … + bᵢ₋₁.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.runtime import interpreting
from prunekernels.sparse.bitmap.layout import integer, lines_tiles, meta_parts
from prunekernels.sparse.bitmap.tuning import bitmap_portable, bitmap_splits
from prunekernels.sparse.epilogue import activate, operand


@triton.jit
def _element(ptrs, nibbles, before, INDEX: tl.constexpr):
    """Bits of element INDEX of each lane and step, or zero."""
    return tl.load(ptrs + (before >> 4 * INDEX & 15), mask=(nibbles >> 4 * INDEX & 1) != 0, other=0)


@triton.jit
def _counts(word):
    """How many bits each run of a word has, as bytes, of steps: the first runs and the second."""
    count = word - (word >> 1 & 0x55555555)
    count = (count & 0x33333333) + (count >> 2 & 0x33333333)
    return count & 0x0F0F0F0F, count >> 4 & 0x0F0F0F0F


@triton.jit
def _decompress(words_ptr, starts_ptr, values_ptr, line, tiles, block, BLOCK_N: tl.constexpr):
    """Bits of columns 64·block .. + 63 of BLOCK_N rows, int16 or int32 (BLOCK_N, 64).

    line: int64 (BLOCK_N / 16,), the packed line of every 16 rows.
    """
    LINES: tl.constexpr = BLOCK_N // 16
    # values in a unit of 16 bytes
    UNIT: tl.constexpr = 128 // values_ptr.dtype.element_ty.primitive_bitwidth
    unit = tl.load(starts_ptr + line * tiles + block // 2).to(tl.int64)
    word_ptrs = words_ptr + unit[:, None] * 4 + tl.arange(0, 32)[None, :] * 2
    word = tl.load(word_ptrs + block % 2)
    count0, count1 = _counts(word)
    # the values of block 1 are behind those of block 0
    other0, other1 = _counts(tl.load(word_ptrs))
    other = tl.sum(((other0 + other1) * 0x01010101) >> 24, 1) * (block % 2)
    start = (unit + 16) * UNIT + other
    # a run has at most 32·4 values: bytes do not run over
    lanes0 = tl.cumsum(count0, 1) - count0
    lanes1 = tl.cumsum(count1, 1) - count1
    sum0 = tl.sum(count0, 1)[:, None]
    sum1 = tl.sum(count1, 1)[:, None]
    step = tl.arange(0, 4)[None, :]
    steps = tl.zeros((LINES, 4), tl.int32)
    for s in tl.static_range(3):
        both = (sum0 >> 8 * s & 255) + (sum1 >> 8 * s & 255)
        steps += tl.where(step > s, both, 0)
    step_start = start[:, None] + steps
    shift = 8 * step[:, None, :]
    first0 = step_start[:, None, :] + (lanes0[:, :, None] >> shift & 255)
    # counting goes on from the first run to the second
    behind0 = (step_start + (sum0 >> 8 * step & 255))[:, None, :]
    first1 = behind0 + (lanes1[:, :, None] >> shift & 255) - (count0[:, :, None] >> shift & 255)
    # eight bits to eight nibbles
    nibbles = word[:, :, None] >> shift & 255
    nibbles = (nibbles | nibbles << 12) & 0x000F000F
    nibbles = (nibbles | nibbles << 6) & 0x03030303
    nibbles = (nibbles | nibbles << 3) & 0x11111111
    before = nibbles * 0x11111110
    ptrs0 = values_ptr + first0
    ptrs1 = values_ptr + first1
    # joined, not broadcast: a thread then holds the eight elements of a lane and step
    a0 = tl.join(_element(ptrs0, nibbles, before, 0), _element(ptrs0, nibbles, before, 1))
    a1 = tl.join(_element(ptrs0, nibbles, before, 2), _element(ptrs0, nibbles, before, 3))
    a2 = tl.join(_element(ptrs1, nibbles, before, 4), _element(ptrs1, nibbles, before, 5))
    a3 = tl.join(_element(ptrs1, nibbles, before, 6), _element(ptrs1, nibbles, before, 7))
    bits = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    # (line, g, t, p, s, c, h, u) to row = (line, h, g), column = (p, t, s, u, c)
    bits = tl.reshape(bits, (LINES, 8, 4, 2, 2, 2, 2, 2))
    return tl.reshape(tl.permute(bits, (0, 6, 1, 3, 2, 4, 7, 5)), (BLOCK_N, 64))


@triton.jit(do_not_specialize=["N", "lines", "tiles"])
def _expand_kernel(
    words_ptr,  # the records as 32-bit words
    starts_ptr,  # int32 (lines·tiles + 1,)
    values_ptr,  # the records as the bits of values, int16 or int32
    dense_ptr,  # the bits of the dense weight, int16 or int32 (N, K), contiguous
    N,
    K,
    lines,
    tiles,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = block * 64 + tl.arange(0, 64)
    line = tl.program_id(1).to(tl.int64) * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
    line = tl.where(line < lines, line, 0)
    bits = _decompress(words_ptr, starts_ptr, values_ptr, line, tiles, block, BLOCK_N)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(dense_ptr + offs_n[:, None] * K + offs_k[None, :], bits, mask=mask)


@triton.jit(do_not_specialize=["M", "N", "lines", "tiles", "blocks", "per_split"])
def _bitmap_fwd_kernel(
    x_ptr,  # (M, K), strides stride_xm, stride_xk
    words_ptr,  # the records as 32-bit words
    starts_ptr,  # int32 (lines·tiles + 1,)
    values_ptr,  # the records as the bits of values, int16 or int32
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous; float32 (splits, M, N) if SPLIT
    stride_xm: tl.int64,
    stride_xk,
    M,
    N,
    K,
    lines,
    tiles,
    blocks,  # of 64 columns
    per_split,  # blocks of a split
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,  # store the sum, for `_finish_kernel`
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    # lines past the last read line 0 and are not stored
    line = tl.program_id(0).to(tl.int64) * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
    line = tl.where(line < lines, line, 0)
    first = tl.program_id(2) * per_split
    last = tl.minimum(first + per_split, blocks)
    offs_k = tl.arange(0, 64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    x_ptrs += first.to(tl.int64) * 64 * stride_xk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, last):
        mask = mask_m[:, None] & (block * 64 + offs_k < K)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        x_ptrs += 64 * stride_xk
        bits = _decompress(words_ptr, starts_ptr, values_ptr, line, tiles, block, BLOCK_N)
        w = operand(bits, dtype, UPCAST)
        if UPCAST:
            x = x.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    if SPLIT:
        y_ptrs += tl.program_id(2).to(tl.int64) * M * N
    y = activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y, mask=mask_m[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _finish_kernel(
    parts_ptr,  # float32 (splits, M, N)
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    size,  # M·N
    N,
    splits,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        acc += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        parts_ptr += size.to(tl.int64)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    rows: int,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Launch for x (M, K) with M > 0; `chunks` does not matter here."""
    tokens, columns = x.shape
    config = bitmap_portable(tokens, x.dtype.itemsize)
    programs = triton.cdiv(rows, config.block_n) * triton.cdiv(tokens, config.block_m)
    splits = bitmap_splits(programs, triton.cdiv(columns, 64))
    return launch(x, records, starts, rows, bias, activation, splits)


def launch(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    rows: int,
    bias: Tensor | None,
    activation: str,
    splits: int,
) -> Tensor:
    """`forward` with the columns shared by up to `splits` programs."""
    tokens = x.shape[0]
    blocks = triton.cdiv(x.shape[1], 64)
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if splits == 1:
        product(x, records, starts, bias, y, activation).run()
        return y
    sums = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    product(x, records, starts, None, sums, "none").run()
    added(sums, bias, y, activation).run()
    return y


def product(
    x: Tensor, records: Tensor, starts: Tensor, bias: Tensor | None, out: Tensor, activation: str
) -> Launch:
    """The kernel's call for x (M, K), real or on the meta device.

    `out` is y (M, N), or float32 (splits, M, N) sums of splits that `added` adds.
    """
    (tokens, columns), rows = x.shape, out.shape[-1]
    blocks = triton.cdiv(columns, 64)
    config = bitmap_portable(tokens, x.dtype.itemsize)
    splits = len(out) if out.ndim == 3 else 1
    return Launch(
        _bitmap_fwd_kernel,
        (triton.cdiv(rows, config.block_n), triton.cdiv(tokens, config.block_m), splits),
        (
            x,
            records,
            starts,
            records.view(integer(x.dtype)),
            x if bias is None else bias,
            out,
            *x.stride(),
            tokens,
            rows,
            columns,
            *lines_tiles(rows, columns),
            blocks,
            triton.cdiv(blocks, splits),
        ),
        {
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "SPLIT": splits > 1,
            "UPCAST": interpreting(),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def added(sums: Tensor, bias: Tensor | None, y: Tensor, activation: str) -> Launch:
    """The call that adds float32 sums (splits, M, N) in order, and the bias, into y (M, N)."""
    return Launch(
        _finish_kernel,
        (triton.cdiv(y.numel(), 512),),
        (sums, y if bias is None else bias, y, y.numel(), y.shape[1], len(sums)),
        {"ACTIVATION": activation, "HAS_BIAS": bias is not None, "BLOCK": 512},
    )


def expand(records: Tensor, starts: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """The dense (rows, columns) weight: `bitmap_unpack` in one pass over memory."""
    dense = torch.empty((rows, columns), dtype=dtype, device=records.device)
    expansion(records, starts, dense).run()
    return dense


def expansion(records: Tensor, starts: Tensor, dense: Tensor) -> Launch:
    """The expanding kernel's call for dense (N, K), real or on the meta device."""
    rows, columns = dense.shape
    kind = integer(dense.dtype)
    return Launch(
        _expand_kernel,
        (triton.cdiv(columns, 64), triton.cdiv(rows, 64)),
        (
            records,
            starts,
            records.view(kind),
            dense.view(kind),
            rows,
            columns,
            *lines_tiles(rows, columns),
        ),
        {"BLOCK_N": 64},
    )


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    every: Sequence[Arch] = (80, 89, 90, "gfx942")
    wide = "HMMA.16816.F32"
    kind, rows, columns = torch.bfloat16, 14336, 4096
    y, sums = meta((1, rows), kind), meta((4, 1, rows), torch.float32)
    bias = meta((rows,), kind, aligned=False)
    return [
        *(_case(dtype, 1, True, wide, every) for dtype in (torch.bfloat16, torch.float16)),
        _case(kind, 1, False, wide, every),
        _case(kind, 64, False, wide, (80, 89, "gfx942")),
        _case(kind, 64, False, "HGMMA.64x64x16.F32", (90,)),
        expansion(*meta_parts(rows, columns), meta((rows, columns), kind)).case(
            "bitmap/expand",
            # the dense rows leave in 16-byte pieces
            opcodes=("STG.E.128",),
            archs=every,
        ),
        added(sums, bias, y, "silu").case("bitmap/finish/bf16", archs=every),
    ]


def _case(
    dtype: torch.dtype, tokens: int, split: bool, opcode: str, archs: Sequence[Arch]
) -> KernelCase:
    rows, columns = 14336, 4096
    config = bitmap_portable(tokens)
    call = product(
        meta((tokens, columns), dtype),
        *meta_parts(rows, columns),
        None if split else meta((rows,), dtype, aligned=False),
        meta((4, tokens, rows), torch.float32) if split else meta((tokens, rows), dtype),
        "none" if split else "gelu",
    )
    return call.case(
        f"bitmap/portable/{'bf16' if dtype == torch.bfloat16 else 'fp16'}/m{config.block_m}"
        + "/split" * split,
        opcodes=(opcode, "v_mfma"),
        elements_per_iteration=config.block_n * 64 // config.num_warps,
        archs=archs,
    )
