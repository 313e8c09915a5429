"""Launch configurations and order of the bitmap kernels.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. An
entry marked *predicted* comes from byte counts and compiled instruction counts, not from a
measurement.
"""

from __future__ import annotations

from typing import NamedTuple

from prunekernels.sparse.tuning import PortableConfig


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
