"""The best values of the weights that a mask keeps: least squares by ADMM. No model here.

With inputs X (tokens, in) and H = XᵀX + λI, wanted are the weights Z (out, in) that are zero
outside the mask and minimise tr((Z - W)·H·(Z - W)ᵀ) for the dense weights W. Each row is a system
of linear equations with a matrix of its own. ADMM splits the mask from the product, so that all
rows of all matrices that read X share one inverse (docs/pruning.md, "Mathematics"). Source: "Fast
and Optimal Weight Update for Pruned Large Language Models" (arXiv 2401.02938), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 20  # the source's number
# ρ, where the Hessian's diagonal is 1. Of 0.03, 0.1, 0.3 and the source's 1, this came nearest to
# the exact answer in 20 steps on the embedded model's matrices.
PENALTY = 0.3
DAMPING = 0.01  # of methods that have no setting of that name


@dataclass(frozen=True)
class System:
    """What the rows of all matrices that read one input share.

    Attributes:
        scale: (in,), float32: the root of the damped Hessian's diagonal. Weights times `scale` are
            the unknowns, so that all inputs weigh alike.
        hessian: (in, in), float32: the damped Hessian of these unknowns; its diagonal is 1.
        inverse: (in, in), float32: (hessian + ρI)⁻¹.
    """

    scale: Tensor
    hessian: Tensor
    inverse: Tensor


def system(hessian: Tensor, damping: float) -> System:
    """Damp, scale and invert.

    Args:
        hessian: (in, in), XᵀX, not all zero.
        damping: λ as a fraction of the mean of the Hessian's diagonal, as SparseGPT's.
    """
    damped = hessian.double()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    scale = damped.diagonal().sqrt()
    damped /= scale
    damped /= scale[:, None]
    scaled = damped.float()
    damped.diagonal().add_(PENALTY)  # its eigenvalues are at least ρ: it can be factored
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return System(scale.float(), scaled, inverse.float())


def refit(
    found: System, dense: Tensor, start: Tensor, mask: Tensor, *, steps: int = STEPS
) -> Tensor:
    """The kept weights whose outputs come closest to the dense ones'.

    Args:
        found: See `system`.
        dense: (out, in), W: the weights whose outputs count.
        start: (out, in): weights to begin with, zero outside the mask.
        mask: (out, in), bool, True = keep.
        steps: Iterations, one matrix product each.

    Returns:
        (out, in), float32, zero outside the mask. No row has a larger error than in `start`.
    """
    target, first = dense.float() * found.scale, start.float() * found.scale
    kept, dual = first, torch.zeros_like(first)
    for _ in range(steps):
        # W-step: argmin of tr((V-W)H(V-W)ᵀ)/2 + ρ/2·‖V - Z + U‖² = W + ρ(Z - U - W)(H + ρI)⁻¹
        free = torch.addmm(target, kept - dual - target, found.inverse, alpha=PENALTY)
        free += dual
        kept = free * mask
        dual = free - kept
    better = _errors(found, kept - target) < _errors(found, first - target)
    return torch.where(better[:, None], kept, first) / found.scale


def _errors(found: System, change: Tensor) -> Tensor:
    """tr(e·H·eᵀ) row by row: (out,)."""
    return torch.linalg.vecdot(change @ found.hessian, change)
