"""The heavy steps of pruning: selection, and SparseGPT's update of the weights that stay."""

from prunekernels.pruning.masks import nm_mask, nm_prune_, rowwise_mask, rowwise_prune_
from prunekernels.pruning.register import register_kernels
from prunekernels.pruning.update import UpdatedColumns, sparsegpt_update

register_kernels()

__all__ = [
    "UpdatedColumns",
    "nm_mask",
    "nm_prune_",
    "rowwise_mask",
    "rowwise_prune_",
    "sparsegpt_update",
]
