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

__all__ = [
    "FORMATS",
    "BitmapSparse",
    "PackedWeight",
    "Sparse24",
    "bitmap_cat",
    "bitmap_expected",
    "bitmap_gate_up",
    "bitmap_linear",
    "bitmap_pack",
    "bitmap_split",
    "sparse24_cat",
    "sparse24_expected",
    "sparse24_gate_up",
    "sparse24_linear",
    "sparse24_pack",
    "sparse24_split",
]

#: The weight class of each format by its name, in the order in which they are tried.
FORMATS: dict[str, type[PackedWeight]] = {kind.format: kind for kind in (Sparse24, BitmapSparse)}
