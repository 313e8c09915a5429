"""Kernels for pruned language models: full-vocabulary statistics and selection of weights."""

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

__all__ = [
    "PairStats",
    "TopKStats",
    "VectorStats",
    "head_pair_stats",
    "nm_mask",
    "pair_stats",
    "rowwise_mask",
    "summarize",
    "vector_stats",
]
