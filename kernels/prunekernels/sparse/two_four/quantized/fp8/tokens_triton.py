"""Activations rounded to e4m3 by a kernel, bit for bit as `tokens.quantize_tokens` rounds them.

It rounds with integer arithmetic alone, because not every GPU converts to e4m3, and writes each
token's codes, padded to 128 columns, in the order in which the lanes of a product read them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.sparse.two_four.quantized.fp8.tokens import Tokens

#: Columns that the order of a product's codes concerns: tokens are padded to as many.
BLOCK = 128


@triton.jit
def _code(v):
    """e4m3 codes of float32 |v| ≤ 448 (and a rounding more), to nearest even; of a NaN 0x7F."""
    bits = v.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # three bits of mantissa and another bias
    normal = (size + 0x7FFFF + ((size >> 20) & 1) >> 20) - 960
    # below 2⁻⁶ steps of 2⁻⁹, which are the last bit of numbers from 2¹⁴ on
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(size < 0x3C800000, small, normal), 0x7E)
    return tl.where(size > 0x7F800000, 0x7F, code | (bits >> 24) & 0x80)


@triton.jit
def _place(column, ORDER: tl.constexpr):
    """Where a product reads the code of a column, in 128 columns; see `fp8.mma`.

    ORDER: "e4m3" moves groups of four columns, "f16" pairs in 16 columns.
    """
    if ORDER == "e4m3":
        group = column >> 2
        moved = (group >> 2 & 1) << 4 | (group >> 3 & 1) << 3 | (group & 3) << 1 | group >> 4 & 1
        return (column & -128) | moved << 2 | column & 3
    else:
        return (column & -16) | (column >> 1 & 3) << 2 | (column >> 3 & 1) << 1 | column & 1


@triton.jit
def _quantize_tokens_kernel(
    x_ptr,  # (M, K), strides stride_xm, stride_xk
    codes_ptr,  # uint8 (M, WIDTH), contiguous
    scales_ptr,  # float32 (M,)
    stride_xm: tl.int64,
    stride_xk,
    K,
    WIDTH,  # K padded, codes of zero past K
    ORDER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token * stride_xm + offs_k.to(tl.int64) * stride_xk
    # magnitudes of floats are ordered as their bits, with infinity and NaN on top
    most = tl.zeros((BLOCK_K,), tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs + k * stride_xk, mask=k + offs_k < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    top = tl.max(most, 0)
    scale = tl.math.div_rn(top.to(tl.float32, bitcast=True), 448.0)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    scale = tl.where(top >= 0x7F800000, float("nan"), scale)
    tl.store(scales_ptr + token, scale)
    for k in range(0, WIDTH, BLOCK_K):
        x = tl.load(x_ptrs + k * stride_xk, mask=k + offs_k < K, other=0.0).to(tl.float32)
        code = _code(tl.math.div_rn(x, tl.zeros_like(x) + scale))
        codes_ptrs = codes_ptr + token * WIDTH + _place(k + offs_k, ORDER)
        tl.store(codes_ptrs, code.to(tl.uint8), mask=k + offs_k < WIDTH)


def ordered_tokens(x: Tensor, order: str) -> Tokens:
    """`quantize_tokens` of x (M, K) by the kernel, for a product.

    Args:
        x: (M, K), M > 0.
        order: Of columns, `_place`'s.

    Returns:
        uint8 (M, K padded to 128) and float32 (M,).
    """
    tokens, columns = x.shape
    width = -(-columns // BLOCK) * BLOCK
    codes = torch.empty((tokens, width), dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    quantization(x, codes, scales, order).run()
    return Tokens(codes, scales)


def quantization(x: Tensor, codes: Tensor, scales: Tensor, order: str) -> Launch:
    """The kernel's call for x (M, K), real or on the meta device."""
    columns = x.shape[1]
    return Launch(
        _quantize_tokens_kernel,
        (len(x),),
        (x, codes, scales, *x.stride(), columns, codes.shape[1]),
        {"ORDER": order, "BLOCK_K": min(2048, max(BLOCK, triton.next_power_of_2(columns)))},
    )


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    cases = []
    for order in ("e4m3", "f16"):
        x = meta((64, 4096), torch.bfloat16)
        codes = meta((64, 4096), torch.uint8)
        call = quantization(x, codes, meta((64,), torch.float32), order)
        archs = (80, 89, 90)
        cases.append(call.case(f"quantized24/fp8/tokens/{order}", opcodes=("LDG",), archs=archs))
    return cases
