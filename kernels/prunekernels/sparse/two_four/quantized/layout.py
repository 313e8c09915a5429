"""The packed format of 2:4 weights with 8- and 4-bit values: metadata and order as in `two_four`.

A weight is (code − zero)·scale, and exactly zero where it is not kept. Rows are padded to 16,
columns to 64. The buffer holds one line per 16 rows: first the *units* of 256 columns, then what is
left as *tails* of 64 columns. In 32-bit words, where P is the number of words that hold the eight
values of a lane in one step (4-bit values: 1, 8-bit values: 2):

    unit  2·P blocks × 32 lanes × 4 value words, then 32 lanes × 4 metadata words
    tail  32 lanes × 2·P value words, then 32 lanes × 1 metadata word

A step is 32 columns, as one `mma.sp.m16n8k32` reads. Its operand A has four registers in a lane,
of two values each, and the metadata words are those of `two_four.layout`. The values of step s
are the words s·P … of a lane in its blocks. In them, for register r (0 … 3) of the operand:

    int4  bits 4r … 4r + 3 are its low value, and 16 higher its high one: the code, 0 … 15;
    fp8   word r / 2: an even register has bytes 1 and 3, an odd one bytes 0 and 2: e4m3 codes;
    int8  word r / 2: sign and magnitude. An even register has the sign of its low value in bit 15
          and the magnitude in bits 0 … 6, and 16 higher its high value; an odd one has the same
          in the word rotated left by 8.

So one or two logical instructions make a register's two 16-bit floats (`mma`).

Scales and zeros are (lines, groups, 16): rows g and g + 8 of a line stand side by side, as a lane
needs them. A group is 64 or 128 columns, the last one maybe shorter, or the whole row. Symmetric
4-bit codes are 8 more than the integers; values that only fill a group of four stand for zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunekernels.sparse.two_four.layout import (
    ROWS,
    TAIL_K,
    TAIL_STEPS,
    UNIT_K,
    UNIT_STEPS,
    VALUE_CODES,
    VALUE_NAMES,
    line_blocks,
)

__all__ = [
    "GROUPS",
    "KINDS",
    "ROWS",
    "SYMMETRIC_ZERO",
    "TAIL_K",
    "TAIL_STEPS",
    "UNIT_K",
    "UNIT_STEPS",
    "VALUE_CODES",
    "VALUE_NAMES",
    "VERSION",
    "Parts",
    "ValueKind",
    "block_words",
    "filled",
    "group_of",
    "groups_of",
    "line_blocks",
    "packed_shape",
    "scales_shape",
]

VERSION = 1
#: Columns that may share a scale, beside the whole row.
GROUPS = (64, 128)
#: The code of a 4-bit zero without zero points.
SYMMETRIC_ZERO = 8


class ValueKind(NamedTuple):
    """How a kept value is held.

    Attributes:
        format: Name of the format.
        code: Its number in a stored header.
        bits: Bits of a value.
        least: Its smallest integer (fp8: the largest magnitude, negated).
        most: Its largest integer (fp8: the largest magnitude).
        dtype: Type that integers are given in.
    """

    format: str
    code: int
    bits: int
    least: int
    most: int
    dtype: torch.dtype = torch.int8


#: The kinds of values by the name of their format.
KINDS = {
    kind.format: kind
    for kind in (
        ValueKind("2:4-int8", 3, 8, -127, 127),
        ValueKind("2:4-fp8", 4, 8, -448, 448, torch.float8_e4m3fn),
        ValueKind("2:4-int4", 5, 4, -8, 7),
    )
}


#: The tensors of a weight: buffer, scales, zero points.
Parts = tuple[Tensor, Tensor, Tensor | None]


def filled(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that a kernel's call takes: without zero points, something in their place."""
    packed, scales, zeros = parts
    return packed, scales, packed if zeros is None else zeros


def block_words(steps: int, bits: int) -> int:
    """32-bit words of a unit (8 steps) or a tail (2 steps): values and metadata."""
    return steps * (32 * bits // 4 + 16)


def packed_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int]:
    """Shape of the int32 buffer that holds a packed (N, K) weight of so many bits a value."""
    lines, units, tails = line_blocks(out_features, in_features)
    return lines, units * block_words(UNIT_STEPS, bits) + tails * block_words(TAIL_STEPS, bits)


def groups_of(in_features: int, group: int) -> int:
    """Number of groups of a row; group 0 is the whole row."""
    return 1 if group == 0 else -(-in_features // group)


def group_of(in_features: int, groups: int) -> int | None:
    """Columns of a group, 0 for the whole row; None if no size makes so many groups."""
    if groups == 1:
        return 0
    return next((size for size in GROUPS if groups_of(in_features, size) == groups), None)


def scales_shape(out_features: int, in_features: int, group: int) -> tuple[int, int, int]:
    """Shape of the packed scales, and of the zeros, of an (N, K) weight."""
    return line_blocks(out_features, in_features)[0], groups_of(in_features, group), ROWS
