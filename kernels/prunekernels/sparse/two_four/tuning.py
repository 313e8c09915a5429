"""Launch configurations and order of the 2:4 kernels.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. An
entry marked *predicted* comes from byte counts and compiled instruction counts, not from a
measurement.
"""

from __future__ import annotations

from typing import NamedTuple

from prunekernels.sparse.tuning import PortableConfig


class MmaConfig(NamedTuple):
    """Tile of the mma.sp kernel.

    Attributes:
        row_tiles: Tiles of 16 weight rows per warp; gated, the gate's tile and the up's.
        token_tiles: Tiles of 8 tokens.
        stages: Depth of the shared-memory ring, a power of two.
        splits: Programs that share the columns of one block of rows.
        warps: Warps of a program.
    """

    row_tiles: int
    token_tiles: int
    stages: int
    splits: int
    warps: int = 4


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


class WgmmaConfig(NamedTuple):
    """Tile of the wgmma.sp kernel whose x comes by TMA.

    Attributes:
        warps: 8 or 16: four for each 64 weight rows.
        token_tiles: Tiles of 8 tokens: 4, 8 or 16.
        splits: Programs that share the columns of one block of rows.
        group: Blocks of rows that run together if there are many tokens; 0 leaves the grid's order.
    """

    warps: int
    token_tiles: int
    splits: int
    group: int


def sparse24_wgmma(
    tokens: int, rows: int, columns: int, gated: bool, processors: int
) -> WgmmaConfig:
    """Tile of the wgmma.sp kernel (predicted).

    Args:
        tokens: M.
        rows: N.
        columns: K.
        gated: Whether gate and up share a program.
        processors: Multiprocessors of the device.

    Returns:
        The configuration: 256 rows × 128 tokens, one program per multiprocessor; for up to 64
        tokens 128 rows and two programs. Up to four share the columns, of which each has two units
        at least, while that fills the device.
    """
    if tokens > 64:
        chosen = WgmmaConfig(16, 16, 1, 8)
    else:
        chosen = WgmmaConfig(8, 8 if tokens > 32 else 4, 1, 0)
    height = chosen.warps * (8 if gated else 16)
    programs = -(-tokens // (8 * chosen.token_tiles)) * -(-rows // height)
    slots = processors * (16 // chosen.warps)
    return chosen._replace(splits=max(1, min(4, slots // programs, columns // 512)))
