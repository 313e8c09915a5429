"""Launch configurations of the selection and update kernels.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. All of
it is *predicted*, from byte counts and compiled instruction counts.
"""

from __future__ import annotations

from typing import NamedTuple

#: Longest row whose keys one program holds on chip.
ROW_ON_CHIP = 16384


class RowConfig(NamedTuple):
    """Tile of the row selection kernels: scores per program, warps."""

    block: int
    num_warps: int


def row_tile(width: int) -> RowConfig:
    """At most 32 scores per thread, which leaves registers for counting."""
    block = 64
    while block < width:
        block *= 2
    return RowConfig(block, max(1, min(16, block // 512)))


#: What each program takes of a longer row: a running count needs more registers per score.
LONG_ROW = RowConfig(4096, 16)


class WordsConfig(NamedTuple):
    """Tile of the selection by words: parts of a row, words of a part, warps."""

    parts: int
    words: int
    num_warps: int


#: Most registers of a thread of that kernel: none are spilled, and 12 warps share a processor.
WORDS_REGISTERS = 168


def words_tile(words: int) -> WordsConfig:
    """A row's words in up to 8 parts of 8 per thread, by up to 4 warps."""
    warps = 1
    while warps < 4 and words > 2048 * warps:
        warps *= 2
    return WordsConfig(-(-words // (256 * warps)), 256 * warps, warps)


def rows_each(rows: int, warps: int, processors: int) -> int:
    """Rows that a program visits: 12 warps to a processor, so that guesses are handed on."""
    return -(-rows // (12 // warps * processors))


class NmConfig(NamedTuple):
    """Tile of the N:M kernel: log2 of the padded group, groups per program, warps."""

    levels: int
    groups: int
    num_warps: int


def nm_tile(of: int) -> NmConfig:
    """About 8 scores per thread in small groups, one group per thread from 8 on."""
    levels = max(0, (of - 1).bit_length())
    return NmConfig(levels, 256 if levels <= 2 else 128, 4)


class UpdateConfig(NamedTuple):
    """Tile of the SparseGPT kernel: rows per program, columns, warps."""

    rows: int
    columns: int
    num_warps: int


#: Most columns that the SparseGPT kernel visits before a matrix product updates the rest.
UPDATE_COLUMNS = 128


def update_tile(rows: int, columns: int) -> UpdateConfig:
    """Few rows per program: the walk over columns is a chain of latencies."""
    block = 16
    while block < columns:
        block *= 2
    return UpdateConfig(16, block, 4)


#: Tile of the kernel with a row per thread: 16 columns, so that no register is spilled and the
#: unrolled code stays short; one warp, so that few rows reach every processor.
UPDATE_THREAD = UpdateConfig(32, 16, 1)
