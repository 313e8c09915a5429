"""The Triton kernels of the metric ops, made known to `runtime` without importing Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prunekernels.runtime import register_triton


def _pair_stats(*arguments: Any) -> list[Tensor]:
    from prunekernels.metrics import pair_triton

    return pair_triton.pair_stats(*arguments)


def _pair_state(*arguments: Any) -> Tensor:
    from prunekernels.metrics import pair_triton

    return pair_triton.pair_state(*arguments)


def _vector_stats(*arguments: Any) -> Tensor:
    from prunekernels.metrics import vector_triton

    return vector_triton.vector_stats(*arguments)


def _head_pair_stats(*arguments: Any) -> list[Tensor]:
    from prunekernels.metrics import head_triton

    return head_triton.head_pair_stats(*arguments)


def register_kernels() -> None:
    """Register every Triton kernel of this folder."""
    register_triton("head_pair_stats", _head_pair_stats)
    register_triton("pair_state", _pair_state)
    register_triton("pair_stats", _pair_stats)
    register_triton("vector_stats", _vector_stats)
