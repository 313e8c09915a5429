"""SparseGPT's mathematics: Hessians, their inverse factors, and the column loop. No model here.

With inputs X (tokens, in) and H = XᵀX + λI, let U be upper triangular with H⁻¹ = UᵀU. Columns are
visited from left to right; weight w of column i costs w² / U_ii², and pruning it changes the
columns j > i of its row by -(w / U_ii) · U_ij, which is the least-squares answer (derived in
docs/pruning.md, "Mathematics"). Source: "SparseGPT: Massive Language Models Can Be Accurately
Pruned in One-Shot" (arXiv 2301.00774), algorithm 1. An input that is always zero needs no special
case: λ is its diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from prunekernels import nm_mask, rowwise_mask, sparsegpt_update
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.pruning.patterns import Pattern

_TRIANGLE_BLOCK = 128  # columns of the Hessian that are accumulated by one matrix product
_INVERSE_BLOCK = 128  # triangular inverses up to this size are left to LAPACK
_DAMPING_STEPS = (1, 10, 100, 1000)  # factors on the damping, tried in turn


def accumulate_(hessian: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ · rows to the lower triangle of `hessian`.

    H is symmetric: computing its lower block triangle saves up to half of the work. `mirror_`
    fills in the rest once all rows are in.

    Args:
        hessian: (in, in), float32; only the lower triangle becomes meaningful.
        rows: (tokens, in). Products of bfloat16 or float16 numbers are exact in float32, so on a
            GPU, whose tensor cores add them up in float32, nothing but the sum is rounded.
    """
    width = hessian.shape[0]
    narrow = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
    rows = rows if narrow else rows.float()
    for start in range(0, width, _TRIANGLE_BLOCK):
        stop = min(start + _TRIANGLE_BLOCK, width)
        left, right, sums = rows[:, start:].t(), rows[:, start:stop], hessian[start:, start:stop]
        if narrow:
            sums += torch.mm(left, right, out_dtype=torch.float32)
        else:
            sums.addmm_(left, right)


def mirror_(hessian: Tensor) -> None:
    """Copy the lower triangle of `hessian` (in, in) onto the upper one, without a second matrix."""
    for start in range(0, hessian.shape[0], _TRIANGLE_BLOCK):
        stop = min(start + _TRIANGLE_BLOCK, hessian.shape[0])
        square = hessian[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).t())
        hessian[start:stop, stop:] = hessian[stop:, start:stop].t()


@dataclass(frozen=True)
class InverseFactor:
    """U with (H + λI)⁻¹ = UᵀU.

    Attributes:
        upper: (in, in), upper triangular, float32.
        damping: λ as a fraction of the mean of H's diagonal: what was asked for, or more.
    """

    upper: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float) -> InverseFactor:
    """Factor the inverse of the damped Hessian.

    Flipping rows and columns turns the Cholesky factor of H into an upper triangular R with
    H = RRᵀ, so U = R⁻¹ takes one factorisation and one triangular inverse. The factorisation is in
    float64: the condition number of H reaches 1e5, of which float32 would leave two digits. That of
    R is its root, so its inverse can be float32: on the embedded model U is then off by 4e-7 at
    most, and every mask the same.

    Args:
        hessian: (in, in), symmetric, with a positive diagonal sum.
        damping: Fraction of the mean of the diagonal to add to it. Where rounding leaves H
            indefinite, 10, 100 and 1000 times as much is tried, and reported.

    Raises:
        PrunekitError: Not even the highest damping makes H positive definite.
    """
    diagonal = hessian.diagonal().double()
    mean = float(diagonal.mean())
    for factor in _DAMPING_STEPS:
        # A float64 copy of H is the largest thing that SparseGPT holds. It is factored in place,
        # for which LAPACK wants columns of consecutive numbers: those of the symmetric H are rows.
        lower = _reversed(hessian).t()
        lower.diagonal().copy_((diagonal + damping * factor * mean).flip(0))
        failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        # what is not finite in a row reaches its diagonal
        if not failed and bool(torch.isfinite(lower.diagonal()).all()):
            inverse = lower.to(torch.float32, memory_format=torch.contiguous_format)
            del lower
            _invert_lower_(inverse)
            return InverseFactor(inverse.flip(0, 1), damping * factor)
    raise PrunekitError(
        f"the Hessian is not positive definite even with damping {damping * _DAMPING_STEPS[-1]:g}: "
        "calibrate on more tokens, or raise damping"
    )


def _reversed(matrix: Tensor) -> Tensor:
    """`matrix.flip(0, 1).double()`, of a square matrix, without the flipped matrix between."""
    found = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device)
    width = len(matrix)
    for start in range(0, width, _TRIANGLE_BLOCK):
        part = matrix[start : start + _TRIANGLE_BLOCK]
        found[width - start - len(part) : width - start] = part.flip(0, 1)
    return found


def _invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place; halves, so that matrix products do the work."""
    width = lower.shape[0]
    if width <= _INVERSE_BLOCK:
        identity = torch.eye(width, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = width // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower_(first)
    _invert_lower_(last)
    below.copy_(last @ (below @ first)).neg_()


def sparsify(
    matrices: Sequence[Tensor],
    upper: Tensor,
    pattern: Pattern,
    block: int,
    *,
    keep_zeros: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Prune matrices that read the same input, in one walk over its columns.

    Rows don't depend on each other, so the matrices are stacked; each still gets its own mask
    and exact count. Unstructured: after the first c columns of an (out, in) matrix exactly
    ⌊sparsity · out · c⌋ weights are pruned, for c at every block's end, hence
    ⌊sparsity · out · in⌋ in all.

    Args:
        matrices: (out, in) each, one device.
        upper: See `InverseFactor`.
        pattern: What to prune. Under N:M, `in` is a multiple of M.
        block: Columns whose mask is chosen together when unstructured; also how far errors are
            propagated column by column, the rest by one matrix product (rounded down to a
            multiple of M).
        keep_zeros: Whether a weight that is zero stays so. Such weights are the first that a mask
            leaves out, and where they are more than the pattern asks for, it keeps fewer.

    Returns:
        For each matrix the pruned and updated weights, float32, and the mask, True = keep.
    """
    sizes = [matrix.shape[0] for matrix in matrices]
    # Transposed: a visited column of all rows is contiguous. One copy, made by `cat`.
    weight = torch.cat([matrix.t() for matrix in matrices], dim=1).float()
    keep = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    zeros = weight == 0 if keep_zeros else None
    if zeros is not None and not bool(zeros.any()):
        zeros = None  # nothing to hold on to, so the faster walk will do
    if pattern.structured:
        block = max(pattern.of, block - block % pattern.of)
    inverse_diagonal = upper.diagonal().reciprocal()
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        columns, factor = weight[start:stop], upper[start:stop, start:stop]
        if pattern.structured and zeros is not None:
            keep[start:stop], errors = _groups_with_zeros_(
                columns, factor, zeros[start:stop], pattern
            )
        elif pattern.structured:
            found = sparsegpt_update(columns.t(), factor, keep=pattern.keep, of=pattern.of)
            keep[start:stop], errors = found.mask.t(), found.errors.t()
            columns.copy_(found.pruned.t())
        else:
            scaled = columns * inverse_diagonal[start:stop, None]
            if zeros is not None:
                scaled.masked_fill_(zeros[start:stop], 0)
            _choose_block(scaled, keep, start, sizes, pattern.sparsity)
            if zeros is not None:
                keep[start:stop].logical_and_(zeros[start:stop].logical_not())
            found = sparsegpt_update(columns.t(), factor, keep[start:stop].t())
            errors = found.errors.t()
            columns.copy_(found.pruned.t())
        weight[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    pruned, masks = torch.split(weight, sizes, dim=1), torch.split(keep, sizes, dim=1)
    return [(values.t(), mask.t()) for values, mask in zip(pruned, masks, strict=True)]


def _groups_with_zeros_(
    columns: Tensor, factor: Tensor, zeros: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Prune one block of columns to N:M, group by group, and leave zeros zero.

    `sparsegpt_update` chooses N:M masks itself, from weights alone; masks that know of zeros have
    to be chosen here, between the groups' updates.

    Args:
        columns: (columns, rows), whole groups of M; pruned and updated in place.
        factor: (columns, columns): this block of U.
        zeros: (columns, rows), bool: weights that stay zero.
        pattern: N:M.

    Returns:
        The mask (columns, rows), and the errors (columns, rows) to propagate.
    """
    mask, errors = zeros.logical_not(), torch.empty_like(columns)
    scale = factor.diagonal().reciprocal()
    for start in range(0, len(columns), pattern.of):
        stop = start + pattern.of
        group = columns[start:stop]
        scores = (group * scale[start:stop, None]).square_().masked_fill_(zeros[start:stop], 0)
        mask[start:stop] &= nm_mask(scores.t(), pattern.keep, pattern.of).t()
        found = sparsegpt_update(group.t(), factor[start:stop, start:stop], mask[start:stop].t())
        group.copy_(found.pruned.t())
        errors[start:stop] = found.errors.t()
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    return mask, errors


def _choose_block(
    scaled: Tensor, keep: Tensor, start: int, sizes: list[int], sparsity: float
) -> None:
    """Choose what stays of one block of columns, for each of the stacked matrices.

    Args:
        scaled: (columns, rows of all matrices): weight / U_ii; overwritten.
        keep: (in, rows of all matrices), bool: this block's part is written.
        start: Index of the block's first column.
        sizes: Rows of each matrix.
        sparsity: Fraction to prune.
    """
    stop = start + len(scaled)
    scores = torch.split(scaled.square_(), sizes, dim=1)
    masks = torch.split(keep[start:stop], sizes, dim=1)
    for part, mask, rows in zip(scores, masks, sizes, strict=True):
        # the epsilon forgives 0.7 · 10 = 6.999…, as prunekernels.rowwise_mask does
        before, after = (int(sparsity * rows * columns + 1e-9) for columns in (start, stop))
        # the half keeps the division from rounding the count down
        share = (after - before + 0.5) / part.numel() if after > before else 0.0
        found = rowwise_mask(part.reshape(1, -1), min(share, 1.0))
        mask.copy_(found.view(part.shape))
