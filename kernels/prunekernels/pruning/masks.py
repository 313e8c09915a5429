"""Which weights stay: N:M groups and exact counts per row (True = keep)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.pruning import masks_eager

LARGEST_GROUP = 32  # M up to which Triton kernels rank a group


@torch.library.custom_op("prunekernels::nm_mask", mutates_args=())
def _nm_mask_op(scores: Tensor, norms: Tensor | None, keep: int, of: int, impl: str) -> Tensor:
    run = runtime.run("nm_mask", masks_eager.nm_mask, (scores,), impl)
    return run(scores, norms, keep, of, norms is not None, False)


@torch.library.custom_op("prunekernels::nm_prune_", mutates_args=("weight",))
def _nm_prune_op(weight: Tensor, norms: Tensor | None, keep: int, of: int, impl: str) -> Tensor:
    run = runtime.run("nm_mask", masks_eager.nm_mask, (weight,), impl)
    return run(weight, norms, keep, of, True, True)


@torch.library.custom_op("prunekernels::rowwise_mask", mutates_args=())
def _rowwise_mask_op(scores: Tensor, norms: Tensor | None, prune: int, impl: str) -> Tensor:
    run = runtime.run("rowwise_mask", masks_eager.rowwise_mask, (scores,), impl)
    return run(scores, norms, prune, norms is not None, False)


@torch.library.custom_op("prunekernels::rowwise_prune_", mutates_args=("weight",))
def _rowwise_prune_op(weight: Tensor, norms: Tensor | None, prune: int, impl: str) -> Tensor:
    run = runtime.run("rowwise_mask", masks_eager.rowwise_mask, (weight,), impl)
    return run(weight, norms, prune, True, True)


@_nm_mask_op.register_fake
@_nm_prune_op.register_fake
def _(scores: Tensor, norms: Tensor | None, keep: int, of: int, impl: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@_rowwise_mask_op.register_fake
@_rowwise_prune_op.register_fake
def _(scores: Tensor, norms: Tensor | None, prune: int, impl: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def nm_mask(
    scores: Tensor, keep: int, of: int, *, norms: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Keep exactly `keep` of every `of` consecutive scores along the last dimension.

    Equivalent to `scatter_(−1, scores.view(…, −1, of).sort(−1, descending=True,
    stable=True).indices[…, :keep], True)` without the sort where groups are small; with `norms`,
    of `scores.abs() * norms` without that matrix.

    Args:
        scores: `(…, K)` float32, bfloat16 or float16, K a multiple of `of`; larger stays.
        keep: N, how many stay in each group, 1 ≤ keep ≤ of.
        of: M, the group's size.
        norms: `(K,)` float32. If given, `scores` are weights, and |weight|·norm is what counts
            (Wanda: norm = √(mean x²) of the weight's input).
        impl: "auto", "triton" (M ≤ 32) or "eager".

    Returns:
        Bool, the shape of `scores`, True = keep. Among equal scores (±0 are equal) the lower
        index stays.

    Raises:
        ValueError: if keep or of make no pattern, K is not a multiple of `of`, a score is NaN or
            infinite, or `impl` cannot run here.
    """
    _check("nm_mask", scores, norms, impl)
    _check_groups("nm_mask", scores, keep, of)
    return _nm_mask_op(scores, norms, keep, of, group_impl("nm_mask", of, impl))


def nm_prune_(
    weight: Tensor, keep: int, of: int, *, norms: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Zero the weights that N:M does not keep, in place.

    Equivalent to `weight.masked_fill_(~nm_mask(weight.abs(), keep, of), 0)` in one pass.

    Args:
        weight: `(…, K)` weights whose leading dimensions can be viewed as one; see `nm_mask`.
        keep: See `nm_mask`.
        of: See `nm_mask`.
        norms: Score by |weight|·norm instead of |weight|.
        impl: See `nm_mask`.

    Returns:
        The mask, as `nm_mask` returns it.

    Raises:
        ValueError: see `nm_mask`.
    """
    _check("nm_prune_", weight, norms, impl)
    _check_groups("nm_prune_", weight, keep, of)
    return _nm_prune_op(weight, norms, keep, of, group_impl("nm_prune_", of, impl))


def rowwise_mask(
    scores: Tensor, sparsity: float, *, norms: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Drop the same number of smallest scores from every row.

    Equivalent to `ones.scatter_(−1, scores.sort(−1, stable=True).indices[…, :count], False)`
    with the higher index going first among equals, without the sort; with `norms`, of
    `scores.abs() * norms` without that matrix.

    Args:
        scores: `(…, K)` float32, bfloat16 or float16; larger stays. `(1, R·C)` selects over a
            whole matrix.
        sparsity: share of each row to drop, in [0, 1]: floor(sparsity·K + 1e-9) of K scores, so
            never more than asked (the 1e-9 forgives 0.7·10 = 6.999…).
        norms: `(K,)` float32. If given, `scores` are weights, and |weight|·norm is what counts.
        impl: "auto", "triton", "triton_words" (the kernel that takes two 16-bit scores at a time,
            for even K up to 16384 without norms; else the same as "triton") or "eager".

    Returns:
        Bool, the shape of `scores`, True = keep. Among equal scores (±0 are equal) the lower
        index stays.

    Raises:
        ValueError: if sparsity is outside [0, 1], a score is NaN or infinite, or `impl` cannot
            run here.
    """
    _check("rowwise_mask", scores, norms, impl, "triton_words")
    prune = _count("rowwise_mask", scores, sparsity)
    return _rowwise_mask_op(scores, norms, prune, impl)


def rowwise_prune_(
    weight: Tensor, sparsity: float, *, norms: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Zero the same number of least weights in every row, in place.

    Equivalent to `weight.masked_fill_(~rowwise_mask(weight.abs(), sparsity), 0)` in one pass.

    Args:
        weight: `(…, K)` weights whose leading dimensions can be viewed as one; see `rowwise_mask`.
        sparsity: See `rowwise_mask`.
        norms: Score by |weight|·norm instead of |weight|.
        impl: See `rowwise_mask`.

    Returns:
        The mask, as `rowwise_mask` returns it.

    Raises:
        ValueError: see `rowwise_mask`.
    """
    _check("rowwise_prune_", weight, norms, impl, "triton_words")
    prune = _count("rowwise_prune_", weight, sparsity)
    return _rowwise_prune_op(weight, norms, prune, impl)


def group_impl(op: str, of: int, impl: str) -> str:
    """The implementation for groups of `of`: above 32, a selection by torch.

    Raises:
        ValueError: a kernel was asked for, and there is none for such groups.
    """
    if of <= LARGEST_GROUP:
        return impl
    if impl not in ("auto", "eager"):
        raise ValueError(
            f"{op}: impl={impl!r} cannot run: its groups hold at most {LARGEST_GROUP}, got "
            f"of={of}; use impl='auto'"
        )
    return "eager"


def _check(op: str, scores: Tensor, norms: Tensor | None, impl: str, *more: str) -> None:
    checks.floats(op, scores=scores, norms=norms)
    runtime.check_impl(impl, *more)
    if norms is None:
        return
    checks.same_device(op, scores, norms=norms)
    if norms.dtype != torch.float32 or norms.dim() != 1 or norms.shape != scores.shape[-1:]:
        raise ValueError(
            f"{op}: norms must be float32, one per input of the weights {tuple(scores.shape)}, got "
            f"{norms.dtype} of shape {tuple(norms.shape)}"
        )


def _check_groups(op: str, scores: Tensor, keep: int, of: int) -> None:
    if not 1 <= keep <= of:
        raise ValueError(f"{op}: keep must lie in 1..of, got keep={keep} of={of}")
    if scores.dim() == 0 or scores.shape[-1] % of:
        raise ValueError(
            f"{op}: the last dimension of scores {tuple(scores.shape)} is not a multiple of "
            f"of={of}; pad it, or leave this tensor out"
        )


def _count(op: str, scores: Tensor, sparsity: float) -> int:
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"{op}: sparsity must be a share between 0 and 1, got {sparsity}")
    if scores.dim() == 0:
        raise ValueError(f"{op}: scores need at least one dimension, got a scalar")
    return int(sparsity * scores.shape[-1] + 1e-9)
