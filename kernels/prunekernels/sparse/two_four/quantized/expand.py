"""Quantised 2:4 words made 16- or 32-bit ones with torch, and those expanded by `two_four.expand`.

The order of values and the metadata are `two_four.layout`'s, so a few lines at a time become a
packed buffer of that format: of numbers scaled to weights, or of bare integers. Format:
`two_four.quantized.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekernels.sparse.two_four.expand import product as expanded_product
from prunekernels.sparse.two_four.expand import sparse24_unpack
from prunekernels.sparse.two_four.layout import block_words as wide_words
from prunekernels.sparse.two_four.quantized.layout import (
    ROWS,
    SYMMETRIC_ZERO,
    TAIL_STEPS,
    UNIT_STEPS,
    ValueKind,
    block_words,
    group_of,
    line_blocks,
)

# Columns of rows expanded at once: temporaries stay small beside the weight.
_CHUNK = 1 << 19
_BYTE = 0xFF


def unpack(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: ValueKind,
    dtype: torch.dtype,
) -> Tensor:
    """The dense (rows, columns) weight: (code − zero)·scale in float32, rounded once to `dtype`.

    Args:
        packed: int32, shape `packed_shape(rows, columns, kind.bits)`.
        scales: float32, shape `scales_shape(rows, columns, group)`.
        zeros: uint8, like the scales, or None.
        rows: N.
        columns: K.
        kind: How values are held.
        dtype: bfloat16, float16 or float32.
    """
    dense = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    for part, words in _wide(packed, scales, zeros, rows, columns, kind, dtype):
        target = dense[part]
        target.copy_(sparse24_unpack(words, len(target), columns, dtype))
    return dense


def product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    kind: ValueKind,
    bias: Tensor | None,
) -> Tensor:
    """x·Wᵀ + b with some lines of the weight expanded at a time, (M, N), contiguous.

    Args:
        x: (M, K), of a type that the weight can be expanded to.
        packed: As in `unpack`.
        scales: As in `unpack`.
        zeros: As in `unpack`.
        rows: N.
        kind: As in `unpack`.
        bias: (N,) or None.
    """
    y = x.new_empty((x.shape[0], rows))
    for part, words in _wide(packed, scales, zeros, rows, x.shape[1], kind, x.dtype):
        count = min(part.stop, rows) - part.start
        y[:, part] = expanded_product(x, words, count, None if bias is None else bias[part])
    return y


def numbers(packed: Tensor, zeros: Tensor | None, columns: int, kind: ValueKind) -> Tensor:
    """What the scales multiply: int16 (lines, steps, 32 lanes, 4 registers, 2), code − zero.

    Of fp8 values it is the codes' bits, in int16.
    """
    parts, start = [], 0
    _, units, tails = line_blocks(ROWS * len(packed), columns)
    per_lane = kind.bits // 4
    for blocks, steps in ((units, UNIT_STEPS), (tails, TAIL_STEPS)):
        if not blocks:
            continue
        size = block_words(steps, kind.bits)
        block = packed[:, start : start + blocks * size].view(len(packed), blocks, size)
        quad = min(4, steps * per_lane)
        words = block[..., : -16 * steps].view(len(packed), blocks, -1, 32, quad)
        words = words.transpose(2, 3).reshape(len(packed), blocks, 32, steps, per_lane)
        parts.append(words.transpose(2, 3).reshape(len(packed), blocks * steps, 32, per_lane))
        start += blocks * size
    words = torch.cat(parts, 1)
    if kind.bits == 4:
        shifts = packed.new_tensor([[4 * r, 4 * r + 16] for r in range(4)])
        codes = (words[..., None] >> shifts & 0xF).to(torch.int16)
        if zeros is None:
            return codes.sub_(SYMMETRIC_ZERO)
        return codes.sub_(of_steps(zeros, columns, codes.shape[1]).to(torch.int16))
    if kind.format == "2:4-fp8":
        shifts = packed.new_tensor([[8, 24], [0, 16]])
        codes = (words[..., None, None] >> shifts & _BYTE).to(torch.int16)
        return codes.view(*words.shape[:3], 4, 2)
    # an odd register's values come to the places of an even one's
    turned = torch.stack((words, words << 24 | (words >> 8 & 0xFFFFFF)), -1)
    halves = turned.view(torch.int16).view(*words.shape[:3], 4, 2)
    magnitude = halves & 0x7F
    return torch.where(halves < 0, -magnitude, magnitude)


def of_steps(rows: Tensor, columns: int, steps: int) -> Tensor:
    """Scales or zeros (lines, groups, 16) as (lines, steps, 32 lanes, 4 registers, 1)."""
    group = group_of(columns, rows.shape[1]) or 32 * steps
    at = torch.arange(steps, device=rows.device) * 32 // group
    pairs = rows.view(*rows.shape[:2], 8, 2)[:, at]
    # lane = 4·g + t; registers 0 and 2 are row g, 1 and 3 row g + 8
    return pairs.repeat_interleave(4, 2).repeat(1, 1, 1, 2)[..., None]


def _wide(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: ValueKind,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time as packed words of `two_four.layout`, with values of `dtype`."""
    lines, units, tails = line_blocks(rows, columns)
    at_once = max(1, _CHUNK // (ROWS * (units * 256 + tails * 64)))
    for first in range(0, lines, at_once):
        some = slice(first, first + at_once)
        below = None if zeros is None else zeros[some]
        counts = numbers(packed[some], below, columns, kind)
        if kind.format == "2:4-fp8":
            values = counts.to(torch.uint8).view(torch.float8_e4m3fn).float()
        else:
            values = counts.float()
        values = values * of_steps(scales[some], columns, counts.shape[1])
        words = widened(values.to(dtype), packed[some], columns, kind)
        yield slice(first * ROWS, (first + len(words)) * ROWS), words


def widened(values: Tensor, packed: Tensor, columns: int, kind: ValueKind) -> Tensor:
    """Values (lines, steps, 32, 4, 2) and the metadata of `packed`, in `two_four.layout`."""
    lines, units, tails = line_blocks(ROWS * len(packed), columns)
    wide = values.element_size() // 2
    # planes: of 32-bit values the first kept ones, then the second
    bits = values.view(torch.int32)
    bits = bits.view(*values.shape[:2], 32, 4, wide).permute(0, 1, 4, 2, 3)
    size = units * wide_words(UNIT_STEPS, values.dtype) + tails * wide_words(
        TAIL_STEPS, values.dtype
    )
    out = packed.new_empty((lines, size))
    start = to = step = 0
    for blocks, steps in ((units, UNIT_STEPS), (tails, TAIL_STEPS)):
        if not blocks:
            continue
        narrow, broad = block_words(steps, kind.bits), wide_words(steps, values.dtype)
        target = out[:, to : to + blocks * broad].view(lines, blocks, broad)
        source = packed[:, start : start + blocks * narrow].view(lines, blocks, narrow)
        target[..., -16 * steps :] = source[..., -16 * steps :]
        held = bits[:, step : step + blocks * steps]
        target[..., : -16 * steps] = held.reshape(lines, blocks, -1)
        start, to, step = start + blocks * narrow, to + blocks * broad, step + blocks * steps
    return out
