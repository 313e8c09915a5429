"""What packed layers gain, and the portable kernels' tile.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. An
entry marked *predicted* comes from byte counts and compiled instruction counts, not from a
measurement.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple


class PortableConfig(NamedTuple):
    """Tile of a portable kernel: tokens, weight rows, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# What a launch costs, in bytes that a GPU reads meanwhile (4 µs at 4.3 TB/s).
_LAUNCH_BYTES = 17e6


# What the portable kernels reach of a dense layer: measured on an H200 at 1 to 16 tokens for
# weights of 117 MB (of 33.5 MB: 0.25 and 0.45), bench/results/NVIDIA_H200/sparse.csv. Elsewhere
# predicted.
_PORTABLE_SPEEDUP = {"2:4": 0.15, "bitmap": 0.3}
# Predicted: twice as many instructions for each weight as the 2:4 one has.
_PORTABLE_QUANTISED = 0.075

# Predicted, not measured: what the bitmap's tensor-core kernel (format 3) takes at 1 token on an
# H200, in bytes that a GPU reads meanwhile: for each byte of the dense weight, and of the packed
# one. A 14336 × 4096 layer is 1.4, 1.6 and 1.8 times faster at 50, 60 and 70 % zeros, the low ends
# of what is expected (docs/bitmap.md). At 16 tokens it reaches so much of that; in between, and
# beyond, interpolated over log M. The weight is expanded anew for each 32 tokens.
_BITMAP_TIME, _BITMAP_AT_16, _BITMAP_TOKENS = (0.155, 0.91), 0.82, 32

# Tokens from which a dense layer is bound by its products and not by reading the weight: dense rate
# over bandwidth, measured on an H200 (830 TFLOP/s, 4.2 TB/s), else from data sheets (A100, RTX
# 4090, RTX 5090). Others count as the lowest: a B200's dense layers are bound by memory for longer,
# but its mma.sp is not faster than an H200's for twice the bandwidth.
_RIDGE = {(9, 0): 198, (8, 0): 156, (8, 9): 165, (12, 0): 117}

# What mma.sp reached on an H200 of the gain that bytes predict, at so many tokens, for a weight of
# 33.5 MB (4096 × 4096) and of 117 MB (14336 × 4096): bench/results/NVIDIA_H200. In between it is
# interpolated over log M and log bytes; the small weight at 256 tokens is extrapolated.
_MMA24_TOKENS = (1, 16, 64, 256)
_MMA24_REACHED = {33.5e6: (1.0, 1.0, 0.52, 0.27), 117e6: (1.0, 0.93, 0.71, 0.36)}


def packed_speedup(
    impl: str,
    tokens: int,
    dense: int,
    packed: int,
    what: str = "2:4",
    capability: tuple[int, int] = (9, 0),
) -> float:
    """Time of a dense layer over that of the packed one.

    2:4 layers on an H200 are interpolated between measurements; bitmaps are predicted. On other
    GPUs tokens count by where a dense layer stops being bound by memory (predicted); so do expanded
    weights, by bytes.

    Args:
        impl: The implementation that runs: "mma_sp" (2:4), "mma" (bitmap), "triton" or "eager".
        tokens: M.
        dense: Bytes of the dense weight.
        packed: Bytes of the packed weight.
        what: The format, by its name.
        capability: CUDA compute capability.
    """
    ridge = _RIDGE.get(capability, min(_RIDGE.values()))
    gain = (dense + _LAUNCH_BYTES) / (packed + _LAUNCH_BYTES)
    if impl == "mma_sp":
        return gain * _reached(tokens * _RIDGE[(9, 0)] / ridge, dense)
    if impl == "mma" and capability == (9, 0):
        fixed, per_byte = _BITMAP_TIME
        reached = _BITMAP_AT_16 ** (math.log(max(tokens, 1)) / math.log(16))
        time = fixed * dense + per_byte * packed + _LAUNCH_BYTES
        return reached / -(-tokens // _BITMAP_TOKENS) * (dense + _LAUNCH_BYTES) / time
    if impl == "mma" and tokens <= 64:
        # predicted: expanding a bitmap in registers costs about half of what reading less gains
        return (1 + gain) / 2
    if impl == "triton":
        return _PORTABLE_SPEEDUP.get(what, _PORTABLE_QUANTISED)
    if impl != "eager":
        # as many instructions as the dense kernel has time for
        return 1.0
    # the packed weight is read and the dense one written before the product
    product = dense * max(1.0, tokens / ridge)
    return product / (product + packed + dense)


def was_measured(impl: str, tokens: int, gpu: str) -> bool:
    """Whether `packed_speedup` stands on measurements of this GPU: 2:4 layers on an H200.

    Args:
        impl: The implementation that runs.
        tokens: M.
        gpu: The GPU's name, as CUDA gives it.
    """
    return impl == "mma_sp" and tokens <= _MMA24_TOKENS[-1] and "H200" in gpu


def _reached(tokens: float, dense: int) -> float:
    """`_MMA24_REACHED`, interpolated."""
    (small, low), (large, high) = _MMA24_REACHED.items()
    size = min(max(math.log(dense / small) / math.log(large / small), 0.0), 1.0)
    curve = [a + (b - a) * size for a, b in zip(low, high, strict=True)]
    if tokens <= _MMA24_TOKENS[0]:
        return curve[0]
    pairs = list(zip(_MMA24_TOKENS, curve, strict=True))
    for (left, before), (right, after) in itertools.pairwise(pairs):
        if tokens <= right:
            return before + (after - before) * math.log(tokens / left) / math.log(right / left)
    # bound by products on both sides
    return curve[-1]
