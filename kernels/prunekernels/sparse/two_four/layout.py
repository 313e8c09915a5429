"""The packed 2:4 format: one copy of a weight that serves every architecture and batch size.

A weight has N rows (outputs) and K columns (inputs); each group of four columns holds at most two
non-zeros. Rows are padded to 16, columns to 64. The buffer holds one line per 16 rows: first the
*units* of 256 columns, then what is left as *tails* of 64 columns. In 32-bit words, where V is the
number of words that hold the two kept values of a group (16-bit values: 1, 32-bit values: 2):

    unit  8 steps × V planes × 32 lanes × 4 value words, then 32 lanes × 4 metadata words
    tail  2 steps × V planes × 32 lanes × 4 value words, then 32 lanes × 1 metadata word

A step is 32 columns = 8 groups, in the order one `mma.sp.m16n8k32` reads. For lane = 4·g + t:
value word 0 is row g, group t; word 1 is row g + 8; words 2 and 3 are the same rows, group t + 4.
16-bit values stand two in a word, the first kept one in the low half; of 32-bit values plane 0
holds the first kept ones and plane 1 the second. Metadata word j of lanes t = 0, 1 belongs to step
2j and of lanes t = 2, 3 to step 2j + 1; its low half is row g, groups 4·(t mod 2) .. + 3, a nibble
each (index of the first kept value | index of the second << 2), its high half row g + 8.

Groups with fewer than two non-zeros keep explicit zeros. −0.0 is stored as 0.0; every other value,
NaN included, comes back bit for bit. Size: 9/16 of a 16-bit weight, 17/32 of a 32-bit one.
Source: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
"""

from __future__ import annotations

import torch

VERSION = 1
ROWS = 16
STEP_K = 32
UNIT_K, UNIT_STEPS = 256, 8
TAIL_K, TAIL_STEPS = 64, 2

#: Value types and their numbers in a stored header. 8- and 4-bit values take numbers from 3.
VALUE_CODES: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
VALUE_NAMES = "bfloat16, float16 or float32"


def line_blocks(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Lines of 16 rows, and units and tails in each line, of a packed (N, K) weight."""
    padded = -(-in_features // TAIL_K) * TAIL_K
    return -(-out_features // ROWS), padded // UNIT_K, padded % UNIT_K // TAIL_K


def value_words(dtype: torch.dtype) -> int:
    """V: 32-bit words that hold the two kept values of a group."""
    return dtype.itemsize // 2


def block_words(steps: int, dtype: torch.dtype) -> int:
    """32-bit words of a unit (8 steps) or a tail (2 steps): values and metadata."""
    return steps * (128 * value_words(dtype) + 16)


def packed_shape(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of the int32 buffer that holds a packed (N, K) weight with values of `dtype`."""
    lines, units, tails = line_blocks(out_features, in_features)
    return lines, units * block_words(UNIT_STEPS, dtype) + tails * block_words(TAIL_STEPS, dtype)


def bits_type(dtype: torch.dtype) -> torch.dtype:
    """The integer type as wide as a value."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32
