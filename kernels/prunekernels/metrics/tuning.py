"""Launch configurations of the metric kernels.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. An
entry marked *predicted* comes from byte counts and compiled instruction counts, not from a
measurement.
"""

from __future__ import annotations

from typing import NamedTuple


class PairConfig(NamedTuple):
    """Tile of the pair-statistics kernel: `lanes` × 4 columns, `units` of them between checks."""

    lanes: int
    units: int
    num_warps: int


class MergeConfig(NamedTuple):
    """Tile of the merge kernel: rows per program, splits read at a time, warps."""

    rows: int
    splits: int
    num_warps: int


def pair_config(warp: int = 32) -> PairConfig:
    """One lane per thread: more need registers that then limit the programs in flight.

    Args:
        warp: Threads of a warp: 32, on AMD's CDNA 64.
    """
    return PairConfig(lanes=128, units=8, num_warps=128 // warp)


def pair_options(precise: bool, warp: int = 32) -> dict[str, int]:
    """Compiler options of the pair-statistics kernel.

    Four programs of 128 threads share a multiprocessor if each takes 128 registers. Core needs no
    more, but left to itself the assembler for sm_80 takes up to 167 for some choices of fields.

    Args:
        precise: Whether the level is above core.
        warp: Threads of a warp: 32, on AMD's CDNA 64, whose compiler knows no such limit.
    """
    return {} if precise or warp != 32 else {"maxnreg": 128}


def pair_splits(rows: int, vocab: int) -> int:
    """Programs that share a row, so that few rows fill the machine too (predicted).

    Every split has at least one whole tile of 4096 columns.
    """
    tiles = max(1, vocab // 4096)
    return max(1, min(tiles, 1600 // max(rows, 1)))


def merge_config(splits: int) -> MergeConfig:
    """Rows × splits of about one warp's worth of float64 sums (predicted)."""
    block = 1
    while block < min(splits, 64):
        block *= 2
    return MergeConfig(rows=max(1, 32 // block), splits=block, num_warps=1)


class VectorConfig(NamedTuple):
    """Tile of the vector-statistics kernel: rows per program, columns at a time, warps."""

    rows: int
    block: int
    num_warps: int


def vector_config(width: int) -> VectorConfig:
    """About 1024 elements in flight per program (predicted)."""
    block = 64
    while block < min(width, 1024):
        block *= 2
    return VectorConfig(rows=1024 // block, block=block, num_warps=4)


class HeadConfig(NamedTuple):
    """Tile of the head-fused kernel: pairs of rows × tokens × depth, warps, pipeline stages."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


def head_config(rows: int, itemsize: int, precise: bool, capability: tuple[int, int]) -> HeadConfig:
    """Two accumulators of block_n × block_v share each tile of the head (predicted).

    The sums of a block of rows live in registers. 64 rows fit where products accumulate over a
    warpgroup (capability 9.0) at the core level; elsewhere they would spill, and so would wider
    tiles.
    """
    block_d = 64 if itemsize == 2 else 32
    if precise:
        return HeadConfig(16, 32, block_d, 4, 3)
    if rows > 16 and capability == (9, 0):
        return HeadConfig(64, 32, block_d, 8, 3)
    return HeadConfig(16, 64, block_d, 4, 3)


def head_splits(rows: int, vocab: int, config: HeadConfig) -> int:
    """Programs that share a block of rows (predicted): enough for two per multiprocessor."""
    blocks = -(-rows // config.block_n)
    tiles = -(-vocab // config.block_v)
    return max(1, min(tiles, 264 // max(blocks, 1)))


def head_fused(rows: int, one_head: bool) -> bool:
    """Whether the fused kernel is preferred to chunked products followed by the pair kernel.

    Measured on an H200 (2026-11-27, D = 4096, V = 152064, bfloat16): at one row fused 0.41 ms, two
    products and the pair kernel 0.62; at 64 rows 1.23 against 0.69; at 2048 rows with D = 1024 13.4
    against 2.87. The bound between 1 and 64 is interpolated. *Predicted*: one product of both
    states, which reads the head once, takes 0.34 at one row and would win everywhere; with two
    heads the fused kernel reads both, and its lead ends sooner.

    Args:
        rows: N, pairs of states.
        one_head: whether both states share a head.
    """
    return rows <= (16 if one_head else 4)
