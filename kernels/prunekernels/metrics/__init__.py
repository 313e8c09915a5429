"""Statistics of pairs of logits, of hidden states through the output head, and of vectors."""

from prunekernels.metrics.fields import PairStats, TopKStats, VectorStats
from prunekernels.metrics.head import head_pair_stats
from prunekernels.metrics.head_loss import head_pair_loss
from prunekernels.metrics.pair import pair_stats
from prunekernels.metrics.state import PairState, merge, pair_state
from prunekernels.metrics.summary import summarize
from prunekernels.metrics.vector import vector_stats
from prunekernels.runtime import Kernel, Op, register

__all__ = [
    "PairState",
    "PairStats",
    "TopKStats",
    "VectorStats",
    "head_pair_loss",
    "head_pair_stats",
    "merge",
    "pair_state",
    "pair_stats",
    "summarize",
    "vector_stats",
]

for _name, _module, _by_warps in (
    ("head_pair_stats", "head_triton", False),
    ("pair_state", "pair_triton", True),
    ("pair_stats", "pair_triton", True),
    ("vector_stats", "vector_triton", True),
):
    _kernels = {"triton": Kernel(f"prunekernels.metrics.{_module}", _name)}
    if _by_warps:  # one warp to a row and split, by name until it has run on hardware
        _kernels["triton_warp"] = Kernel(f"prunekernels.metrics.{_module}", f"{_name}_by_warps")
    register(Op(_name, _kernels))
