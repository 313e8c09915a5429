"""What packed layers gain, and the portable kernels' tile.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. An
entry marked *predicted* comes from byte counts and compiled instruction counts, not from a
measurement.
"""

from __future__ import annotations

from typing import NamedTuple


class PortableConfig(NamedTuple):
    """Tile of a portable kernel: tokens, weight rows, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


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
