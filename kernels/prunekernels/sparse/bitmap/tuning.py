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
        warps: Warps of a program, which share the columns of a line of 16 rows; gated: of two.
        token_tiles: Tiles of 8 tokens.
        slots: Of each warp's ring, 2 or 3.
        splits: Programs that share the columns of one line.
        registers: The most that a lane may use; 0 leaves it to the compiler.
        bulk: Whether the copy engine makes the copies (compute capability 9.0 and later).
        dependent: Whether a launch may start while the kernel before it ends (the same).
    """

    warps: int
    token_tiles: int
    slots: int
    splits: int
    registers: int = 0
    bulk: bool = False
    dependent: bool = False


# Bytes of shared memory of a multiprocessor, and what the driver keeps of it for each program.
_SHARED = {(8, 0): 164 << 10, (8, 7): 164 << 10, (9, 0): 228 << 10}
_SHARED_ELSEWHERE, _RESERVED = 100 << 10, 1 << 10


def bitmap_mma(
    tokens: int,
    rows: int,
    columns: int,
    chunks: int,
    processors: int,
    capability: tuple[int, int],
    *,
    gated: bool = False,
) -> BitmapMmaConfig:
    """Tile of the tensor-core bitmap kernel (predicted): all programs at once, many warps.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        chunks: Pieces of 512 bytes that a record takes at most.
        processors: Multiprocessors of the device.
        capability: Its CUDA compute capability.
        gated: Whether gate and up are computed together.
    """
    lines, stages = -(-rows // 16), -(-columns // 128)
    shared = _SHARED.get(capability, _SHARED_ELSEWHERE)
    if tokens <= 8:
        # 72 registers: 28 warps
        warps, token_tiles, resident, registers = 4, 1, 7, 72
    elif tokens <= 16:
        # 104 registers: 19 warps; a warp is a program, so that any number of them fits
        warps, token_tiles, resident, registers = 1, 2, 19, 104
    else:
        # 138 or 150 registers: a limit makes the compiler spill, whatever it is
        warps, token_tiles, resident, registers = 1, 4, 13, 0
    if gated and warps == 1:
        warps, resident = 2, resident // 2
    sizes = {
        slots: bitmap_shared_bytes(warps, token_tiles, slots, chunks) + _RESERVED
        for slots in (2, 3)
    }
    slots = 3 if resident * sizes[3] <= shared else 2
    resident = max(1, min(resident, shared // sizes[slots]))
    blocks = lines * -(-tokens // (8 * token_tiles))
    share = warps // 2 if gated else warps
    splits = max(1, min(processors * resident // blocks, stages // share))
    return BitmapMmaConfig(warps, token_tiles, slots, splits, registers)


def bitmap_shared_bytes(warps: int, token_tiles: int, slots: int, chunks: int) -> int:
    """Bytes of shared memory that a program of the tensor-core kernel takes."""
    # a warp's ring, in rows of what it leaves there to be added up
    row = 512 * token_tiles
    return warps * -(-slots * (128 + 512 * chunks) // row) * row
