"""Which weights stay: N:M groups and exact counts per row (True = keep)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels import checks, eager, runtime


@torch.library.custom_op("prunekernels::nm_mask", mutates_args=())
def _nm_mask_op(scores: Tensor, keep: int, of: int, impl: str) -> Tensor:
    checks.not_nan("nm_mask", scores)
    return runtime.run("nm_mask", eager.nm_mask, (scores,), impl)(scores, keep, of)


@_nm_mask_op.register_fake
def _(scores: Tensor, keep: int, of: int, impl: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.custom_op("prunekernels::rowwise_mask", mutates_args=())
def _rowwise_mask_op(scores: Tensor, prune: int, impl: str) -> Tensor:
    checks.not_nan("rowwise_mask", scores)
    return runtime.run("rowwise_mask", eager.rowwise_mask, (scores,), impl)(scores, prune)


@_rowwise_mask_op.register_fake
def _(scores: Tensor, prune: int, impl: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def nm_mask(scores: Tensor, keep: int, of: int, *, impl: str = "auto") -> Tensor:
    """Keep exactly `keep` of every `of` consecutive scores along the last dimension.

    Equivalent to `scatter_(−1, scores.view(…, −1, of).sort(−1, descending=True,
    stable=True).indices[…, :keep], True)` without the sort where groups are small.

    Args:
        scores: `(…, K)` float32, bfloat16 or float16, K a multiple of `of`; larger stays.
        keep: N, how many stay in each group, 1 ≤ keep ≤ of.
        of: M, the group's size.
        impl: "auto", "triton" or "eager".

    Returns:
        Bool, the shape of `scores`, True = keep. Among equal scores (±0 are equal) the lower
        index stays.

    Raises:
        ValueError: if keep or of make no pattern, K is not a multiple of `of`, a score is NaN, or
            `impl` cannot run here.
    """
    checks.floats("nm_mask", scores=scores)
    runtime.check_impl(impl)
    if not 1 <= keep <= of:
        raise ValueError(f"nm_mask: keep must lie in 1..of, got keep={keep} of={of}")
    if scores.dim() == 0 or scores.shape[-1] % of:
        raise ValueError(
            f"nm_mask: the last dimension of scores {tuple(scores.shape)} is not a multiple of "
            f"of={of}; pad it with -inf scores or leave this tensor out"
        )
    return _nm_mask_op(scores, keep, of, impl)


def rowwise_mask(scores: Tensor, sparsity: float, *, impl: str = "auto") -> Tensor:
    """Drop the same number of smallest scores from every row.

    Equivalent to `ones.scatter_(−1, scores.sort(−1, stable=True).indices[…, :count], False)`
    with the higher index going first among equals, without the sort.

    Args:
        scores: `(…, K)` float32, bfloat16 or float16; larger stays. `(1, R·C)` selects over a
            whole matrix.
        sparsity: share of each row to drop, in [0, 1]: floor(sparsity·K + 1e-9) of K scores, so
            never more than asked (the 1e-9 forgives 0.7·10 = 6.999…).
        impl: "auto", "triton" or "eager".

    Returns:
        Bool, the shape of `scores`, True = keep. Among equal scores (±0 are equal) the lower
        index stays.

    Raises:
        ValueError: if sparsity is outside [0, 1], a score is NaN, or `impl` cannot run here.
    """
    checks.floats("rowwise_mask", scores=scores)
    runtime.check_impl(impl)
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"rowwise_mask: sparsity must be a share between 0 and 1, got {sparsity}")
    if scores.dim() == 0:
        raise ValueError("rowwise_mask: scores need at least one dimension, got a scalar")
    prune = int(sparsity * scores.shape[-1] + 1e-9)
    return _rowwise_mask_op(scores, prune, impl)
