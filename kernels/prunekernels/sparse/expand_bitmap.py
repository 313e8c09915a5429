"""The dense weight that a packed bitmap holds, in torch: the format is `layout_bitmap`.

A byte of the bitmap is what a lane holds in a step, eight elements. Running counts of the bytes say
where the values of each start; two tables, one number per byte and bit, say the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels.sparse.layout_bitmap import (
    BLOCK_K,
    LANES,
    TILE,
    UNIT,
    chunks,
    line_blocks,
    set_bits,
    starts_of,
    step_bytes,
)
from prunekernels.sparse.stacking import ROWS

# Integers as wide as one value, and as two, by the bytes of a value.
_INTEGERS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}


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
    lines, blocks = line_blocks(rows, columns)
    dense = torch.empty((rows, columns), dtype=values.dtype, device=values.device)
    bits, pair = _INTEGERS[values.dtype.itemsize]
    # eight elements at a time: tables say where the values of a byte's bits are, and which to keep
    set_ = set_bits(values.device)
    runs = set_.view(256, 2, 4)
    offset = ((runs.cumsum(2) - runs) * runs).to(torch.int32)
    count, keep = runs.sum(2, dtype=torch.int32), -set_.to(bits)
    order = None
    for first, last in chunks(lines, columns):
        begin, end = (int(starts[blocks * line]) * UNIT for line in (first, last))
        target = dense[first * ROWS : last * ROWS]
        if begin == end:
            target.zero_()
            continue
        bytes_ = step_bytes(bitmap[first:last])
        before = (starts_of(starts, first, last, columns)[:-1, None] - begin // UNIT) * UNIT
        counts = count.index_select(0, bytes_).view(-1, LANES, 2).transpose(1, 2)
        counts = counts.reshape(len(before), -1)
        # of a run behind the last value, nothing is kept
        before = (before + counts.cumsum(1, dtype=torch.int32) - counts).clamp_(max=end - begin - 1)
        before = before.view(-1, 2, LANES).transpose(1, 2).reshape(-1, 2, 1)
        number = offset.index_select(0, bytes_).add_(before)
        elements = values[begin:end].view(bits).index_select(0, number.view(-1))
        elements &= keep.index_select(0, bytes_).view(-1)
        if order is None:
            order = _pair_order(last - first, blocks, values.device)
        # the pairs of columns c = 0, 1 stay together: half as many elements to move
        pairs = elements.view(pair).index_select(0, order[: elements.shape[0] // 2])
        pairs = pairs.view(values.dtype).view(-1, blocks * BLOCK_K)
        target.copy_(pairs[: target.shape[0], :columns])
    return dense


def _pair_order(lines: int, blocks: int, device: torch.device) -> Tensor:
    """Which packed pair each pair of columns of 16·lines rows is: int32 (lines·blocks·512,)."""
    packed = torch.arange(lines * blocks * TILE // 2, dtype=torch.int32, device=device)
    # (line, block, step, g, t, u, h) to row = (h, g), column = (block, step, u, t)
    packed = packed.view(lines, blocks, 4, 8, 4, 2, 2).permute(0, 6, 3, 1, 2, 5, 4)
    return packed.reshape(-1)
