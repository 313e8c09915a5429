"""Packed sparse weights and the matrix multiplications that read them."""

from prunekernels.sparse.dispatch24 import sparse24_expected
from prunekernels.sparse.format24 import Sparse24, sparse24_cat, sparse24_pack, sparse24_split
from prunekernels.sparse.format_bitmap import BitmapSparse, bitmap_cat, bitmap_pack, bitmap_split
from prunekernels.sparse.linear24 import sparse24_gate_up, sparse24_linear
from prunekernels.sparse.linear_bitmap import bitmap_expected, bitmap_linear

__all__ = [
    "BitmapSparse",
    "Sparse24",
    "bitmap_cat",
    "bitmap_expected",
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
