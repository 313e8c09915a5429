"""Launch configurations and dispatch tables: pure functions of shape, type and architecture.

Nothing is probed at import or at run time. An entry marked *predicted* comes from byte counts and
compiled instruction counts, not from a measurement.
"""

from __future__ import annotations

from typing import NamedTuple


class PortableConfig(NamedTuple):
    """Tile of the portable 2:4 kernel: tokens, weight rows, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class MmaConfig(NamedTuple):
    """Tile of the mma.sp kernel.

    Attributes:
        row_tiles: Tiles of 16 weight rows per warp (four warps).
        token_tiles: Tiles of 8 tokens.
        stages: Depth of the shared-memory ring, a power of two.
        splits: Programs that share the columns of one block of rows.
    """

    row_tiles: int
    token_tiles: int
    stages: int
    splits: int


def sparse24_order(
    tokens: int, rows: int, columns: int, capability: tuple[int, int], itemsize: int = 2
) -> list[tuple[str, str]]:
    """Implementations of a 2:4 linear layer on an NVIDIA GPU, preferred first, with reasons.

    Predicted: the sparse tensor cores win while the layer is bound by reading the weight; beyond
    that expanding the weight costs a few per cent of the dense multiplication.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        capability: CUDA compute capability.
        itemsize: Bytes of a value.

    Returns:
        `(name, reason)` pairs, never empty.
    """
    if itemsize > 2:
        # the portable kernel compiles to 32 instructions per float32 weight
        return [("eager", "float32: no tensor cores, so expand, then dense (predicted)")]
    if tokens <= 256:
        few = f"{tokens} tokens: bound by reading the weight (predicted, not measured)"
        return [("mma_sp", few), ("triton", few)] if tokens <= 64 else [("mma_sp", few)]
    return [("eager", f"{tokens} tokens: expand, then dense (predicted, not measured)")]


# What a launch costs, in bytes that a GPU reads meanwhile (4 µs at 4.3 TB/s).
_LAUNCH_BYTES = 17e6


# What the portable kernels reach of a dense layer on an H200, whose multiprocessors issue 128 lane
# instructions a clock while the memory brings 8.2 dense weights. 2:4 takes 13 instructions for a
# weight, so it makes 10 in a clock: hardly more. A bitmap takes 22: 5.8 weights.
_PORTABLE_SPEEDUP = {"2:4": 1.0, "bitmap": 0.7}


def packed_speedup(impl: str, tokens: int, dense: int, packed: int, what: str = "2:4") -> float:
    """Time of a dense layer over that of the packed one (predicted from bytes, not measured).

    Args:
        impl: The implementation that runs: "mma_sp" (2:4), "mma" (bitmap), "triton" or "eager".
        tokens: M.
        dense: Bytes of the dense weight.
        packed: Bytes of the packed weight.
        what: The format: "2:4" or "bitmap".
    """
    if impl in ("mma_sp", "mma") and tokens <= 64:
        gain = (dense + _LAUNCH_BYTES) / (packed + _LAUNCH_BYTES)
        # expanding a bitmap in registers costs about half of what reading less gains
        return gain if impl == "mma_sp" else (1 + gain) / 2
    if impl == "triton":
        return _PORTABLE_SPEEDUP[what]
    if impl != "eager":
        # as many instructions as the dense kernel has time for
        return 1.0
    if tokens > 256:
        return 0.93
    # few tokens: the packed weight is read, and the expanded one written and read
    return dense / (packed + 2 * dense)


def sparse24_portable(tokens: int, itemsize: int = 2) -> PortableConfig:
    """Tile of the portable kernel for M tokens and values of `itemsize` bytes (predicted)."""
    if itemsize > 2:
        return PortableConfig(16, 32, 8, 2)
    if tokens <= 16:
        return PortableConfig(16, 32, 4, 3)
    if tokens <= 32:
        return PortableConfig(32, 64, 4, 3)
    return PortableConfig(64, 64, 4, 2)


def sparse24_mma(tokens: int, rows: int, columns: int, gated: bool, processors: int) -> MmaConfig:
    """Tile of the mma.sp kernel (predicted).

    Args:
        tokens: M.
        rows: N.
        columns: K.
        gated: Whether gate and up share a program.
        processors: Multiprocessors of the device.

    Returns:
        The configuration. Two row tiles per warp; as many token tiles as M fills, at most eight:
        with those the registers that hold the next unit of the weight still suffice.
    """
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    blocks = -(-rows // (64 if gated else 128)) * -(-tokens // (8 * token_tiles))
    units = max(1, columns // 256)
    # about three programs per multiprocessor keep enough of the weight in flight; a split is worth
    # its float32 parts from two units on
    splits = max(1, min(-(-3 * processors // blocks), units // 2))
    return MmaConfig(2, token_tiles, 4 if token_tiles <= 2 else 2, splits)


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


def head_fused(rows: int, width: int) -> bool:
    """Whether the fused kernel is preferred to chunked products followed by the pair kernel.

    Predicted from byte counts, not measured: a chunk writes and reads its float32 logits, 16
    bytes a pair, which costs as much as the products unless D is large; with few rows, reading
    the head once is all there is.
    """
    return rows <= 64 or width <= 1024


def bitmap_order(
    tokens: int, rows: int, columns: int, capability: tuple[int, int], itemsize: int = 2
) -> list[tuple[str, str]]:
    """Implementations of a bitmap linear layer on an NVIDIA GPU, preferred first, with reasons.

    Predicted: a kernel that expands in registers wins while the dense layer is bound by reading its
    weight.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        capability: CUDA compute capability.
        itemsize: Bytes of a value.

    Returns:
        `(name, reason)` pairs, never empty.
    """
    if itemsize > 2:
        return [("eager", "float32: no tensor cores, so expand, then dense (predicted)")]
    if tokens <= 64:
        few = f"{tokens} tokens: bound by reading the weight (predicted, not measured)"
        return [("mma", few), ("triton", few)]
    return [("eager", f"{tokens} tokens: expand, then dense (predicted, not measured)")]


def bitmap_portable(tokens: int, itemsize: int = 2) -> PortableConfig:
    """Tile of the portable bitmap kernel for M tokens (predicted)."""
    if itemsize > 2:
        return PortableConfig(16, 32, 8, 2)
    return PortableConfig(16 if tokens <= 16 else 32 if tokens <= 32 else 64, 64, 4, 2)


def bitmap_splits(programs: int, blocks: int) -> int:
    """Programs that share the columns of one tile of the portable bitmap kernel (predicted).

    About 512 programs fill the machine; each has at least 8 blocks of 64 columns.
    """
    return max(1, min(512 // max(programs, 1), blocks // 8))


class BitmapMmaConfig(NamedTuple):
    """Tile of the tensor-core bitmap kernel.

    Attributes:
        row_tiles: Lines of 16 weight rows per warp (four warps).
        token_tiles: Tiles of 8 tokens.
        stages: Slots of the shared-memory rings.
        splits: Programs that share the columns of one block of rows.
        count_bits: Whether tensor cores count bits, or add bytes that the lanes have counted.
    """

    row_tiles: int
    token_tiles: int
    stages: int
    splits: int
    count_bits: bool = True


def bitmap_mma(
    tokens: int, rows: int, columns: int, processors: int, capability: tuple[int, int]
) -> BitmapMmaConfig:
    """Tile of the tensor-core bitmap kernel (predicted).

    Args:
        tokens: M.
        rows: N.
        columns: K.
        processors: Multiprocessors of the device.
        capability: Its CUDA compute capability; Blackwell's tensor cores do not count bits.
    """
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    blocks = -(-rows // 64) * -(-tokens // (8 * token_tiles))
    stages = max(1, columns // 128)
    # four programs fit a multiprocessor, and a few more than fit would double the time; a split is
    # worth its float32 parts from four stages on
    splits = max(1, min(4 * processors // blocks, stages // 4))
    return BitmapMmaConfig(1, token_tiles, 3, splits, capability < (10, 0))


#: Longest row whose keys one program holds on chip.
ROW_ON_CHIP = 16384


class RowConfig(NamedTuple):
    """Tile of the row selection kernels: scores per program, warps."""

    block: int
    num_warps: int


def row_tile(width: int) -> RowConfig:
    """At most 32 scores per thread, which leaves registers for counting (predicted)."""
    block = 64
    while block < width:
        block *= 2
    return RowConfig(block, max(1, min(16, block // 512)))


#: What each program takes of a longer row: a running count needs more registers per score.
LONG_ROW = RowConfig(4096, 16)


class NmConfig(NamedTuple):
    """Tile of the N:M kernel: log2 of the padded group, groups per program, warps."""

    levels: int
    groups: int
    num_warps: int


def nm_tile(of: int) -> NmConfig:
    """About 8 scores per thread in small groups, one group per thread from 8 on (predicted)."""
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
    """Few rows per program: the walk over columns is a chain of latencies (predicted)."""
    block = 16
    while block < columns:
        block *= 2
    return UpdateConfig(16, block, 4)
