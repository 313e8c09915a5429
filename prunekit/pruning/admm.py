"""Masks, and the best values of the weights that a mask keeps, by ADMM. No model here.

With inputs X (tokens, in) and H = XᵀX + λI, wanted are the weights Z (out, in) that are zero
outside the mask and minimise tr((Z - W)·H·(Z - W)ᵀ) for the dense weights W. Each row is a system
of linear equations with a matrix of its own. ADMM splits the mask from the product, so that all
rows of all matrices that read X share one inverse (docs/pruning.md, "Mathematics"). Source: "Fast
and Optimal Weight Update for Pruned Large Language Models" (arXiv 2401.02938), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekit.pruning import importance
from prunekit.pruning.patterns import Pattern

STEPS = 20  # the source's number
# ρ, where the Hessian's diagonal is 1. Of 0.03, 0.1, 0.3 and the source's 1, this came nearest to
# the exact answer in 20 steps on two of the embedded model's matrices.
PENALTY = 0.3
CHOOSING = 1.0  # ρ while the mask is chosen as well: a smaller one holds on to early choices
RISING = 15  # steps over which an unstructured sparsity rises, by the source's cubic root
DAMPING = 0.01  # of methods that have no setting of that name


@dataclass(frozen=True)
class System:
    """What the rows of all matrices that read one input share.

    Attributes:
        scale: (in,), float32: the root of the damped Hessian's diagonal. Weights times `scale` are
            the unknowns, so that all inputs weigh alike.
        hessian: (in, in), float32: the damped Hessian of these unknowns; its diagonal is 1.
        inverse: (in, in), float32: (hessian + ρI)⁻¹.
        penalty: ρ.
    """

    scale: Tensor
    hessian: Tensor
    inverse: Tensor
    penalty: float

    def free(self, target: Tensor, kept: Tensor, dual: Tensor) -> Tensor:
        """The minimum over V of tr((V-W)·H·(V-W)ᵀ)/2 + ρ/2·‖V - Z + U‖², in scaled unknowns.

        Args:
            target: (out, in), W.
            kept: (out, in), Z.
            dual: (out, in), U.
        """
        return torch.addmm(target, kept - dual - target, self.inverse, alpha=self.penalty)


def system(hessian: Tensor, damping: float, penalty: float = PENALTY) -> System:
    """Damp, scale and invert.

    Args:
        hessian: (in, in), XᵀX, not all zero.
        damping: λ as a fraction of the mean of the Hessian's diagonal, as SparseGPT's.
        penalty: ρ.
    """
    damped = hessian.double()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    scale = damped.diagonal().sqrt()
    damped /= scale
    damped /= scale[:, None]
    scaled = damped.float()
    damped.diagonal().add_(penalty)  # its eigenvalues are at least ρ: it can be factored
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return System(scale.float(), scaled, inverse.float(), penalty)


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
        free = found.free(target, kept, dual).add_(dual)
        kept = free * mask
        dual = free - kept
    better = _errors(found, kept - target) < _errors(found, first - target)
    return torch.where(better[:, None], kept, first) / found.scale


def choose(found: System, dense: Tensor, pattern: Pattern, alive: Tensor) -> tuple[Tensor, Tensor]:
    """A mask, chosen anew in every step by what the step makes of the weights, and its values.

    Args:
        found: See `system`; its ρ is best `CHOOSING`.
        dense: (out, in), W.
        pattern: What to prune; unstructured counts over the matrix.
        alive: (out, in), bool: weights that may stay; the others are the first to go.

    Returns:
        The weights (out, in), float32, refitted, and the mask, True = keep.
    """
    target = dense.float() * found.scale
    kept, dual, mask = target, torch.zeros_like(target), alive
    for step in range(1, STEPS + 1):
        free = found.free(target, kept, dual).add_(dual)
        share = min(1.0, step / RISING) ** (1 / 3) if not pattern.structured else 1.0
        now = replace(pattern, sparsity=pattern.sparsity * share)
        mask = importance.select(free.abs().mul_(alive), now, per_row=False).logical_and_(alive)
        kept = free * mask
        dual = free - kept
    return refit(found, dense, kept / found.scale, mask), mask


def _errors(found: System, change: Tensor) -> Tensor:
    """tr(e·H·eᵀ) row by row: (out,)."""
    return torch.linalg.vecdot(change @ found.hessian, change)
