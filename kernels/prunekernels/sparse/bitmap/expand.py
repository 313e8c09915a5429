"""A packed bitmap's weight in torch: whole, or some lines at a time inside a product on a CPU.

Elements are handled in pairs, the two that share an operand register: columns c = 0, 1 of a lane,
step, u and h. If v₀, v₁, … are the values and q of them come before a pair's second element, then
that element, if its bit is set, is v_q, and the first, if set, is v_{q−1}: a pair is one load from
a table of neighbours, and a mask. Within a run, q depends on the bits of one byte of the bitmap, a
lane's in a step: q and the masks are tables of 256. Running counts of the bytes say the rest.

Pairs come out as two matrices, for h = 0 and 1: rows (line, g) and the columns in their own order.
Format: `bitmap.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.sparse.bitmap.layout import (
    LANES,
    TILE_K,
    UNIT_BYTES,
    WORD_UNITS,
    line_ranges,
    lines_tiles,
    set_bits,
    words_of,
)
from prunekernels.sparse.stacking import ROWS

# Types as wide as one value, a pair, and the two pairs of a byte, by the bytes of a value.
_WIDE = {
    2: (torch.int16, torch.int32, torch.int64),
    4: (torch.int32, torch.int64, torch.complex128),
}


def bitmap_unpack(
    records: Tensor, starts: Tensor, dtype: torch.dtype, rows: int, columns: int
) -> Tensor:
    """The dense (rows, columns) weight that records hold.

    Args:
        records: int32 (units, 4).
        starts: int32 (lines·tiles + 1,).
        dtype: Type of the values.
        rows: N.
        columns: K.

    Returns:
        A new contiguous tensor of that type, on their device.
    """
    dense = torch.empty((rows, columns), dtype=dtype, device=records.device)
    for first, part in dense_rows(records, starts, dtype, rows, columns):
        dense[first : first + len(part)] = part
    return dense


def dense_rows(
    records: Tensor, starts: Tensor, dtype: torch.dtype, rows: int, columns: int
) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of the weight, some lines at a time."""
    for first, last, halves in _lines(records, starts, dtype, rows, columns):
        # (line, h, g); `stack` would ask autocast for a type
        both = halves[0].new_empty((last - first, 2, 8, halves[0].shape[1]))
        for h, half in enumerate(halves):
            both[:, h] = half.view(last - first, 8, -1)
        yield first * ROWS, both.view((last - first) * ROWS, -1)[: rows - first * ROWS, :columns]


def product(x: Tensor, records: Tensor, starts: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b, expanding some lines of the weight at a time.

    Equivalent to `F.linear(x, bitmap_unpack(...), bias)` without ever holding that weight.

    Args:
        x: (M, K), of the values' type.
        records: int32 (units, 4).
        starts: int32 (lines·tiles + 1,).
        rows: N.
        bias: (N,) or None.

    Returns:
        (M, N), contiguous.
    """
    tokens, columns = x.shape
    lines, tiles = lines_tiles(rows, columns)
    x = F.pad(x, (0, TILE_K * tiles - columns))
    if bias is not None:
        bias = F.pad(bias, (0, ROWS * lines - rows)).view(lines, 2, 8)
    y = x.new_empty((tokens, lines, 2, 8))
    for first, last, halves in _lines(records, starts, x.dtype, rows, columns):
        for h, half in enumerate(halves):
            part = F.linear(x, half, None if bias is None else bias[first:last, h].flatten())
            y[:, first:last, h] = part.view(tokens, last - first, 8)
    return y.view(tokens, ROWS * lines)[:, :rows].contiguous()


def _lines(
    records: Tensor, starts: Tensor, dtype: torch.dtype, rows: int, columns: int
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """First and last line of some, and their weight: two (8·lines, padded columns), h = 0, 1."""
    kinds = _WIDE[dtype.itemsize]
    tables = _tables(*kinds, records.device)
    lines, tiles = lines_tiles(rows, columns)
    unit = UNIT_BYTES // dtype.itemsize
    for first, last in line_ranges(lines, columns):
        begins = starts[first * tiles : last * tiles + 1]
        begin, end = int(begins[0]), int(begins[-1])
        here = records[begin:end]
        begins = begins[:-1] - begin
        before = (begins + WORD_UNITS)[:, None] * unit
        neighbours = _neighbours(here.view(kinds[0]).view(-1), kinds[1])
        pairs = _expand(words_of(here, begins), before, last - first, neighbours, tables)
        yield first, last, [half.view(dtype).view(8 * (last - first), -1) for half in pairs]


def _tables(
    single: torch.dtype, pair: torch.dtype, pairs: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """For h = 0 and 1, by byte: two int32 (as an int64), the values of each run up to the first
    element of its pair; and the masks of both pairs."""
    bits = set_bits(device).view(256, 2, 2, 2)  # byte, u, h, c
    upto = bits.view(256, 2, 4).cumsum(2, dtype=torch.int32).view(bits.shape)[..., 0]
    keep = -bits.to(single)
    return [
        (
            upto[:, :, h].contiguous().view(torch.int64).view(-1),
            keep[:, :, h].contiguous().view(256, 4).view(pair).view(pairs).view(-1),
        )
        for h in (0, 1)
    ]


def _neighbours(values: Tensor, pair: torch.dtype) -> Tensor:
    """(v_{q−1}, v_q) for q = 0 … n, as one number each; what is no value is zero."""
    both = values.new_empty((len(values) + 1, 2))
    both[0, 0] = both[-1, 1] = 0
    both[1:, 0], both[:-1, 1] = values, values
    return both.view(pair).view(-1)


def _expand(
    words: Tensor,
    before: Tensor,
    lines: int,
    neighbours: Tensor,
    tables: list[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """The pairs of some lines, for h = 0 and 1, in the order (line, g, tile, block, p, t, s, u).

    Args:
        words: int32 (lines·tiles, 64).
        before: int32 (lines·tiles, 1), where in the records each tile's values are.
        lines: How many lines these are.
        neighbours: What `_neighbours` gives.
        tables: What `_tables` gives.
    """
    tiles = len(words) // lines
    bytes_ = words.view(torch.uint8).view(-1, LANES, 2, 4)
    # nibbles: how many values a lane has in the two runs of a step
    count = bytes_ - (bytes_ >> 1 & 0x55)
    count = (count & 0x33) + (count >> 2 & 0x33)
    count = count.permute(0, 2, 3, 1)
    shape = (len(bytes_), 2, 4, 2, LANES)
    runs = torch.empty(shape, dtype=torch.int32, device=words.device)
    runs[:, :, :, 0], runs[:, :, :, 1] = count & 15, count >> 4
    runs = runs.view(len(bytes_), -1)
    behind = runs.cumsum(1, dtype=torch.int32).sub_(runs).add_(before)
    # from the orders (line, tile, block, p, s, u, g, t) and (line, tile, g, t, block, p, s)
    behind = behind.view(lines, tiles, 2, 2, 2, 2, 8, 4).permute(0, 6, 1, 2, 3, 7, 4, 5).reshape(-1)
    places = bytes_.view(lines, tiles, 8, 4, 2, 2, 2).permute(0, 2, 1, 4, 5, 3, 6)
    places = places.to(torch.int32).reshape(-1)
    halves = []
    for upto, keep in tables:
        number = upto.index_select(0, places).view(torch.int32).add_(behind)
        pairs = neighbours.index_select(0, number)
        pairs &= keep.index_select(0, places).view(pairs.dtype)
        halves.append(pairs)
    return halves
