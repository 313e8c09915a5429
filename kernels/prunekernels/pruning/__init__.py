"""The heavy steps of pruning: selection, and SparseGPT's update of the weights that stay."""

from prunekernels.pruning.masks import nm_mask, nm_prune_, rowwise_mask, rowwise_prune_
from prunekernels.pruning.update import UpdatedColumns, sparsegpt_update
from prunekernels.runtime import Kernel, Op, register

for _name, _modules in (
    ("nm_mask", {"triton": "masks_triton"}),
    # two scores to a word: by name until it has run on hardware
    ("rowwise_mask", {"triton": "masks_triton", "triton_words": "masks_words_triton"}),
    # a row per thread: by name until it has run on hardware
    (
        "sparsegpt_update",
        {"triton": "update_triton", "triton_thread": "update_thread_triton"},
    ),
):
    register(
        Op(
            _name,
            {
                impl: Kernel(f"prunekernels.pruning.{module}", _name)
                for impl, module in _modules.items()
            },
        )
    )

__all__ = [
    "UpdatedColumns",
    "nm_mask",
    "nm_prune_",
    "rowwise_mask",
    "rowwise_prune_",
    "sparsegpt_update",
]
