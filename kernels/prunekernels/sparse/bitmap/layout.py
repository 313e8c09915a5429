"""The bitmap format, version 3: any sparsity, one bit per weight and the non-zero values.

A weight has N rows (outputs) and K columns (inputs), padded to lines of 16 rows and stages of 128
columns. A line and a stage meet in a *tile* of 2048 weights: two blocks of 64 columns. A tile is
one *record* of 16-byte units, so that all of it comes by one copy:

    records  int32 (units, 4): line after line, tile after tile, 256 bytes of bitmap words and then
             the tile's values, filled up with zeros to a unit
    starts   int32 (lines·tiles + 1,): the unit where each record starts, and the number of units
    room     int8 (chunks,): as many zeros as a record takes pieces of 512 bytes at most, which is
             how large the kernels' copies are; a shape is known without reading the tensor

The bits follow the order in which the lanes of a warp hold the left operand of four
`mma.m16n8k16`. Lane 4·g + t has one word for each block. Bit 8·step + 4·u + 2·h + c of it, with
step = 2·p + s, is the element at row g + 8·h and column 32·p + 8·t + 4·s + 2·u + c of the block:
a lane's columns of two steps lie side by side, so that it reads x in pieces of 16 bytes. The words
of a tile lie lane after lane, block 0 before block 1. The values follow a finer order: the four
elements of a lane that share step and u are a *run*, and the values lie in the order (block, step,
u, lane, h, c).

Nothing depends on how the non-zeros are spread: full and empty rows, tiles and weights are all
exact, and a lane finds its values by counting the bits before its own. −0.0 is not stored; every
other value, NaN included, comes back bit for bit. Bytes per weight at sparsity s and value size v:
v·(1 − s) + 1/8, and for `starts` and the filling at most (4 + 16 − v) / 2048 more.
Source: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekernels.sparse.stacking import ROWS

VERSION = 3
TILE_K, TILE = 128, 2048
#: Lanes of a warp, 32-bit words of a tile's bitmap, and the units that they take.
LANES, WORDS, WORD_UNITS = 32, 64, 16
UNIT_BYTES, CHUNK_UNITS = 16, 32

#: Value types and their numbers in a stored header.
VALUE_CODES: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

VALUE_NAMES = "bfloat16, float16 or float32"

# Elements handled at once: temporaries stay in cache, and small beside the weight.
_CHUNK_ELEMENTS = 1 << 18


def lines_tiles(out_features: int, in_features: int) -> tuple[int, int]:
    """Lines of 16 rows and tiles of 128 columns in each, of an (N, K) weight."""
    return -(-out_features // ROWS), -(-in_features // TILE_K)


def integer(dtype: torch.dtype) -> torch.dtype:
    """The integer type of a value's bits."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def most_chunks(dtype: torch.dtype) -> int:
    """Pieces of 512 bytes that a record takes which has no zeros."""
    return -(-(WORD_UNITS + TILE * dtype.itemsize // UNIT_BYTES) // CHUNK_UNITS)


def record_units(counts: Tensor, itemsize: int) -> Tensor:
    """Units of records with so many values."""
    return WORD_UNITS + (counts * itemsize + UNIT_BYTES - 1) // UNIT_BYTES


def chunks_of(starts: Tensor) -> int:
    """Pieces of 512 bytes that the largest record takes."""
    return -(-int(starts.diff().max()) // CHUNK_UNITS)


def check_parts(
    records: Tensor, starts: Tensor, chunks: int, dtype: torch.dtype, rows: int, columns: int
) -> None:
    """Raise ValueError unless the parts can be a packed (rows, columns) weight."""
    lines, tiles = lines_tiles(rows, columns)
    what = f"of a packed ({rows}, {columns}) bitmap weight"
    if dtype not in VALUE_CODES:
        raise ValueError(f"packed bitmap values must be {VALUE_NAMES}, not {dtype}")
    if records.dtype != torch.int32 or records.ndim != 2 or records.shape[1] != 4:
        raise ValueError(
            f"the records {what} are int32 of shape (units, 4), not {records.dtype} "
            f"{tuple(records.shape)}: pack the weight again"
        )
    if starts.dtype != torch.int32 or tuple(starts.shape) != (lines * tiles + 1,):
        raise ValueError(
            f"the starts {what} are int32 of shape {(lines * tiles + 1,)}, not {starts.dtype} "
            f"{tuple(starts.shape)}: pack the weight again"
        )
    if not 1 <= chunks <= most_chunks(dtype):
        raise ValueError(
            f"the records {what} take 1 to {most_chunks(dtype)} chunks of 512 bytes, not {chunks}: "
            "pack the weight again"
        )
    for name, tensor in (("records", records), ("starts", starts)):
        if not tensor.is_contiguous():
            raise ValueError(f"packed {name} must be contiguous: call .contiguous() on it")
        if tensor.device != records.device:
            raise ValueError(
                f"packed {name} is on {tensor.device}, the records on {records.device}: move the "
                "whole weight with .to(device)"
            )


def meta_parts(rows: int, columns: int, sparsity: float = 0.5) -> tuple[Tensor, Tensor]:
    """Records and starts of a (rows, columns) weight of 16-bit values, without memory."""
    lines, tiles = lines_tiles(rows, columns)
    units = lines * tiles * (WORD_UNITS + int(TILE * (1 - sparsity)) // 8)
    return (
        torch.empty((units, 4), dtype=torch.int32, device="meta"),
        torch.empty(lines * tiles + 1, dtype=torch.int32, device="meta"),
    )


def line_ranges(lines: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of lines that are handled at once."""
    size = max(1, _CHUNK_ELEMENTS // (ROWS * columns))
    for first in range(0, lines, size):
        yield first, min(first + size, lines)


def words_of(records: Tensor, starts: Tensor) -> Tensor:
    """Bitmap words of the records that start at these units: int32 (tiles, 64), lane by lane."""
    unit = torch.arange(WORD_UNITS, device=records.device)
    return records[(starts.long()[:, None] + unit).view(-1)].view(-1, WORDS)


def set_bits(device: torch.device) -> Tensor:
    """The bits of every byte, lowest first: uint8 (256, 8)."""
    every = torch.arange(256, device=device)[:, None]
    return (every >> torch.arange(8, device=device) & 1).to(torch.uint8)


def count_bits(words: Tensor) -> Tensor:
    """Set bits of every word of each tile (tiles, words), together: int64 (tiles,)."""
    count = set_bits(words.device).sum(1)
    bytes_ = words.contiguous().view(torch.uint8).view(len(words), -1)
    return count[bytes_.to(torch.int32)].sum(1)
