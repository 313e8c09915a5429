"""The Triton kernels of the pruning ops, made known to `runtime` without importing Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prunekernels.runtime import register_triton


def _nm_mask(*arguments: Any) -> Tensor:
    from prunekernels.pruning import masks_triton

    return masks_triton.nm_mask(*arguments)


def _rowwise_mask(*arguments: Any) -> Tensor:
    from prunekernels.pruning import masks_triton

    return masks_triton.rowwise_mask(*arguments)


def _sparsegpt_update(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from prunekernels.pruning import update_triton

    return update_triton.sparsegpt_update(*arguments)


def register_kernels() -> None:
    """Register every Triton kernel of this folder."""
    register_triton("nm_mask", _nm_mask)
    register_triton("rowwise_mask", _rowwise_mask)
    register_triton("sparsegpt_update", _sparsegpt_update)
