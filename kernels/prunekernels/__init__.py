"""Kernels for pruned language models: vocabulary statistics, mask selection, sparse products."""

from prunekernels.metrics import (
    PairStats,
    TopKStats,
    VectorStats,
    head_pair_stats,
    pair_stats,
    summarize,
    vector_stats,
)
from prunekernels.pruning import nm_mask, rowwise_mask
from prunekernels.sparse import (
    BitmapSparse,
    Sparse24,
    bitmap_linear,
    bitmap_pack,
    sparse24_cat,
    sparse24_expected,
    sparse24_gate_up,
    sparse24_linear,
    sparse24_pack,
    sparse24_split,
)

__all__ = [
    "BitmapSparse",
    "PairStats",
    "Sparse24",
    "TopKStats",
    "VectorStats",
    "bitmap_linear",
    "bitmap_pack",
    "head_pair_stats",
    "nm_mask",
    "pair_stats",
    "rowwise_mask",
    "sparse24_cat",
    "sparse24_expected",
    "sparse24_gate_up",
    "sparse24_linear",
    "sparse24_pack",
    "sparse24_split",
    "summarize",
    "vector_stats",
]
