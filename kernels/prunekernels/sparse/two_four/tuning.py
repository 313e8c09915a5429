"""Launch configurations and order of the 2:4 kernels.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. An
entry marked *measured* was measured on an H200 on 2026-11-27 (bench/results/NVIDIA_H200); one
marked *predicted* comes from byte counts and compiled instruction counts, not from a measurement.
"""

from __future__ import annotations

from typing import NamedTuple

from prunekernels.sparse.tuning import UNSWEPT_TOKENS, PortableConfig


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


#: Numbers of tokens, from and to, at which `wgmma_tma` was measured faster than all others on
#: compute capability 9.0. None yet: it only runs when asked for by name.
WGMMA_TOKENS: tuple[tuple[int, int], ...] = ()


def sparse24_order(
    tokens: int, rows: int, columns: int, capability: tuple[int, int], itemsize: int = 2
) -> list[tuple[str, str]]:
    """Implementations of a 2:4 linear layer on an NVIDIA GPU, preferred first, with reasons.

    Measured (sparse.csv): up to 256 tokens mma.sp is the fastest way to multiply with a packed
    weight, from 1024 on to expand it and multiply densely. A dense weight is faster than both from
    64 tokens (4096 × 4096) or 256 (larger ones) on, which `packed_speedup` tells. In between, for
    17 to 32 tokens, and on other GPUs, predicted. Blackwell's data-centre GPUs
    (10.x) have sparse tensor cores behind `tcgen05`, which no kernel here uses, and no `wgmma`:
    they keep mma.sp.

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
    swept = capability == (9, 0) and tokens not in UNSWEPT_TOKENS
    known = "measured on an H200" if swept else "predicted"
    if capability[0] == 10:
        known += "; tcgen05's sparse products have no kernel"
    order = []
    if capability == (9, 0) and any(least <= tokens <= most for least, most in WGMMA_TOKENS):
        order = [("wgmma_tma", f"{tokens} tokens: fastest by measurement")]
    if tokens <= 256:
        few = f"{tokens} tokens: reads 9/16 of the weight ({known})"
        # where it was measured, the portable kernel takes longer than expanding the weight
        portable = tokens <= 64 and capability != (9, 0)
        return [*order, ("mma_sp", few)] + ([("triton", few)] if portable else [])
    return [*order, ("eager", f"{tokens} tokens: expand, then dense ({known})")]


def sparse24_portable(tokens: int, itemsize: int = 2) -> PortableConfig:
    """Tile of the portable kernel for M tokens and values of `itemsize` bytes (predicted)."""
    if itemsize > 2:
        return PortableConfig(16, 32, 8, 2)
    if tokens <= 16:
        return PortableConfig(16, 32, 4, 3)
    if tokens <= 32:
        return PortableConfig(32, 64, 4, 3)
    return PortableConfig(64, 64, 4, 2)


def sparse24_mma(
    tokens: int,
    rows: int,
    columns: int,
    gated: bool,
    processors: int,
    capability: tuple[int, int] = (9, 0),
) -> MmaConfig:
    """Tile of the mma.sp kernel.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        gated: Whether gate and up share a program.
        processors: Multiprocessors of the device.
        capability: Its compute capability.

    Returns:
        The configuration: as many token tiles as M fills, at most eight, and a ring of two slots.
        Up to 16 tokens one row tile per warp and two programs per multiprocessor; beyond, where x
        costs as much as the weight, two row tiles and one program, unless that leaves a program
        fewer than eight units. Measured at 1, 16 and 64 tokens (sweep_mma24.csv), where it is
        within 3 % of the best of the sweep. Predicted: 17 to 32 tokens, gated, stacked projections,
        and other GPUs, where a multiprocessor whose share of the bandwidth, times 800 ns, is below
        a program's 18 KB of words in flight needs one program.
    """
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    few = token_tiles <= 2
    # in that time an H200 brings 25 KB to each, an H100 18, an A100 13, a 5090 8, a 4090 6, an L4 4
    fast = capability[0] in (9, 10)

    def divided(row_tiles: int, resident: int) -> MmaConfig:
        height = 64 if gated else 64 * row_tiles
        blocks = -(-rows // height) * -(-tokens // (8 * token_tiles))
        splits = max(1, min(resident * processors // blocks, columns // 512))
        return MmaConfig(row_tiles, token_tiles, 2, splits)

    if gated or not few:
        config = divided(2, 2 if few and fast else 1)
        if gated or not fast or columns // 256 // config.splits >= 8:
            return config
    return divided(1, 2 if fast else 1)


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
    warps, token_tiles = (16, 16) if tokens > 64 else (8, 8 if tokens > 32 else 4)
    height = warps * (8 if gated else 16)
    token_blocks = -(-tokens // (8 * token_tiles))
    programs = token_blocks * -(-rows // height)
    slots = processors * (16 // warps)
    splits = max(1, min(4, slots // programs, columns // 512))
    return WgmmaConfig(warps, token_tiles, splits, 8 if splits == 1 < token_blocks else 0)
