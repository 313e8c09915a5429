"""The heavy steps of pruning: selection, and SparseGPT's update of the weights that stay."""

from prunekernels.pruning.masks import nm_mask, nm_prune_, rowwise_mask, rowwise_prune_
from prunekernels.pruning.update import UpdatedColumns, sparsegpt_update
from prunekernels.runtime import Kernel, Op, register

for _name, _module in (
    ("nm_mask", "masks_triton"),
    ("rowwise_mask", "masks_triton"),
    ("sparsegpt_update", "update_triton"),
):
    register(Op(_name, {"triton": Kernel(f"prunekernels.pruning.{_module}", _name)}))

__all__ = [
    "UpdatedColumns",
    "nm_mask",
    "nm_prune_",
    "rowwise_mask",
    "rowwise_prune_",
    "sparsegpt_update",
]
