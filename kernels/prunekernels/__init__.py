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
from prunekernels.pruning import (
    UpdatedColumns,
    nm_mask,
    nm_prune_,
    rowwise_mask,
    rowwise_prune_,
    sparsegpt_update,
)
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
    "UpdatedColumns",
    "VectorStats",
    "bitmap_linear",
    "bitmap_pack",
    "head_pair_stats",
    "nm_mask",
    "nm_prune_",
    "pair_stats",
    "rowwise_mask",
    "rowwise_prune_",
    "sparse24_cat",
    "sparse24_expected",
    "sparse24_gate_up",
    "sparse24_linear",
    "sparse24_pack",
    "sparse24_split",
    "sparsegpt_update",
    "summarize",
    "vector_stats",
]
