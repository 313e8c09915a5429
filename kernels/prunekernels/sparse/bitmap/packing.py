"""Packing dense rows into records: torch some lines at a time, and Triton kernels on a GPU.

Either way no copy of the dense weight is made, and the records are the same, bit for bit.
Format: `bitmap.layout`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.runtime import interpreting, triton_installed
from prunekernels.sparse.bitmap.layout import (
    LANES,
    TILE,
    TILE_K,
    UNIT_BYTES,
    integer,
    line_ranges,
    lines_tiles,
    record_units,
)
from prunekernels.sparse.stacking import ROWS


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Records and starts of a dense (N, K) weight, on its device."""
    if weight.device.type == "cuda" and triton_installed() and not interpreting():
        from prunekernels.sparse.bitmap import packing_triton

        return packing_triton.pack(weight)
    ranges = line_ranges(lines_tiles(*weight.shape)[0], weight.shape[1])
    return pack_rows(weight[first * ROWS : last * ROWS] for first, last in ranges)


def pack_rows(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Records and starts of dense rows that come some lines of 16 at a time."""
    records, units = [], []
    for rows in parts:
        record, size = _pack_lines(rows)
        records.append(record)
        units.append(size)
    return torch.cat(records), as_starts(torch.cat(units))


def as_starts(units: Tensor) -> Tensor:
    """`starts` of records of so many units.

    Raises:
        ValueError: If 32 bits do not hold them.
    """
    ends = units.long().cumsum(0)
    if ends.device.type != "meta" and int(ends[-1]) >= 2**31:
        raise ValueError(
            f"a packed bitmap holds less than {UNIT_BYTES * 2**31} bytes, not "
            f"{UNIT_BYTES * int(ends[-1])}: split the weight by rows"
        )
    return F.pad(ends, (1, 0)).to(torch.int32)


def _pack_lines(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Records of dense (rows, K), and how many units each takes."""
    lines, tiles = lines_tiles(*rows.shape)
    kind, itemsize = integer(rows.dtype), rows.dtype.itemsize
    padded = F.pad(rows, (0, tiles * TILE_K - rows.shape[1], 0, lines * ROWS - rows.shape[0]))
    # row = (h, g), column = (block, p, t, s, u, c)
    elements = padded.contiguous().view(lines, 2, 8, tiles, 2, 2, 4, 2, 2, 2)
    elements = elements.permute(0, 3, 4, 5, 7, 8, 2, 6, 1, 9).reshape(-1, TILE)
    used = elements != 0
    units = record_units(used.sum(1), itemsize)
    words = _words(used).view(kind)
    # a record is the words, what is used of the values, and what is used of a filling
    length = units * (UNIT_BYTES // itemsize) - used.sum(1) - words.shape[1]
    filling = torch.arange(UNIT_BYTES // itemsize - 1, device=rows.device) < length[:, None]
    everything = [words, elements.view(kind), torch.zeros_like(filling, dtype=kind)]
    chosen = torch.cat([torch.ones_like(words, dtype=torch.bool), used, filling], 1)
    return torch.cat(everything, 1)[chosen].view(torch.int32).view(-1, 4), units


def _words(used: Tensor) -> Tensor:
    """Bitmap words (tiles, 64) of flags (tiles, 2048) in the order of the values."""
    # four flags are the bytes of a 32-bit word; the product gathers them in its top nibble
    runs = (used.view(torch.int32) * 0x01020408 >> 24 & 15).to(torch.uint8).view(-1, 2, 4, 2, LANES)
    bytes_ = runs[:, :, :, 0] | runs[:, :, :, 1] << 4
    return bytes_.permute(0, 3, 1, 2).contiguous().view(torch.int32).view(len(used), -1)
