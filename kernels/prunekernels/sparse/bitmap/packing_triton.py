"""Packing a dense weight into records on a GPU: one pass that counts, and one that writes.

Format: `bitmap.layout`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.sparse.bitmap.layout import (
    UNIT_BYTES,
    integer,
    lines_tiles,
    meta_parts,
    record_units,
)
from prunekernels.sparse.bitmap.packing import as_starts


@triton.jit
def _bits_of_tile(dense_ptr, N, K, stride_n, stride_k, line, tile):
    """Bits of a tile's 2048 weights in the order of the values, without the sign of a zero."""
    index = tl.arange(0, 2048)
    # index = (block, p, s, u, g, t, h, c)
    row = line * 16 + (index >> 4 & 7) + (index >> 1 & 1) * 8
    block = index >> 10
    column = (index >> 9 & 1) * 32 + (index >> 2 & 3) * 8 + (index >> 8 & 1) * 4
    column += (index >> 7 & 1) * 2 + (index & 1) + block * 64 + tile * 128
    ptrs = dense_ptr + row.to(tl.int64) * stride_n + column.to(tl.int64) * stride_k
    bits = tl.load(ptrs, mask=(row < N) & (column < K), other=0)
    # shifted left by one, a negative zero is a zero
    return bits, (bits << 1).to(bits.dtype) != 0


@triton.jit(do_not_specialize=["N", "K", "tiles"])
def _count_kernel(dense_ptr, counts_ptr, N, K, tiles, stride_n, stride_k):
    tile = tl.program_id(0)
    line = tl.program_id(1)
    _, used = _bits_of_tile(dense_ptr, N, K, stride_n, stride_k, line, tile)
    tl.store(counts_ptr + line.to(tl.int64) * tiles + tile, tl.sum(used.to(tl.int32), 0))


@triton.jit(do_not_specialize=["N", "K", "tiles"])
def _write_kernel(
    dense_ptr,  # the bits of the weight, int16 or int32 (N, K)
    starts_ptr,  # int32 (lines·tiles + 1,)
    words_ptr,  # the records as 32-bit words
    values_ptr,  # the records as the bits of values
    N,
    K,
    tiles,
    stride_n,
    stride_k,
    UNIT: tl.constexpr,  # values in 16 bytes
):
    tile = tl.program_id(0)
    line = tl.program_id(1)
    bits, used = _bits_of_tile(dense_ptr, N, K, stride_n, stride_k, line, tile)
    start = tl.load(starts_ptr + line.to(tl.int64) * tiles + tile).to(tl.int64)
    flags = used.to(tl.int32)
    place = start * UNIT + 16 * UNIT + tl.cumsum(flags, 0) - flags
    tl.store(values_ptr + place, bits, mask=used)
    # (block, step, u, lane, h and c)
    index = tl.arange(0, 2048)
    shift = 8 * (index >> 8 & 3) + 4 * (index >> 7 & 1) + (index & 3)
    parts = tl.reshape(flags << shift, (2, 8, 32, 4))
    word = tl.sum(tl.sum(parts, 3), 1)
    block = tl.arange(0, 2)[:, None]
    lane = tl.arange(0, 32)[None, :]
    tl.store(words_ptr + start * 4 + lane * 2 + block, word)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Records and starts of a dense (N, K) weight, on its device."""
    counts = torch.empty(_tiles(weight), dtype=torch.int32, device=weight.device)
    counting(weight, counts).run()
    starts = as_starts(record_units(counts, weight.dtype.itemsize))
    # what no value fills is zero
    shape = int(starts[-1]), 4
    records = torch.zeros(shape, dtype=torch.int32, device=weight.device)
    writing(weight, starts, records).run()
    return records, starts


def counting(weight: Tensor, counts: Tensor) -> Launch:
    """The call that counts the values of every tile."""
    lines, tiles = lines_tiles(*weight.shape)
    bits = weight.view(integer(weight.dtype))
    return Launch(
        _count_kernel, (tiles, lines), (bits, counts, *weight.shape, tiles, *weight.stride()), {}
    )


def writing(weight: Tensor, starts: Tensor, records: Tensor) -> Launch:
    """The call that writes the records, into zeros."""
    lines, tiles = lines_tiles(*weight.shape)
    kind = integer(weight.dtype)
    return Launch(
        _write_kernel,
        (tiles, lines),
        (
            weight.view(kind),
            starts,
            records,
            records.view(kind),
            *weight.shape,
            tiles,
            *weight.stride(),
        ),
        {"UNIT": UNIT_BYTES // weight.dtype.itemsize},
    )


def _tiles(weight: Tensor) -> int:
    lines, tiles = lines_tiles(*weight.shape)
    return lines * tiles


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    rows, columns = 14336, 4096
    weight = meta((rows, columns), torch.bfloat16)
    records, starts = meta_parts(rows, columns)
    return [
        counting(weight, starts).case("bitmap/pack/count", archs=(80, 90, "gfx942")),
        writing(weight, starts, records).case("bitmap/pack/write", archs=(80, 90, "gfx942")),
    ]
