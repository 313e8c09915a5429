"""NVIDIA's tensor-core instructions on arrays, written from the PTX ISA.

Operands are the 32-bit registers of the 32 lanes of each warp: uint32 (warps, 32, registers).
"""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray
LANE = np.arange(32)[:, None]
REGISTER = np.arange(4)[None, :]


def to_float(bits: Array, kind: str) -> Array:
    """float32 values of 16-bit patterns."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    flat = torch.from_numpy(np.ascontiguousarray(bits).astype(np.uint16).view(np.int16))
    return flat.view(dtype).float().numpy()


def from_float(values: Array, kind: str) -> Array:
    """16-bit patterns of float32 values, rounded to nearest even."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    flat = torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))
    return flat.to(dtype).view(torch.int16).numpy().view(np.uint16)


def mma_sp_m16n8k32(a: Array, b: Array, c: Array, e: Array, selector: int, kind: str) -> Array:
    """D (16×8) = A (16×32, 2:4) · B (32×8) + C for each warp: `mma.sp::ordered_metadata`.

    Args:
        a: uint32 (warps, 32 lanes, 4): register r of a lane holds the two non-zeros of one chunk
            of four columns: row lane/4 for r = 0, 2 and lane/4 + 8 for r = 1, 3; chunk lane%4 for
            r = 0, 1 and lane%4 + 4 for r = 2, 3.
        b: uint32 (warps, 32, 4): register r holds rows k = 2·(lane%4) + 8·r and k + 1 of column
            lane/4.
        c: float32 (warps, 32, 4): element i is row lane/4 + 8·(i/2), column 2·(lane%4) + i%2.
        e: uint32 (warps, 32): 2-bit indices, only read from the two lanes of each quad that the
            selector names (0: lanes 0, 1; 1: lanes 2, 3). The first covers columns 0-15, the
            second 16-31; bits 0-15 are row lane/4, bits 16-31 row lane/4 + 8.
        selector: 0 or 1.
        kind: "bf16" or "f16".

    Returns:
        float32 (warps, 32, 4), laid out like `c`; sums are formed in float64.
    """
    warps = np.arange(a.shape[0])[:, None, None]
    row, chunk = LANE // 4 + 8 * (REGISTER % 2), LANE % 4 + 4 * (REGISTER // 2)
    owner = LANE // 4 * 4 + 2 * selector + chunk // 4
    nibble = e[:, owner] >> (16 * (REGISTER % 2) + 4 * (chunk % 4)) & 0xF
    first, second = nibble & 3, nibble >> 2
    if not (first < second).all():
        raise ValueError("mma.sp::ordered_metadata with indices that do not increase")
    left = np.zeros((a.shape[0], 16, 32))
    left[warps, row, 4 * chunk + first] = to_float(a & 0xFFFF, kind)
    left[warps, row, 4 * chunk + second] = to_float(a >> 16, kind)
    right = np.zeros((a.shape[0], 32, 8))
    right[:, 2 * (LANE % 4) + 8 * REGISTER, LANE // 4] = to_float(b & 0xFFFF, kind)
    right[:, 2 * (LANE % 4) + 8 * REGISTER + 1, LANE // 4] = to_float(b >> 16, kind)
    product = left @ right
    at = product[:, LANE // 4 + 8 * (REGISTER // 2), 2 * (LANE % 4) + REGISTER % 2]
    return (c + at).astype(np.float32)


def to_e4m3(codes: Array) -> Array:
    """float64 values of e4m3 codes (0x7F and 0xFF are NaN)."""
    flat = torch.from_numpy(np.ascontiguousarray(codes).astype(np.uint8))
    return flat.view(torch.float8_e4m3fn).double().numpy()


def mma_sp_m16n8k64_e4m3(
    a: Array, b: Array, c: Array, e: Array, selector: int, mantissa: int | None = None
) -> Array:
    """D (16×8) = A (16×64, 2:4) · B (64×8) + C of e4m3 values for each warp.

    The instruction is `mma.sp::ordered_metadata.m16n8k64`; PTX ISA, "Matrix Fragments for sparse
    mma.m16n8k64 with .u8 / .s8 / .e4m3 / .e5m2 type".

    Args:
        a: uint32 (warps, 32 lanes, 4): register r of a lane holds the non-zeros of two chunks of
            four columns, bytes 0 and 1 those of chunk 2·(lane%4) + 8·(r/2) and bytes 2 and 3 those
            of the next: row lane/4 for r = 0, 2 and lane/4 + 8 for r = 1, 3.
        b: uint32 (warps, 32, 4): byte i of register r is row k = 4·(lane%4) + 16·r + i of column
            lane/4.
        c: float32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.
        e: uint32 (warps, 32): 2-bit indices, read from all lanes: lane t of a quad covers columns
            16·t … 16·t + 15; bits 0-15 are row lane/4, bits 16-31 row lane/4 + 8.
        selector: 0.
        mantissa: Bits behind the point that an adder keeps of each addend, C included, relative to
            the largest one; what lies below is cut off. None: sums are formed in float64.

    Returns:
        float32 (warps, 32, 4), laid out like `c`.
    """
    if selector != 0:
        raise ValueError(f"mma.sp.m16n8k64 of 8-bit values with selector {selector}, not 0")
    warps = np.arange(a.shape[0])[:, None, None]
    left, right = np.zeros((a.shape[0], 16, 64)), np.zeros((a.shape[0], 64, 8))
    for half in (0, 1):
        row, chunk = LANE // 4 + 8 * (REGISTER % 2), 2 * (LANE % 4) + 8 * (REGISTER // 2) + half
        owner = LANE // 4 * 4 + chunk // 4
        nibble = e[:, owner] >> (16 * (REGISTER % 2) + 4 * (chunk % 4)) & 0xF
        first, second = nibble & 3, nibble >> 2
        if not (first < second).all():
            raise ValueError("mma.sp::ordered_metadata with indices that do not increase")
        left[warps, row, 4 * chunk + first] = to_e4m3(a >> 16 * half & 0xFF)
        left[warps, row, 4 * chunk + second] = to_e4m3(a >> 16 * half + 8 & 0xFF)
    for byte in range(4):
        row = 4 * (LANE % 4) + 16 * REGISTER + byte
        right[:, row, LANE // 4] = to_e4m3(b >> 8 * byte & 0xFF)
    at = LANE // 4 + 8 * (REGISTER // 2), 2 * (LANE % 4) + REGISTER % 2
    if mantissa is None:
        return (c + (left @ right)[:, *at]).astype(np.float32)
    terms = left[:, :, :, None] * right[:, None]
    addends = np.concatenate([terms.transpose(0, 1, 3, 2)[:, *at], c[..., None]], 3)
    _, exponent = np.frexp(np.abs(addends).max(3, keepdims=True))
    step = np.ldexp(1.0, exponent - 1 - mantissa)
    return (np.trunc(addends / step) * step).sum(3).astype(np.float32)


def mma_m16n8k16(a: Array, b: Array, c: Array, kind: str) -> Array:
    """D (16×8) = A (16×16) · B (16×8) + C for each warp: `mma.m16n8k16`.

    Args:
        a: uint32 (warps, 32 lanes, 4): register r holds columns 2·(lane%4) + 8·(r/2) and the next
            of row lane/4 + 8·(r%2).
        b: uint32 (warps, 32, 2): register r holds rows k = 2·(lane%4) + 8·r and k + 1 of column
            lane/4.
        c: float32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.
        kind: "bf16" or "f16".

    Returns:
        float32 (warps, 32, 4), laid out like `c`; sums are formed in float64.
    """
    left, right = np.zeros((a.shape[0], 16, 16)), np.zeros((a.shape[0], 16, 8))
    for half in (0, 1):
        bits = (lambda words: words >> 16) if half else (lambda words: words & 0xFFFF)
        column = 2 * (LANE % 4) + 8 * (REGISTER // 2) + half
        left[:, LANE // 4 + 8 * (REGISTER % 2), column] = to_float(bits(a), kind)
        row = 2 * (LANE % 4) + 8 * REGISTER[:, :2] + half
        right[:, row, LANE // 4] = to_float(bits(b), kind)
    product = left @ right
    at = product[:, LANE // 4 + 8 * (REGISTER // 2), 2 * (LANE % 4) + REGISTER % 2]
    return (c + at).astype(np.float32)


def mma_m16n8k32_u8(a: Array, b: Array, c: Array) -> Array:
    """D (16×8) = A (16×32) · B (32×8) + C of unsigned bytes for each warp: `mma.m16n8k32`.

    Args:
        a: uint32 (warps, 32 lanes, 4): byte i of register r is column 4·(lane%4) + i + 16·(r/2) of
            row lane/4 + 8·(r%2).
        b: uint32 (warps, 32, 2): byte i of register r is row 4·(lane%4) + i + 16·r of column
            lane/4.
        c: int32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.

    Returns:
        int32 (warps, 32, 4), laid out like `c`.
    """
    return _integer_product(a, b, c, 8)


def mma_m16n8k256_b1(a: Array, b: Array, c: Array) -> Array:
    """D (16×8) = how many bits A (16×256) and B (256×8) share, + C: `mma.m16n8k256.and.popc`.

    Args:
        a: uint32 (warps, 32 lanes, 4): bit i of register r is column 32·(lane%4) + i + 128·(r/2) of
            row lane/4 + 8·(r%2).
        b: uint32 (warps, 32, 2): bit i of register r is row 32·(lane%4) + i + 128·r of column
            lane/4.
        c: int32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.

    Returns:
        int32 (warps, 32, 4), laid out like `c`.
    """
    return _integer_product(a, b, c, 1)


def mma_m16n8k128_b1(a: Array, b: Array, c: Array) -> Array:
    """D (16×8) = how many bits A (16×128) and B (128×8) share, + C: `mma.m16n8k128.and.popc`.

    Args:
        a: uint32 (warps, 32 lanes, 2): bit i of register r is column 32·(lane%4) + i of row
            lane/4 + 8·r.
        b: uint32 (warps, 32, 1): bit i is row 32·(lane%4) + i of column lane/4.
        c: int32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.

    Returns:
        int32 (warps, 32, 4), laid out like `c`.
    """
    # the first half of a product of 256
    none = np.zeros_like(b)
    return _integer_product(np.concatenate([a, none, none], 2), np.concatenate([b, none], 2), c, 1)


def _integer_product(a: Array, b: Array, c: Array, bits: int) -> Array:
    """A·B + C of unsigned integers of so many bits; a lane's registers hold 32 / bits of a row."""
    count = 32 // bits
    part = np.arange(count)
    left = np.zeros((a.shape[0], 16, 8 * count), np.int64)
    right = np.zeros((a.shape[0], 8 * count, 8), np.int64)
    lane, register, part = LANE[..., None], REGISTER[..., None], part[None, None]
    k = count * (lane % 4) + part
    mask = np.uint32(2**bits - 1)
    parts = (bits * part).astype(np.uint32)
    left[:, lane // 4 + 8 * (register % 2), k + 4 * count * (register // 2)] = (
        a[..., None] >> parts & mask
    )
    right[:, k + 4 * count * register[:, :2], lane // 4] = b[..., None] >> parts & mask
    product = left @ right
    at = product[:, LANE // 4 + 8 * (REGISTER // 2), 2 * (LANE % 4) + REGISTER % 2]
    return (c + at).astype(np.int32)
