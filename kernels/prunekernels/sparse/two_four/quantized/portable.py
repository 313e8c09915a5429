"""Portable product with quantised 2:4 weights in plain Triton: decode in registers, `tl.dot`.

    y[m, n] = act(Σ_g s[n, g]·Σ_{k ∈ g} x[m, k]·(c[n, k] − z[n, g]) + b[n]),  or silu(gate)·up

One program makes BLOCK_M tokens × BLOCK_N rows and walks all of K in blocks of 64 columns, in
order, so results are bitwise repeatable. Codes less zero points are whole numbers or e4m3 values,
exact in 16 bits; scales multiply float32 sums. Runs on every GPU that Triton supports and in the
interpreter. Format: `two_four.quantized.layout`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.runtime import interpreting
from prunekernels.sparse.epilogue import activate
from prunekernels.sparse.tuning import PortableConfig
from prunekernels.sparse.two_four.quantized.layout import (
    KINDS,
    Parts,
    filled,
    group_of,
    line_blocks,
    packed_shape,
    scales_shape,
)
from prunekernels.sparse.two_four.tuning import sparse24_portable


@triton.jit
def _level(word, zero, register, half, KIND: tl.constexpr):
    """float32 numbers that scales multiply, of words that hold them (`two_four.quantized.layout`).

    register: 0 … 3 of the operand; half: 0 for the low value, 1 for the high one; zero: int32.
    """
    if KIND == "2:4-int4":
        return ((word >> (4 * register + 16 * half) & 15) - zero).to(tl.float32)
    elif KIND == "2:4-int8":
        # an odd register is the word rotated by 8
        turned = tl.where(register % 2 == 0, word, (word >> 8 & 0xFFFFFF) | (word << 24))
        bits = turned >> (16 * half)
        size = (bits & 0x7F).to(tl.float32)
        return tl.where(bits & 0x8000 != 0, -size, size)
    else:
        # exponent and mantissa of an e4m3 at those of a float32, 2⁻¹²⁰ times as large
        code = word >> (8 - 8 * (register % 2) + 16 * half) & 0xFF
        bits = (code & 0x80) << 24 | (code & 0x7F) << 20
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _decode(packed_ptr, zeros_ptr, offs_n, line, block, units, words, groups,
            HAS_ZEROS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
            KIND: tl.constexpr):  # fmt: skip
    """Numbers of columns 64·block .. + 63 of BLOCK_N rows, float32 (BLOCK_N, 64), unscaled."""
    P: tl.constexpr = 1 if KIND == "2:4-int4" else 2
    UNIT: tl.constexpr = 256 * P + 128
    TAIL: tl.constexpr = 64 * P + 32
    row = (offs_n % 16).to(tl.int32)[:, None]
    group = tl.arange(0, 16)[None, :]
    step = group // 8
    upper = group % 8 // 4
    register = row // 8 + 2 * upper
    # block 4u + j is quarter j of unit u; the blocks after the units are tails of their own
    whole = block < 4 * units
    quarter = tl.where(whole, block % 4, 0)
    start = tl.where(whole, block // 4 * UNIT, units * UNIT + (block - 4 * units) * TAIL)
    lane = row % 8 * 4 + group % 4
    word = (quarter * 2 + step) * P
    if P == 2:
        word += register // 2
    # words of a lane stand in blocks of four, those of a tail side by side
    in_unit = word // 4 * 128 + lane * 4 + word % 4
    at = tl.where(whole, in_unit, lane * (2 * P) + word)
    line_ptr = packed_ptr + line[:, None] * words
    value = tl.load(line_ptr + (start + at))
    lane = row % 8 * 4 + step * 2 + upper
    meta_start = start + tl.where(whole, 256 * P, 64 * P)
    meta = tl.load(line_ptr + (lane * 4 >> tl.where(whole, 0, 2)) + (meta_start + quarter))
    nibble = meta >> (row // 8 * 16 + group % 4 * 4)
    first = nibble & 3
    second = (nibble >> 2) & 3
    zero = tl.full((1, 1), 8, tl.int32)
    if HAS_ZEROS:
        which = block * 64 // GROUP if GROUP else 0
        zero_ptr = zeros_ptr + (line * groups + which)[:, None] * 16
        zero = tl.load(zero_ptr + row % 8 * 2 + row // 8).to(tl.int32)
    low = _level(value, zero, register, 0, KIND)
    high = _level(value, zero, register, 1, KIND)
    # the first kept value is never in column 3, the second never in column 0
    column0 = tl.where(first == 0, low, 0.0)
    column1 = tl.where(first == 1, low, tl.where(second == 1, high, 0.0))
    column2 = tl.where(first == 2, low, tl.where(second == 2, high, 0.0))
    column3 = tl.where(second == 3, high, 0.0)
    numbers = tl.join(tl.join(column0, column2), tl.join(column1, column3))
    return tl.reshape(numbers, (BLOCK_N, 64))


@triton.jit
def _scale(scales_ptr, offs_n, line, block, groups, GROUP: tl.constexpr):
    """float32 (BLOCK_N,) scales of a block of 64 columns."""
    which = block * 64 // GROUP if GROUP else 0
    row = offs_n % 16
    return tl.load(scales_ptr + (line * groups + which) * 16 + row % 8 * 2 + row // 8)


@triton.jit(do_not_specialize=["N", "units", "groups"])
def _expand24q_kernel(
    packed_ptr,  # int32 (lines, words)
    scales_ptr,  # float32 (lines, groups, 16)
    zeros_ptr,  # uint8 (lines, groups, 16), read if HAS_ZEROS
    dense_ptr,  # (N, K), contiguous
    N,
    K,
    units,
    words,  # words in a line
    groups,
    KIND: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a group, a multiple of 64; 0: a row
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = block * 64 + tl.arange(0, 64)
    line = tl.where(offs_n < N, offs_n // 16, 0)
    numbers = _decode(packed_ptr, zeros_ptr, offs_n, line, block, units, words, groups,
                      HAS_ZEROS, GROUP, BLOCK_N, KIND)  # fmt: skip
    weight = numbers * _scale(scales_ptr, offs_n, line, block, groups, GROUP)[:, None]
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    ptrs = dense_ptr + offs_n[:, None] * K + offs_k[None, :]
    tl.store(ptrs, weight.to(dense_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "units", "blocks", "groups"])
def _quantized24_fwd_kernel(
    x_ptr,  # (M, K), strides stride_xm, stride_xk
    packed_ptr,  # int32 (lines, words): the weight, or the gate's
    scales_ptr,  # float32 (lines, groups, 16)
    zeros_ptr,  # uint8 (lines, groups, 16), read if HAS_ZEROS
    up_ptr,  # the same of the up's weight, read if GATED
    up_scales_ptr,
    up_zeros_ptr,
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
    groups,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a group, a multiple of 64; 0: a row
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if UPCAST else y_ptr.dtype.element_ty
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    # lines past the last row read line 0 and are not stored
    line = tl.where(offs_n < N, offs_n // 16, 0)
    offs_k = tl.arange(0, 64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    for block in range(0, blocks):
        mask = mask_m[:, None] & (block * 64 + offs_k < K)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(dtype)
        x_ptrs += 64 * stride_xk
        w = _decode(packed_ptr, zeros_ptr, offs_n, line, block, units, words, groups,
                    HAS_ZEROS, GROUP, BLOCK_N, KIND)  # fmt: skip
        part = tl.dot(x, tl.trans(w.to(dtype)), input_precision="ieee")
        if GROUP:
            part *= _scale(scales_ptr, offs_n, line, block, groups, GROUP)[None, :]
        acc += part
        if GATED:
            w = _decode(up_ptr, up_zeros_ptr, offs_n, line, block, units, words, groups,
                        HAS_ZEROS, GROUP, BLOCK_N, KIND)  # fmt: skip
            part = tl.dot(x, tl.trans(w.to(dtype)), input_precision="ieee")
            if GROUP:
                part *= _scale(up_scales_ptr, offs_n, line, block, groups, GROUP)[None, :]
            acc_up += part
    if GROUP == 0:
        acc *= _scale(scales_ptr, offs_n, line, 0, groups, GROUP)[None, :]
        if GATED:
            acc_up *= _scale(up_scales_ptr, offs_n, line, 0, groups, GROUP)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y = activate(acc, ACTIVATION)
    if GATED:
        y *= acc_up
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def _config(tokens: int, gated: bool, itemsize: int) -> PortableConfig:
    # two accumulators of 64 tokens would not fit the registers
    return sparse24_portable(min(tokens, 32) if gated else tokens, itemsize)


def forward(
    x: Tensor,
    parts: Parts,
    up: Parts | None,
    rows: int,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Launch for x (M, K) with M > 0; `up` selects the gated form."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    product(x, parts, up, kind, bias, y, activation).run()
    return y


def shared_options(parts: Parts, kind: str, columns: int) -> dict[str, Any]:
    """What the kernels are specialised for by a weight."""
    _, scales, zeros = parts
    return {
        "KIND": kind,
        "HAS_ZEROS": zeros is not None,
        "GROUP": group_of(columns, scales.shape[1]) or 0,
    }


def product(
    x: Tensor,
    parts: Parts,
    up: Parts | None,
    kind: str,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device."""
    (tokens, columns), rows = x.shape, y.shape[1]
    _, units, tails = line_blocks(rows, columns)
    config = _config(tokens, up is not None, x.dtype.itemsize)
    return Launch(
        _quantized24_fwd_kernel,
        (triton.cdiv(rows, config.block_n), triton.cdiv(tokens, config.block_m)),
        (
            x,
            *filled(parts),
            *filled(up or parts),
            x if bias is None else bias,
            y,
            *x.stride(),
            tokens,
            rows,
            columns,
            units,
            4 * units + tails,
            parts[0].shape[1],
            parts[1].shape[1],
        ),
        {
            **shared_options(parts, kind, columns),
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "GATED": up is not None,
            "UPCAST": interpreting() or x.dtype == torch.float32,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def expand(parts: Parts, kind: str, dense: Tensor) -> None:
    """Write the dense weight, (code − zero)·scale rounded once, into `dense` (N, K)."""
    expansion(parts, kind, dense).run()


def expansion(parts: Parts, kind: str, dense: Tensor) -> Launch:
    """The expanding kernel's call for dense (N, K), real or on the meta device."""
    rows, columns = dense.shape
    _, units, tails = line_blocks(rows, columns)
    return Launch(
        _expand24q_kernel,
        (4 * units + tails, triton.cdiv(rows, 64)),
        (
            *filled(parts),
            dense,
            rows,
            columns,
            units,
            parts[0].shape[1],
            parts[1].shape[1],
        ),
        {**shared_options(parts, kind, columns), "BLOCK_N": 64},
    )


def case_parts(rows: int, columns: int, kind: str, group: int, zeros: bool) -> Parts:
    """A weight on the meta device, for `compile_cases`."""
    shape = scales_shape(rows, columns, group)
    return (
        meta(packed_shape(rows, columns, KINDS[kind].bits), torch.int32),
        meta(shape, torch.float32),
        meta(shape, torch.uint8) if zeros else None,
    )


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    archs: Sequence[Arch] = (80, 90, "gfx942")
    rows, columns, bf16 = 14336, 4096, torch.bfloat16
    cases = []
    for kind, group, zeros in (
        ("2:4-int8", 0, False),
        ("2:4-fp8", 0, False),
        ("2:4-int4", 128, False),
        ("2:4-int4", 64, True),
    ):
        parts = case_parts(rows, columns, kind, group, zeros)
        name = kind.removeprefix("2:4-") + f"g{group}" + "/zeros" * zeros
        call = product(
            meta((1, columns), bf16), parts, None, kind, None, meta((1, rows), bf16), "none"
        )
        config = _config(1, False, 2)
        cases.append(
            call.case(
                f"quantized24/portable/{name}/m{config.block_m}",
                opcodes=("HMMA.16816.F32", "v_mfma"),
                elements_per_iteration=config.block_n * 64 // config.num_warps,
                archs=archs,
            )
        )
        cases.append(
            expansion(parts, kind, meta((rows, columns), bf16)).case(
                f"quantized24/expand/{name}", opcodes=("STG.E.128",), archs=archs
            )
        )
    return cases
