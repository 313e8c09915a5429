"""Integers to packed 8- and 4-bit words, and weights to integers by rounding to nearest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.layout import block_words as wide_words
from prunekernels.sparse.two_four.quantized.expand import of_steps
from prunekernels.sparse.two_four.quantized.layout import (
    ROWS,
    SYMMETRIC_ZERO,
    TAIL_STEPS,
    UNIT_STEPS,
    ValueKind,
    block_words,
    groups_of,
    line_blocks,
    packed_shape,
)

_CHUNK = 1 << 19


class Rounded(NamedTuple):
    """A weight as integers.

    Attributes:
        integers: (N, K), of the kind's type.
        scales: float32 (N, groups).
        zeros: int8 (N, groups), or None.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None


def by_groups(weight: Tensor, group: int) -> Tensor:
    """(N, groups, columns of a group) of a weight, zeros behind its last column."""
    columns = weight.shape[1]
    size = group or columns
    missing = groups_of(columns, group) * size - columns
    return torch.nn.functional.pad(weight, (0, missing)).view(len(weight), -1, size)


def round_to_nearest(weight: Tensor, group: int, symmetric: bool, kind: ValueKind) -> Rounded:
    """Integers of a finite (N, K) weight, each rounded to the nearest, with absmax scales.

    Symmetric: scale = max |w| / most. With zero points, from w ∈ [low, high] that holds 0: scale =
    (high − low) / 15, zero = round(−low / scale). All in float32.

    Args:
        weight: (N, K), zeros where nothing is kept.
        group: Columns that share a scale; 0: a row.
        symmetric: Without zero points.
        kind: How values are held.
    """
    grouped = by_groups(weight.float(), group)
    zeros = None
    if symmetric:
        scales = grouped.abs().amax(2) / kind.most
        zero = scales.new_zeros(())
        low, high = -kind.most, kind.most
    else:
        smallest, largest = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        # halves, so that the difference of huge values is finite
        scales = (largest / 2 - smallest / 2) / (15 / 2)
        zero = (-smallest / scales).nan_to_num(0.0).round_().clamp_(0, 15)
        zeros, low, high = zero.to(torch.int8), 0, 15
        zero = zero[..., None]
    steps = (grouped / scales[..., None]).nan_to_num_(0.0)
    steps = steps.view(len(weight), -1) if group == 0 else steps
    if kind.format == "2:4-fp8":
        held = steps.clamp_(low, high).to(kind.dtype)
        return Rounded(held.view(len(weight), -1)[:, : weight.shape[1]], scales, None)
    rounded = (steps.view(grouped.shape).round_() + zero).clamp_(low, high).to(torch.int8)
    return Rounded(rounded.view(len(weight), -1)[:, : weight.shape[1]].contiguous(), scales, zeros)


def packed_rows(rows: Tensor) -> Tensor:
    """Scales or zeros (N, groups) as (lines, groups, 16), in a lane's order."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))
    return (
        padded.view(-1, 2, ROWS // 2, rows.shape[1])
        .permute(0, 3, 2, 1)
        .reshape(-1, rows.shape[1], ROWS)
    )


def unpacked_rows(packed: Tensor, rows: int) -> Tensor:
    """Undo `packed_rows`: (N, groups)."""
    groups = packed.shape[1]
    wide = packed.view(-1, groups, ROWS // 2, 2).permute(0, 3, 2, 1)
    return wide.reshape(-1, groups)[:rows]


def pack_numbers(
    numbers: Tensor, mask: Tensor, zeros: Tensor | None, group: int, kind: ValueKind
) -> Tensor:
    """The packed buffer of int16 numbers: code − zero, or the codes of fp8.

    Args:
        numbers: int16 (N, K).
        mask: bool (N, K), True = kept.
        zeros: uint8 (lines, groups, 16), or None.
        group: Columns of a group; 0: a row.
        kind: How values are held.

    Raises:
        ValueError: What is kept is not 2:4 (names the first row and column).
    """
    rows, columns = numbers.shape
    lines, units, tails = line_blocks(rows, columns)
    out = torch.empty(packed_shape(rows, columns, kind.bits), dtype=torch.int32, device=mask.device)
    at_once = max(1, _CHUNK // (ROWS * columns))
    for first in range(0, lines, at_once):
        some = slice(first, first + at_once)
        part = slice(first * ROWS, (first + at_once) * ROWS)
        # as bits of a 16-bit type, of which zero is the only one that is not kept
        wide = sparse24_pack(numbers[part].contiguous().view(torch.float16), mask[part]).packed
        below = None if zeros is None else zeros[some]
        _narrow(wide, below, columns, units, tails, kind, out[some])
    return out


def _narrow(
    wide: Tensor,
    zeros: Tensor | None,
    columns: int,
    units: int,
    tails: int,
    kind: ValueKind,
    out: Tensor,
) -> None:
    """Write 16-bit words of some lines (`two_four.layout`) as words of `kind.bits` a value."""
    lines, per_lane = len(wide), kind.bits // 4
    start = to = step = 0
    steps_of_all = units * UNIT_STEPS + tails * TAIL_STEPS
    for blocks, steps in ((units, UNIT_STEPS), (tails, TAIL_STEPS)):
        if not blocks:
            continue
        broad, narrow = wide_words(steps, torch.float16), block_words(steps, kind.bits)
        source = wide[:, start : start + blocks * broad].view(lines, blocks, broad)
        target = out[:, to : to + blocks * narrow].view(lines, blocks, narrow)
        target[..., -16 * steps :] = source[..., -16 * steps :]
        values = source[..., : -16 * steps].contiguous().view(torch.int16)
        values = values.view(lines, blocks * steps, 32, 4, 2)
        if zeros is not None:
            level = of_steps(zeros, columns, steps_of_all)[:, step : step + blocks * steps]
            values = values + level.to(torch.int16)
        words = _words(values, kind, zeros is None)
        words = words.view(lines, blocks, steps, 32, per_lane).transpose(2, 3)
        quad = min(4, steps * per_lane)
        words = words.reshape(lines, blocks, 32, -1, quad).transpose(2, 3)
        target[..., : -16 * steps] = words.reshape(lines, blocks, -1)
        start, to, step = start + blocks * broad, to + blocks * narrow, step + blocks * steps


def _words(values: Tensor, kind: ValueKind, symmetric: bool) -> Tensor:
    """int32 (lines, steps, 32, words of a step) of int16 (lines, steps, 32, 4 registers, 2)."""
    wide = values.to(torch.int32)
    if kind.bits == 4:
        codes = wide + SYMMETRIC_ZERO if symmetric else wide
        shifts = codes.new_tensor([[4 * r, 4 * r + 16] for r in range(4)])
        return (codes << shifts).sum((3, 4), dtype=torch.int32)[..., None]
    words = wide.view(*values.shape[:3], 2, 2, 2)
    if kind.format == "2:4-fp8":
        shifts = wide.new_tensor([[8, 24], [0, 16]])
        return (words << shifts).sum((4, 5), dtype=torch.int32)
    halves = words.abs() | (words < 0).to(torch.int32) << 15
    both = halves[..., 0] | halves[..., 1] << 16
    even, odd = both.unbind(-1)
    return even | (odd << 8 | (odd >> 24 & 0xFF))
