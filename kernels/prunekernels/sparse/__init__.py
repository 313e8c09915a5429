"""Packed sparse weights and the matrix multiplications that read them."""

from prunekernels.sparse.bitmap.format import BitmapSparse, bitmap_cat, bitmap_pack, bitmap_split
from prunekernels.sparse.bitmap.linear import bitmap_expected, bitmap_gate_up, bitmap_linear
from prunekernels.sparse.layer import PackedWeight
from prunekernels.sparse.two_four.format import (
    Sparse24,
    sparse24_cat,
    sparse24_pack,
    sparse24_split,
)
from prunekernels.sparse.two_four.linear import (
    sparse24_expected,
    sparse24_gate_up,
    sparse24_linear,
)
from prunekernels.sparse.two_four.quantized.format import (
    CLASSES,
    Quantized24,
    quantized24_pack,
    quantized24_parts,
    quantized24_round,
)
from prunekernels.sparse.two_four.quantized.fp8.linear import quantized24_fp8_linear
from prunekernels.sparse.two_four.quantized.fp8.tokens import quantize_tokens
from prunekernels.sparse.two_four.quantized.linear import (
    quantized24_expected,
    quantized24_gate_up,
    quantized24_linear,
)

__all__ = [
    "FORMATS",
    "BitmapSparse",
    "PackedWeight",
    "Quantized24",
    "Sparse24",
    "bitmap_cat",
    "bitmap_expected",
    "bitmap_gate_up",
    "bitmap_linear",
    "bitmap_pack",
    "bitmap_split",
    "quantize_tokens",
    "quantized24_expected",
    "quantized24_fp8_linear",
    "quantized24_gate_up",
    "quantized24_linear",
    "quantized24_pack",
    "quantized24_parts",
    "quantized24_round",
    "sparse24_cat",
    "sparse24_expected",
    "sparse24_gate_up",
    "sparse24_linear",
    "sparse24_pack",
    "sparse24_split",
]

_KINDS: tuple[type[PackedWeight], ...] = (Sparse24, BitmapSparse, *CLASSES.values())
#: The weight class of each format by its name, in the order in which they are tried.
FORMATS: dict[str, type[PackedWeight]] = {kind.format: kind for kind in _KINDS}
