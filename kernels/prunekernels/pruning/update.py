"""SparseGPT's update of one block of columns: prune, and make up for it in the columns to come.

With U upper triangular and H⁻¹ = UᵀU: pruning weight w of column i costs w² / U_ii², and the best
answer changes the columns j > i of its row by −(w / U_ii)·U_ij (derived in docs/pruning.md,
"Mathematics"). Source: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
(arXiv 2301.00774), algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.pruning import update_eager
from prunekernels.pruning.masks import group_impl


class UpdatedColumns(NamedTuple):
    """A pruned block; every tensor is (R, C), in the memory order of its transpose.

    Attributes:
        pruned: float32, the columns, zero where pruned, else brought up to date.
        errors: float32, w / U_ii of the pruned weights, 0 elsewhere: the columns after the block
            are due `−errors @ U[block, after]`.
        mask: bool, True = kept.
    """

    pruned: Tensor
    errors: Tensor
    mask: Tensor


@torch.library.custom_op("prunekernels::sparsegpt_update", mutates_args=())
def _sparsegpt_update_op(
    weight: Tensor, upper: Tensor, mask: Tensor | None, keep: int, of: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = runtime.run("sparsegpt_update", update_eager.sparsegpt_update, (weight,), impl)
    return run(weight, upper, mask, keep, of)


@_sparsegpt_update_op.register_fake
def _(
    weight: Tensor, upper: Tensor, mask: Tensor | None, keep: int, of: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (weight.shape[1], weight.shape[0])
    pruned, errors = (weight.new_empty(shape).t() for _ in range(2))
    return pruned, errors, weight.new_empty(shape, dtype=torch.bool).t()


def sparsegpt_update(
    weight: Tensor,
    upper: Tensor,
    mask: Tensor | None = None,
    *,
    keep: int = 0,
    of: int = 0,
    impl: str = "auto",
) -> UpdatedColumns:
    """Prune the columns of a block from left to right, each after the errors of those before it.

    Equivalent to, for every i: `errors[:, i] = where(mask[:, i], 0, w[:, i] / upper[i, i])` and
    `w[:, i + 1 :] -= errors[:, i, None] * upper[i, i + 1 :]`, without the product per column.

    Args:
        weight: `(R, C)` float32, any strides; column-major (`w.t()` contiguous) is fastest.
        upper: `(C, C)` float32, upper triangular with a positive diagonal: the block's part of U.
        mask: `(R, C)` bool, what to keep. None chooses `keep` of every `of` columns inside the
            walk, by (w / U_ii)² when a group is reached; of equals the lower index stays.
        keep: N, without a mask.
        of: M, without a mask; a divisor of C.
        impl: "auto", "triton" (M ≤ 32), "triton_thread" (a row per thread, where C is a multiple of
            16 and M divides 16; else the same as "triton") or "eager".

    Returns:
        `UpdatedColumns`; float32 sums, which differ between implementations by rounding.

    Raises:
        ValueError: if shapes, dtypes or devices don't fit, both or neither of mask and keep:of are
            given, or `impl` cannot run here.
    """
    op = "sparsegpt_update"
    checks.floats(op, weight=weight, upper=upper)
    checks.same_device(op, weight, upper=upper, mask=mask)
    runtime.check_impl(impl, "triton_thread")
    if weight.dtype != torch.float32 or upper.dtype != torch.float32:
        raise ValueError(
            f"{op}: weight and upper must be float32, got {weight.dtype} and {upper.dtype}; "
            "convert them with .float()"
        )
    if weight.dim() != 2 or upper.shape != (weight.shape[-1], weight.shape[-1]):
        raise ValueError(
            f"{op}: weight (R, C) needs upper (C, C), got {tuple(weight.shape)} and "
            f"{tuple(upper.shape)}"
        )
    if mask is not None:
        if keep or of:
            raise ValueError(f"{op}: mask and keep:of contradict each other, give one of them")
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"{op}: mask must be bool of shape {tuple(weight.shape)}, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}"
            )
    elif not 1 <= keep <= of or weight.shape[1] % of:
        raise ValueError(
            f"{op}: without a mask, keep:of must satisfy 1 <= keep <= of and of divide the "
            f"{weight.shape[1]} columns, got {keep}:{of}"
        )
    else:
        impl = group_impl(op, of, impl)
    return UpdatedColumns(*_sparsegpt_update_op(weight, upper, mask, keep, of, impl))
