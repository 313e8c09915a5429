"""Launch configurations of the metric kernels.

Pure functions of shape, type and architecture; nothing is probed at import, and at run time the
number of multiprocessors alone. An entry marked *measured* was measured on an H200 on 2026-11-27
(bench/results/NVIDIA_H200); one marked *predicted* comes from byte counts and compiled instruction
counts, not from a measurement. Other GPUs have the same tables, with splits by their own number of
multiprocessors: predicted.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prunekernels import runtime

#: The kernels of a pair of rows: "tile" (four or two warps to a split) is impl="triton" and
#: what "auto" takes; "warp" (one warp to a split) is impl="triton_warp", which runs by name until a
#: GPU has decided between the two.
DESIGNS = ("tile", "warp")


class PairConfig(NamedTuple):
    """How a kernel of pairs of rows is compiled and launched.

    Attributes:
        lanes: Parts of a row that are summed side by side, each 16 bytes wide (tile: 4 columns).
        units: How many neighbours of these make a tile, between two looks at the largest logit.
        num_warps: Warps per program.
        registers: Most registers of a thread, 0 to leave it to the compiler.
        warp: Threads of a warp: 32, on AMD's CDNA 64.
        design: One of `DESIGNS`.
    """

    lanes: int
    units: int
    num_warps: int
    registers: int = 0
    warp: int = 32
    design: str = "tile"


class MergeConfig(NamedTuple):
    """Tile of the merge kernel: rows per program, splits read at a time, warps."""

    rows: int
    splits: int
    num_warps: int


def pair_config(
    rows: int,
    vocab: int,
    itemsize: int,
    *,
    precise: bool = False,
    every: bool = True,
    warp: int = 32,
    capability: tuple[int, int] = (9, 0),
    design: str = "tile",
) -> PairConfig:
    """The first pass over pairs of logit rows.

    Core by "tile" was measured (sweep_pair.csv, each shape is within 3 % of its best): two warps
    where rows fill the machine, four where a row is split over it. Everything else is predicted
    from compiled counts: "tile" of the precise level and on AMD, and "warp", of whose programs of
    32 threads 16 share a multiprocessor if each takes 128 registers.

    Args:
        rows: N.
        vocab: V.
        itemsize: Bytes of a logit.
        precise: Whether the level is above core.
        every: Whether all fields are asked for, and not some.
        warp: Threads of a warp: 32, on AMD's CDNA 64, whose compiler knows no limit of registers.
        capability: Of the GPU.
        design: One of `DESIGNS`.
    """
    if design == "warp":
        # With few sums, four units would fill registers with logits and spill in rare paths.
        units = 4 if every or itemsize == 4 else 3
        registers = 168 if precise and every else 128
        return PairConfig(warp, units, 1, registers if warp == 32 else 0, warp, "warp")
    if precise or warp != 32:
        # One lane per thread: more need registers that then limit the programs in flight. With 128
        # of them four programs share a multiprocessor; on capability 8.0 the loop would spill.
        limited = warp == 32 and itemsize == 2 and capability != (8, 0)
        return PairConfig(128, 8, 128 // warp, 128 if limited else 0, warp)
    if itemsize == 4:
        return PairConfig(128, 4, 4, 128)
    if rows <= 256:
        return PairConfig(128, 4, 4, 96)
    return PairConfig(64, 4, 2, 96) if vocab <= 65536 else PairConfig(64, 8, 2, 128)


def full_config(design: str = "tile", warp: int = 32) -> PairConfig:
    """The second pass over pairs of logit rows (predicted).

    Args:
        design: One of `DESIGNS`.
        warp: Threads of a warp: 32, on AMD's CDNA 64.
    """
    if design == "warp":
        return PairConfig(warp, 2, 1, 0, warp, "warp")
    return PairConfig(256, 1, 4, 0, warp)


def tile_columns(config: PairConfig, words: bool) -> int:
    """Columns of a tile; words: "warp" reads eight bfloat16 at a time."""
    return (8 if words and config.design == "warp" else 4) * config.lanes * config.units


def pair_splits(
    rows: int, vocab: int, config: PairConfig, columns: int, processors: int = 132
) -> int:
    """Programs that share a row, so that few rows fill the machine too.

    "tile": as many as run at a time, each with at least 4096 columns (measured for 1, 64 and 2048
    rows). "warp", predicted: the fewest waves of equally long programs. A program takes
    as long as its tiles, and about two more for its start and end; a split costs the merge a bit.

    Args:
        rows: N.
        vocab: V.
        config: From `pair_config`.
        columns: Of a tile of "warp", from `tile_columns`.
        processors: Multiprocessors of the GPU.
    """
    if config.design == "tile":
        return max(1, min(vocab // 4096, 4 * processors // max(rows, 1)))
    slots = processors * (65536 // (config.warp * (config.registers or 168)))
    tiles = max(1, vocab // columns)
    most = max(1, min(tiles, slots // max(rows, 1) + 8))
    return min(range(1, most + 1), key=lambda splits: _cost(rows, tiles, splits, slots))


def _cost(rows: int, tiles: int, splits: int, slots: int) -> float:
    """Time of a first pass in tiles of one program."""
    waves = -(-rows * splits // slots)
    return waves * (-(-tiles // splits) + 2.0) + 0.02 * splits


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of a tensor's GPU; those of an H200 where it is on none."""
    return runtime.processors(tensor.device) if tensor.is_cuda else 132


def merge_config(splits: int, design: str = "tile") -> MergeConfig:
    """Rows × splits of about one warp's worth of float64 sums (predicted).

    The merge of "warp", which has more splits, reads up to 256 of them at once.
    """
    most = 256 if design == "warp" else 64
    block = 1
    while block < min(splits, most):
        block *= 2
    return MergeConfig(rows=max(1, 32 // block), splits=block, num_warps=max(1, block // 64))


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


def vector_warp_config(warp: int = 32) -> PairConfig:
    """Pairs of vectors, one row to a warp: a tile of 2048 bfloat16 in flight (predicted).

    Args:
        warp: Threads of a warp: 32, on AMD's CDNA 64.
    """
    return PairConfig(warp, 8, 1, 0, warp, "warp")


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

    Measured (metrics.csv, D = 4096, V = 152064, bfloat16): at one row fused 0.41 ms, two products
    and the pair kernel 0.62; at 64 rows 1.23 against 0.69; at 2048 rows with D = 1024 13.4 against
    2.87. The bound between 1 and 64 is interpolated. *Predicted*: one product of both states, which
    reads the head once, takes 0.34 at one row and would win everywhere; with two heads the fused
    kernel reads both, and its lead ends sooner.

    Args:
        rows: N, pairs of states.
        one_head: whether both states share a head.
    """
    return rows <= (16 if one_head else 4)


def head_loss_order(
    rows: int, vocab: int, width: int, capability: tuple[int, int], itemsize: int = 2
) -> list[tuple[str, str]]:
    """Implementations of a loss of hidden states on an NVIDIA GPU, preferred first, with reasons.

    Args:
        rows: N.
        vocab: V.
        width: D.
        capability: CUDA compute capability.
        itemsize: Bytes of a number of the states.
    """
    return [("eager", "torch's operators: the kernel has not run on hardware, ask for it by name")]
