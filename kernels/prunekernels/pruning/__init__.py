"""The heavy steps of pruning: selection."""

from prunekernels.pruning.masks import nm_mask, rowwise_mask

__all__ = ["nm_mask", "rowwise_mask"]
