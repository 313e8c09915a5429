"""What packed layers gain, and the portable kernels' tile.

Pure functions of shape, type and architecture; nothing is probed at import or at run time. An
entry marked *measured* was measured on an H200 on 2026-11-27 (bench/results/NVIDIA_H200); one
marked *predicted* comes from byte counts and compiled instruction counts, not from a measurement.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple


class PortableConfig(NamedTuple):
    """Tile of a portable kernel: tokens, weight rows, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Gpu(NamedTuple):
    """What bounds a dense layer.

    Attributes:
        bandwidth: Bytes of memory a second.
        products: Operations a second of dense 16-bit products.
    """

    bandwidth: float
    products: float

    @property
    def ridge(self) -> float:
        """Tokens from which products, and not reading the weight, bound a dense layer."""
        return self.products / self.bandwidth


# H200: copies and cuBLAS, measured. All others are predicted, from NVIDIA's data sheets: H100 (SXM)
# with the shares that the H200 reached of its own (88 and 84 %), A100 (80 GB), L4, and the white
# papers of RTX 4090 and 5090.
_GPUS = {
    "H200": Gpu(4.2e12, 830e12),
    "H100": Gpu(2.93e12, 830e12),
    "A100": Gpu(2.0e12, 312e12),
    "L4": Gpu(0.3e12, 121e12),
    "4090": Gpu(1.008e12, 165.2e12),
    "5090": Gpu(1.792e12, 209.5e12),
}
# What a GPU of another name counts as, by compute capability. All the rest count as the one with
# the lowest ridge: a B200's dense layers are bound by memory for longer, but its mma.sp is not
# faster than an H200's for twice the bandwidth.
_BY_CAPABILITY = {(9, 0): "H200", (8, 0): "A100", (8, 9): "4090", (12, 0): "5090"}

# Seconds that a launch costs (predicted).
_LAUNCH = 4e-6

# What the portable kernels reach of a dense layer: measured at 1 to 16 tokens for weights of 117 MB
# (of 33.5 MB: 0.25 and 0.45), sparse.csv. Elsewhere predicted.
_PORTABLE_SPEEDUP = {"2:4": 0.15, "bitmap": 0.3}
# Predicted: twice as many instructions for each weight as the 2:4 one has.
_PORTABLE_QUANTISED = 0.075

# Predicted, not measured: what the bitmap's tensor-core kernel (format 3) takes at 1 token on an
# H200, in bytes that a GPU reads meanwhile: for each byte of the dense weight, and of the packed
# one. A 14336 × 4096 layer is 1.4, 1.6 and 1.8 times faster at 50, 60 and 70 % zeros, the low ends
# of what is expected (docs/bitmap.md). At 16 tokens it reaches so much of that; in between, and
# beyond, interpolated over log M. The weight is expanded anew for each 32 tokens.
_BITMAP_TIME, _BITMAP_AT_16, _BITMAP_TOKENS = (0.155, 0.91), 0.82, 32

# What mma.sp reached of the gain that bytes predict, at so many tokens, for a weight of 33.5 MB
# (4096 × 4096) and of 117 MB (14336 × 4096): measured (sweep_mma24.csv, sparse.csv). In between it
# is interpolated over log M and log bytes; the small weight at 256 tokens is extrapolated.
_MMA24_TOKENS = (1, 16, 64, 256)
_MMA24_REACHED = {33.5e6: (1.0, 1.0, 0.52, 0.27), 117e6: (1.0, 0.93, 0.71, 0.36)}
#: Numbers of tokens whose tile of mma.sp no sweep has had: what is said of them is predicted.
UNSWEPT_TOKENS = range(17, 33)


def packed_speedup(
    impl: str,
    tokens: int,
    dense: int,
    packed: int,
    what: str = "2:4",
    capability: tuple[int, int] = (9, 0),
    gpu: str = "",
) -> float:
    """Time of a dense layer over that of the packed one.

    2:4 layers on an H200 are interpolated between measurements; bitmaps are predicted. On other
    GPUs tokens count by where a dense layer stops being bound by memory, and a launch by what is
    read meanwhile (predicted); so do expanded weights, by bytes.

    Args:
        impl: The implementation that runs: "mma_sp" (2:4), "mma" (bitmap), "triton" or "eager".
        tokens: M.
        dense: Bytes of the dense weight.
        packed: Bytes of the packed weight.
        what: The format, by its name.
        capability: CUDA compute capability.
        gpu: The GPU's name, as CUDA gives it; "": one that is typical of the capability.
    """
    on = machine(gpu, capability)
    launch = _LAUNCH * on.bandwidth
    gain = (dense + launch) / (packed + launch)
    if impl == "mma_sp":
        return gain * _reached(tokens * _GPUS["H200"].ridge / on.ridge, dense)
    if impl == "mma" and capability == (9, 0):
        fixed, per_byte = _BITMAP_TIME
        reached = _BITMAP_AT_16 ** (math.log(max(tokens, 1)) / math.log(16))
        time = fixed * dense + per_byte * packed + launch
        return reached / -(-tokens // _BITMAP_TOKENS) * (dense + launch) / time
    if impl == "mma" and tokens <= 64:
        # predicted: expanding a bitmap in registers costs about half of what reading less gains
        return (1 + gain) / 2
    if impl == "triton":
        return _PORTABLE_SPEEDUP.get(what, _PORTABLE_QUANTISED)
    if impl != "eager":
        # as many instructions as the dense kernel has time for
        return 1.0
    # the packed weight is read and the dense one written before the product
    product = dense * max(1.0, tokens / on.ridge)
    return product / (product + packed + dense)


def was_measured(impl: str, tokens: int, dense: int, gpu: str) -> bool:
    """Whether `packed_speedup` lies between measurements of this GPU: of 2:4 layers on an H200.

    Args:
        impl: The implementation that runs.
        tokens: M.
        dense: Bytes of the dense weight.
        gpu: The GPU's name, as CUDA gives it.
    """
    tile = tokens <= _MMA24_TOKENS[-1] and tokens not in UNSWEPT_TOKENS
    size = min(_MMA24_REACHED) <= dense <= 1.01 * max(_MMA24_REACHED)
    return impl == "mma_sp" and tile and size and _named(gpu) == "H200"


def machine(gpu: str, capability: tuple[int, int]) -> Gpu:
    """The GPU of that name (a known one's is a word of it), else one that its capability is of.

    Args:
        gpu: As CUDA gives it.
        capability: CUDA compute capability.
    """
    name = _named(gpu) or _BY_CAPABILITY.get(capability)
    return _GPUS[name] if name else min(_GPUS.values(), key=lambda known: known.ridge)


def _named(gpu: str) -> str | None:
    """The known GPU that a word of the name names: an L40 is no L4, a GH200 no H200.

    An instance of a divided GPU (MIG) has a part of its bandwidth and products: it is none of them.
    """
    words = re.findall(r"\w+", gpu)
    return next((name for name in _GPUS if name in words and "MIG" not in words), None)


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
