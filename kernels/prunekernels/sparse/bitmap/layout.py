"""The bitmap format: any sparsity, one bit per weight and the non-zero values.

A weight has N rows (outputs) and K columns (inputs), padded to lines of 16 rows and blocks of 64
columns. A line and a block meet in a *tile* of 1024 weights. The bits follow the order in which the
lanes of a warp hold the left operand of four `mma.m16n8k16`: step (16 columns), lane, element. For
lane = 4·g + t, element i = 4·u + 2·h + c is row g + 8·h, column 16·step + 8·u + 2·t + c. The
values follow a finer one: the four elements of a lane that share step and u are a *run*, and the
runs of all lanes with one step and u lie side by side.

    bitmap  int32 (lines, blocks, 32): bit 8·step + i of a lane's word says element i is not zero
    values  (8·units,): the non-zeros of tile after tile, in the order (step, u, lane, h, c), each
            tile filled up with zeros to a unit of 8 values, so that 16 bytes are copied at a time
    starts  int32 (lines·blocks + 1,): the unit where each tile starts, and the number of units

Nothing depends on how the non-zeros are spread: full and empty rows, tiles and weights are all
exact, and a lane finds its values by counting the bits before its own. −0.0 is not stored; every
other value, NaN included, comes back bit for bit. Bytes per weight at sparsity s and value size v:
v·(1 − s) + 1/8, and for `starts` and the filling at most (4 + 7·v) / 1024 more.
Source: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekernels.sparse.stacking import ROWS

VERSION = 2
BLOCK_K, TILE = 64, 1024
#: Runs of four elements in a bitmap word, and lanes in a tile.
RUNS, LANES = 8, 32
UNIT = 8

#: Value types and their numbers in a stored header.
VALUE_CODES: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

VALUE_NAMES = "bfloat16, float16 or float32"

# Elements handled at once: temporaries stay in cache, and small beside the weight.
_CHUNK_ELEMENTS = 1 << 18


def line_blocks(out_features: int, in_features: int) -> tuple[int, int]:
    """Lines of 16 rows and blocks of 64 columns of an (N, K) weight."""
    return -(-out_features // ROWS), -(-in_features // BLOCK_K)


def check_parts(bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int) -> None:
    """Raise ValueError unless the tensors can hold a packed (rows, columns) weight."""
    lines, blocks = line_blocks(rows, columns)
    for name, tensor, wanted in (
        ("bitmap", bitmap, (lines, blocks, 32)),
        ("starts", starts, (lines * blocks + 1,)),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != wanted:
            raise ValueError(
                f"the {name} of a packed ({rows}, {columns}) weight is int32 of shape {wanted}, "
                f"not {tensor.dtype} {tuple(tensor.shape)}: pack the weight again"
            )
    if values.dtype not in VALUE_CODES or values.ndim != 1 or values.shape[0] % UNIT:
        raise ValueError(
            f"packed bitmap values are a vector of {VALUE_NAMES} whose length is a multiple of "
            f"{UNIT}, not {values.dtype} {tuple(values.shape)}: pack the weight again"
        )
    for name, tensor in (("bitmap", bitmap), ("starts", starts), ("values", values)):
        if not tensor.is_contiguous():
            raise ValueError(f"packed {name} must be contiguous: call .contiguous() on it")
        if tensor.device != bitmap.device:
            raise ValueError(
                f"packed {name} is on {tensor.device}, the bitmap on {bitmap.device}: move the "
                "whole weight with .to(device)"
            )


def meta_parts(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Bitmap, starts and values of a half dense (rows, columns) weight, without memory."""
    lines, blocks = line_blocks(rows, columns)
    return (
        torch.empty((lines, blocks, LANES), dtype=torch.int32, device="meta"),
        torch.empty(lines * blocks + 1, dtype=torch.int32, device="meta"),
        torch.empty(lines * blocks * TILE // 2, dtype=dtype, device="meta"),
    )


def chunks(lines: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of lines that are handled at once."""
    size = max(1, _CHUNK_ELEMENTS // (ROWS * columns))
    for first in range(0, lines, size):
        yield first, min(first + size, lines)


def starts_of(starts: Tensor, first: int, last: int, columns: int) -> Tensor:
    blocks = -(-columns // BLOCK_K)
    return starts[first * blocks : last * blocks + 1]


def step_bytes(bitmap: Tensor) -> Tensor:
    """The byte of every step and lane of bitmap words (…, 32), tile after tile, as int32."""
    bytes_ = bitmap.reshape(-1, 32, 1).view(torch.uint8).transpose(1, 2)
    return bytes_.reshape(-1).to(torch.int32)


def set_bits(device: torch.device) -> Tensor:
    """The bits of every byte, lowest first: uint8 (256, 8)."""
    every = torch.arange(256, device=device)[:, None]
    return (every >> torch.arange(8, device=device) & 1).to(torch.uint8)
