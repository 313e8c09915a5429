"""A packed bitmap's weight in torch: whole, or some lines at a time inside a product on a CPU.

Elements are handled in pairs, the two that share an operand register: columns c = 0, 1 of a lane,
step, u and h. If v₀, v₁, … are the values and q of them come before a pair's second element, then
that element, if its bit is set, is v_q, and the first, if set, is v_{q−1}: a pair is one load from
a table of neighbours, and a mask. Within a run, q depends on the bits of one byte of the bitmap, a
lane's in a step: q and the masks are tables of 256. Running counts of the bytes say the rest.

Pairs come out as two matrices, for h = 0 and 1: rows (line, g), columns (block, step, t, u, c), so
that nothing but the bytes and their counts changes places. Format: `bitmap.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.sparse.bitmap.layout import (
    BLOCK_K,
    LANES,
    RUNS,
    UNIT,
    chunks,
    line_blocks,
    set_bits,
    starts_of,
)
from prunekernels.sparse.stacking import ROWS

# Types as wide as one value, a pair, and the two pairs of a byte, by the bytes of a value.
_WIDE = {
    2: (torch.int16, torch.int32, torch.int64),
    4: (torch.int32, torch.int64, torch.complex128),
}


def bitmap_unpack(
    bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int
) -> Tensor:
    """The dense (rows, columns) weight that the three tensors hold.

    Args:
        bitmap: int32 (lines, blocks, 32).
        starts: int32 (lines·blocks + 1,).
        values: (8·units,).
        rows: N.
        columns: K.

    Returns:
        A new contiguous tensor of the values' type, on their device.
    """
    blocks = line_blocks(rows, columns)[1]
    dense = torch.empty((rows, columns), dtype=values.dtype, device=values.device)
    pair = _WIDE[values.dtype.itemsize][1]
    for first, last, halves in _blocks(bitmap, starts, values, columns):
        target = dense[first * ROWS : last * ROWS]
        # (line, h, g, block, step, u, t)
        wide = torch.empty((last - first, 2, 8, blocks, 4, 2, 4), dtype=pair, device=dense.device)
        for h, half in enumerate(halves):
            pairs = half.view(pair).view(last - first, 8, blocks, 4, 4, 2)
            wide[:, h].copy_(pairs.transpose(4, 5))
        wide = wide.view(dense.dtype).view(-1, blocks * BLOCK_K)
        target.copy_(wide[: len(target), :columns])
    return dense


def product(
    x: Tensor, bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, bias: Tensor | None
) -> Tensor:
    """x·Wᵀ + b, expanding some lines of the weight at a time.

    Equivalent to `F.linear(x, bitmap_unpack(...), bias)` without ever holding that weight, and
    faster on a CPU: the columns of x are put in the order of the packed ones, not the weight.

    Args:
        x: (M, K), of the values' type.
        bitmap: int32 (lines, blocks, 32).
        starts: int32 (lines·blocks + 1,).
        values: (8·units,).
        rows: N.
        bias: (N,) or None.

    Returns:
        (M, N), contiguous.
    """
    tokens, columns = x.shape
    lines, blocks = line_blocks(rows, columns)
    x = F.pad(x, (0, BLOCK_K * blocks - columns))
    # (block, step, u, t, c) to (block, step, t, u, c)
    x = x.view(tokens, blocks, 4, 2, 4, 2).transpose(3, 4).reshape(tokens, BLOCK_K * blocks)
    if bias is not None:
        bias = F.pad(bias, (0, ROWS * lines - rows)).view(lines, 2, 8)
    y = x.new_empty((tokens, lines, 2, 8))
    for first, last, halves in _blocks(bitmap, starts, values, columns):
        for h, half in enumerate(halves):
            part = F.linear(x, half, None if bias is None else bias[first:last, h].flatten())
            y[:, first:last, h] = part.view(tokens, last - first, 8)
    return y.view(tokens, ROWS * lines)[:, :rows].contiguous()


def _blocks(
    bitmap: Tensor, starts: Tensor, values: Tensor, columns: int
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """First and last line of some, and their weight: two (8·lines, padded columns), h = 0, 1."""
    kinds = _WIDE[values.dtype.itemsize]
    tables = _tables(*kinds, values.device)
    for first, last in chunks(len(bitmap), columns):
        begins = starts_of(starts, first, last, columns)
        begin, end = (int(begins[i]) * UNIT for i in (0, -1))
        before = (begins[:-1, None] - begins[0]) * UNIT
        neighbours = _neighbours(values[begin:end].view(kinds[0]), kinds[1])
        pairs = _expand(bitmap[first:last], before, neighbours, tables)
        yield first, last, [half.view(values.dtype).view(8 * (last - first), -1) for half in pairs]


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
    bitmap: Tensor, before: Tensor, neighbours: Tensor, tables: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """The pairs of some lines, for h = 0 and 1, in the order (line, g, block, step, t, u).

    Args:
        bitmap: int32 (lines, blocks, 32).
        before: int32 (lines·blocks, 1), values before each tile.
        neighbours: What `_neighbours` gives.
        tables: What `_tables` gives.
    """
    lines, blocks = bitmap.shape[:2]
    bytes_ = bitmap.contiguous().view(torch.uint8).view(-1, LANES, 4)
    # nibbles: how many values a lane has in the two runs of a step
    count = bytes_ - (bytes_ >> 1 & 0x55)
    count = (count & 0x33) + (count >> 2 & 0x33)
    count = count.transpose(1, 2)
    runs = torch.empty((len(bytes_), 4, 2, LANES), dtype=torch.int32, device=bitmap.device)
    runs[:, :, 0], runs[:, :, 1] = count & 15, count >> 4
    runs = runs.view(-1, RUNS * LANES)
    behind = runs.cumsum(1, dtype=torch.int32).sub_(runs).add_(before)
    # from the order (line, block, step, u, g, t), and (line, block, g, t, step)
    behind = behind.view(lines, blocks, 4, 2, 8, 4).permute(0, 4, 1, 2, 5, 3).reshape(-1)
    places = bytes_.view(lines, blocks, 8, 4, 4).permute(0, 2, 1, 4, 3)
    places = places.to(torch.int32).reshape(-1)
    halves = []
    for upto, keep in tables:
        number = upto.index_select(0, places).view(torch.int32).add_(behind)
        pairs = neighbours.index_select(0, number)
        pairs &= keep.index_select(0, places).view(pairs.dtype)
        halves.append(pairs)
    return halves
