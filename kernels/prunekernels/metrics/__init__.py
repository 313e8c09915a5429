"""Statistics of pairs of logits, of hidden states through the output head, and of vectors."""

from prunekernels.metrics.fields import PairStats, TopKStats, VectorStats
from prunekernels.metrics.head import head_pair_stats
from prunekernels.metrics.pair import pair_stats
from prunekernels.metrics.register import register_kernels
from prunekernels.metrics.state import PairState, merge, pair_state
from prunekernels.metrics.summary import summarize
from prunekernels.metrics.vector import vector_stats

__all__ = [
    "PairState",
    "PairStats",
    "TopKStats",
    "VectorStats",
    "head_pair_stats",
    "merge",
    "pair_state",
    "pair_stats",
    "summarize",
    "vector_stats",
]

register_kernels()
