"""Weights in version 2 of the bitmap format: what older versions of this package stored.

A tile was 16 rows × 64 columns, and its bits and values were tensors of their own:

    bitmap  int32 (lines, blocks, 32): bit 8·step + 4·u + 2·h + c of lane 4·g + t says that row
            g + 8·h, column 16·step + 8·u + 2·t + c is not zero
    values  (8·units,): the non-zeros in the order (tile, step, u, lane, h, c), each tile filled up
            with zeros to 8
    starts  int32 (lines·blocks + 1,): the unit where each tile starts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prunekernels.sparse.bitmap.layout import VALUE_CODES, line_ranges
from prunekernels.sparse.stacking import ROWS

#: The version, and the tensors of its state.
VERSION = 2
NAMES = frozenset({"bitmap", "starts", "values", "header"})

_BLOCK_K, _TILE, _UNIT = 64, 1024, 8


def dense_rows(state: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The dense rows of a weight that a version 2 `state_dict()` describes, some lines at a time.

    Raises:
        ValueError: If the tensors do not have the sizes that the header promises, or `starts` does
            not agree with the bits.
    """
    bitmap, starts, values = (state[name] for name in ("bitmap", "starts", "values"))
    _, rows, columns, code = state["header"].tolist()
    lines, blocks = -(-rows // ROWS), -(-columns // _BLOCK_K)
    if (
        bitmap.dtype != torch.int32
        or tuple(bitmap.shape) != (lines, blocks, 32)
        or starts.dtype != torch.int32
        or tuple(starts.shape) != (lines * blocks + 1,)
        or values.ndim != 1
        or code != VALUE_CODES.get(values.dtype)
    ):
        raise ValueError(
            f"a packed bitmap weight of version 2 and shape {(rows, columns)} has other tensors "
            f"than {tuple(bitmap.shape)}, {tuple(starts.shape)} and {tuple(values.shape)} of "
            f"{values.dtype}: pack the weight again"
        )
    if int(starts[0]) != 0 or int(starts[-1]) * _UNIT != len(values):
        raise ValueError("packed bitmap: starts do not agree with the values; pack it again")
    for first, last in line_ranges(lines, columns):
        begins = starts[first * blocks : last * blocks + 1].long()
        used = bitmap[first:last, :, :, None] >> torch.arange(32, device=bitmap.device) & 1
        used = used.view(-1, 32, 8, 4).transpose(1, 2).reshape(-1, _TILE).bool()
        counts = used.sum(1)
        if not bool((begins.diff() == (counts + _UNIT - 1) // _UNIT).all()):
            raise ValueError("packed bitmap: starts do not agree with the bits; pack it again")
        place = begins[:-1, None] * _UNIT + used.cumsum(1) - 1
        elements = values.new_zeros(used.shape)
        elements[used] = values[place[used]]
        # from (line, block, step, u, g, t, h, c)
        tiles = elements.view(last - first, blocks, 4, 2, 8, 4, 2, 2)
        dense = tiles.permute(0, 6, 4, 1, 2, 3, 5, 7).reshape(-1, blocks * _BLOCK_K)
        yield dense[: rows - first * ROWS, :columns]
