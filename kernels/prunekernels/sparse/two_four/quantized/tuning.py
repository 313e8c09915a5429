"""Launch configurations and order of the kernels for 2:4 weights with 8- and 4-bit values.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. All of
it is *predicted*, from byte counts and compiled instruction counts.
"""

from __future__ import annotations

from prunekernels.sparse.two_four.tuning import MmaConfig, sparse24_mma

#: Bytes of the scratch that a block of rows is expanded to before its dense product: a fraction of
#: the second-level cache of the GPUs that the kernels are for (A100 40 MB, H100 50 MB, L4 48 MB).
SCRATCH_BYTES = 16 << 20


def quantized24_order(
    tokens: int, rows: int, columns: int, capability: tuple[int, int], itemsize: int = 2
) -> list[tuple[str, str]]:
    """Implementations of such a layer on an NVIDIA GPU, preferred first, with reasons.

    The kernels have not run on hardware: until they have, they only run when asked for by name.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        capability: CUDA compute capability.
        itemsize: Bytes of an activation.

    Returns:
        `(name, reason)` pairs, never empty.
    """
    return [("eager", "expand, then dense: mma_sp has not run on hardware, ask for it by name")]


def fp8_tokens_order(
    tokens: int, rows: int, columns: int, capability: tuple[int, int], itemsize: int = 2
) -> list[tuple[str, str]]:
    """`quantized24_order` of layers whose activations are rounded to e4m3."""
    return [("eager", "expands in float32: mma_sp has not run on hardware, ask for it by name")]


def quantized24_mma(
    tokens: int,
    rows: int,
    columns: int,
    gated: bool,
    bits: int,
    group: int,
    zeros: bool,
    processors: int,
    capability: tuple[int, int] = (9, 0),
) -> MmaConfig:
    """Tile of the mma.sp kernel.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        gated: Whether gate and up share a program.
        bits: Bits of a value.
        group: Columns of a group with scales of its own: 0 (a row), 64 or 128.
        zeros: Whether there are zero points.
        processors: Multiprocessors of the device.
        capability: Its compute capability.

    Returns:
        That of 16-bit 2:4 with two row tiles for few tokens, which share what a program does for
        x: it costs more beside fewer bytes. Groups keep a second sum and their scales beside each
        sum: two row tiles (gate and up are two) have at most 16 tokens in a program, with groups of
        64 at most 8, and one row tile has at most 32; 64 with 4 bits, groups of 128 and no zero
        points, but on sm_89. More does not fit the registers.
    """
    base = sparse24_mma(tokens, rows, columns, gated, processors, capability)
    token_tiles, row_tiles = base.token_tiles, 2
    if group:
        most = 2 if group == 128 else 1
        fits = (bits, group, zeros) == (4, 128, False) and capability != (8, 9)
        token_tiles = min(token_tiles, most if gated else 8 if fits else 4)
        row_tiles = 1 if token_tiles > most else 2
    height = 64 if gated else 64 * row_tiles
    blocks = -(-rows // height) * -(-tokens // (8 * token_tiles))
    resident = 2 if capability[0] in (9, 10) else 1
    splits = max(1, min(resident * processors // blocks, columns // 512))
    return MmaConfig(row_tiles, token_tiles, base.stages, splits)


def fp8_tokens_mma(
    tokens: int,
    rows: int,
    columns: int,
    processors: int,
    capability: tuple[int, int],
    native: bool,
) -> MmaConfig:
    """Tile of the mma.sp kernel for activations rounded to e4m3.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        processors: Multiprocessors of the device.
        capability: Its compute capability.
        native: Whether its tensor cores multiply e4m3 values.

    Returns:
        That of 8-bit values with 16-bit activations; native, where each sum has a second one in
        float32 beside it, at most 32 tokens, as more does not fit the registers.
    """
    config = quantized24_mma(tokens, rows, columns, False, 8, 0, False, processors, capability)
    if native and config.token_tiles > 4:
        return quantized24_mma(32, rows, columns, False, 8, 0, False, processors, capability)
    return config
