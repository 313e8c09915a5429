"""Portable 2:4 matrix multiplication in plain Triton: decompress in registers, then `tl.dot`.

    y[m, n] = act(Σ_k x[m, k]·W[n, k] + b[n]),  or with two weights  silu(x·Wgᵀ)·(x·Wuᵀ)

One program makes BLOCK_M tokens × BLOCK_N rows and walks all of K in blocks of 64 columns, in
order, so results are bitwise repeatable. Runs on every GPU that Triton supports and in the
interpreter. Format: `two_four.layout`.
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
from prunekernels.sparse.epilogue import activate, operand
from prunekernels.sparse.tuning import PortableConfig
from prunekernels.sparse.two_four.layout import line_blocks, packed_shape, value_words
from prunekernels.sparse.two_four.tuning import sparse24_portable


@triton.jit
def _decompress(line_ptr, block, units, BLOCK_N: tl.constexpr, V: tl.constexpr):
    """Bits of columns 64·block .. + 63 of BLOCK_N rows, int16 (V = 1) or int32 (BLOCK_N, 64).

    line_ptr: (BLOCK_N, 1) pointers to the packed line of each row; V: words per group.
    """
    UNIT: tl.constexpr = 1024 * V + 128
    TAIL: tl.constexpr = 256 * V + 32
    row = tl.arange(0, BLOCK_N)[:, None] % 16
    group = tl.arange(0, 16)[None, :]
    step = group // 8
    upper = group % 8 // 4
    # block 4u + j is quarter j of unit u; the blocks after the units are tails of their own
    whole = block < 4 * units
    quarter = tl.where(whole, block % 4, 0)
    start = tl.where(whole, block // 4 * UNIT, units * UNIT + (block - 4 * units) * TAIL)
    lane = row % 8 * 4 + group % 4
    # what does not depend on the block stands first, for the compiler to keep out of the loop
    word_ptrs = line_ptr + (step * (128 * V) + lane * 4 + upper * 2 + row // 8)
    word = tl.load(word_ptrs + (start + quarter * (256 * V)))
    lane = row % 8 * 4 + step * 2 + upper
    meta_start = start + tl.where(whole, 1024 * V, 256 * V)
    meta = tl.load(line_ptr + (lane * 4 >> tl.where(whole, 0, 2)) + (meta_start + quarter))
    nibble = meta >> (row // 8 * 16 + group % 4 * 4)
    first = nibble & 3
    second = (nibble >> 2) & 3
    if V == 1:
        low = word.to(tl.int16)
        high = (word >> 16).to(tl.int16)
    else:
        low = word
        high = tl.load(word_ptrs + (start + quarter * (256 * V) + 128))
    zero = tl.zeros_like(low)
    # the first kept value is never in column 3, the second never in column 0
    bits0 = tl.where(first == 0, low, zero)
    bits1 = tl.where(first == 1, low, tl.where(second == 1, high, zero))
    bits2 = tl.where(first == 2, low, tl.where(second == 2, high, zero))
    bits3 = tl.where(second == 3, high, zero)
    # joined, not broadcast: a thread then holds its four columns side by side
    bits = tl.join(tl.join(bits0, bits2), tl.join(bits1, bits3))
    return tl.reshape(bits, (BLOCK_N, 64))


@triton.jit(do_not_specialize=["N", "units"])
def _expand_kernel(
    packed_ptr,  # int32 (lines, words)
    dense_ptr,  # the bits of the dense weight, int16 or int32 (N, K), contiguous
    N,
    K,
    units,
    words,  # words in a line
    V: tl.constexpr,  # words per group
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = block * 64 + tl.arange(0, 64)
    line = tl.where(offs_n < N, offs_n // 16, 0)[:, None] * words
    bits = _decompress(packed_ptr + line, block, units, BLOCK_N, V)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(dense_ptr + offs_n[:, None] * K + offs_k[None, :], bits, mask=mask)


@triton.jit(do_not_specialize=["M", "N", "units", "blocks"])
def _sparse24_fwd_kernel(
    x_ptr,  # (M, K), strides stride_xm, stride_xk
    packed_ptr,  # int32 (lines, words): the weight, or the gate's
    up_ptr,  # int32 (lines, words), read if GATED
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    stride_xm: tl.int64,
    stride_xk,
    M,
    N,
    K,
    units,
    blocks,  # blocks of 64 columns, padding included
    words,  # words in a line
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    V: tl.constexpr,  # words per group of the packed format
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    # lines past the last row read line 0 and are not stored
    line = tl.where(offs_n < N, offs_n // 16, 0)[:, None] * words
    offs_k = tl.arange(0, 64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    for block in range(0, blocks):
        mask = mask_m[:, None] & (block * 64 + offs_k < K)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        x_ptrs += 64 * stride_xk
        w = operand(_decompress(packed_ptr + line, block, units, BLOCK_N, V), dtype, UPCAST)
        if UPCAST:
            x = x.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            w = operand(_decompress(up_ptr + line, block, units, BLOCK_N, V), dtype, UPCAST)
            acc_up = tl.dot(x, tl.trans(w), acc_up, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y = activate(acc, ACTIVATION)
    if GATED:
        y *= acc_up
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(dtype), mask=mask_m[:, None] & (offs_n < N)[None, :])


def _config(tokens: int, gated: bool, itemsize: int) -> PortableConfig:
    # two accumulators of 64 tokens would not fit the registers
    return sparse24_portable(min(tokens, 32) if gated else tokens, itemsize)


def forward(
    x: Tensor, packed: Tensor, up: Tensor | None, rows: int, bias: Tensor | None, activation: str
) -> Tensor:
    """Launch for x (M, K) with M > 0; `up` selects the gated form."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    product(x, packed, up, bias, y, activation).run()
    return y


def product(
    x: Tensor,
    packed: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device."""
    (tokens, columns), rows = x.shape, y.shape[1]
    _, units, tails = line_blocks(rows, columns)
    config = _config(tokens, up is not None, x.dtype.itemsize)
    return Launch(
        _sparse24_fwd_kernel,
        (triton.cdiv(rows, config.block_n), triton.cdiv(tokens, config.block_m)),
        (
            x,
            packed,
            packed if up is None else up,
            x if bias is None else bias,
            y,
            *x.stride(),
            tokens,
            rows,
            columns,
            units,
            4 * units + tails,
            packed.shape[1],
        ),
        {
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "GATED": up is not None,
            "V": value_words(x.dtype),
            "UPCAST": interpreting(),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def expand(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense (rows, columns) weight: `sparse24_unpack` in one pass over memory."""
    dense = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    expansion(packed, dense).run()
    return dense


def expansion(packed: Tensor, dense: Tensor) -> Launch:
    """The expanding kernel's call for dense (N, K), real or on the meta device."""
    rows, columns = dense.shape
    _, units, tails = line_blocks(rows, columns)
    wide = value_words(dense.dtype)
    bits = dense.view(torch.int16 if wide == 1 else torch.int32)
    return Launch(
        _expand_kernel,
        (4 * units + tails, triton.cdiv(rows, 64)),
        (packed, bits, rows, columns, units, packed.shape[1]),
        {"V": wide, "BLOCK_N": 64},
    )


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    wide, narrow = "HMMA.16816.F32", "HGMMA.64x64x16.F32"
    return [
        *_cases(1, False, wide, (80, 89, 90, "gfx942")),
        *_cases(64, False, wide, (80, 89, "gfx942")),
        *_cases(64, False, narrow, (90,)),
        *_cases(16, True, wide, (80, 89, 90, "gfx942")),
        *_cases(64, True, wide, (80, 89, 90, "gfx942")),
        *_cases(1, False, "FFMA", (80, 90, "gfx942"), (torch.float32,)),
        *_cases(16, True, "FFMA", (80, 90), (torch.float32,)),
        *(
            expansion(
                meta(packed_shape(14336, 4096, dtype), torch.int32), meta((14336, 4096), dtype)
            ).case(
                f"sparse24/expand/i{8 * dtype.itemsize}",
                # the dense rows leave in 16-byte pieces
                opcodes=("STG.E.128",),
                archs=(80, 89, 90, "gfx942"),
            )
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ]


def _cases(
    tokens: int,
    gated: bool,
    opcode: str,
    archs: Sequence[Arch],
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
) -> list[KernelCase]:
    rows, columns = 14336, 4096
    cases = []
    for dtype in dtypes:
        config = _config(tokens, gated, dtype.itemsize)
        packed = meta(packed_shape(rows, columns, dtype), torch.int32)
        call = product(
            meta((tokens, columns), dtype),
            packed,
            packed if gated else None,
            None if gated else meta((rows,), dtype, aligned=False),
            meta((tokens, rows), dtype),
            "silu" if gated else "gelu",
        )
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        cases.append(
            call.case(
                f"sparse24/portable/{kind}/m{config.block_m}{'/gated' * gated}",
                opcodes=(opcode, "v_mfma" if opcode != "FFMA" else "v_fma"),
                elements_per_iteration=config.block_n * 64 // config.num_warps,
                archs=archs,
            )
        )
    return cases
