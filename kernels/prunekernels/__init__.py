"""Kernels for pruned language models: full-vocabulary statistics, selection of weights, 2:4."""

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
    Sparse24,
    sparse24_cat,
    sparse24_gate_up,
    sparse24_linear,
    sparse24_pack,
)

__all__ = [
    "PairStats",
    "Sparse24",
    "TopKStats",
    "VectorStats",
    "head_pair_stats",
    "nm_mask",
    "pair_stats",
    "rowwise_mask",
    "sparse24_cat",
    "sparse24_gate_up",
    "sparse24_linear",
    "sparse24_pack",
    "summarize",
    "vector_stats",
]
