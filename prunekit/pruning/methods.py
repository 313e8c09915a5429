"""One method on the matrices that read one input: weights and statistics in, pruned weights out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekit.pruning import admm, importance, rounding, sparsegpt
from prunekit.pruning.input_statistics import InputStatistics
from prunekit.pruning.recipes import ADMM, RIA, Magnitude, Method, SparseGPT, Wanda
from prunekit.pruning.rounding import Rounded
from prunekit.pruning.sparsegpt import InverseFactor

_NO_TOKENS = "no calibration token reached it: scored by magnitude"
_SILENT = "its calibration inputs are all zero: scored by magnitude"


@dataclass(frozen=True)
class Pruned:
    """A matrix's new weights and mask, both (out, in), what was unusual, and the rounding."""

    weights: Tensor
    mask: Tensor
    note: str = ""
    rounded: Rounded | None = None


def prune_group(
    matrices: Sequence[Tensor], method: Method, inputs: InputStatistics | None
) -> list[Pruned]:
    """Prune matrices that read the same input by the same method; the originals stay."""
    note = ""
    if inputs is not None and not inputs.tokens:
        note = _NO_TOKENS
    elif inputs is not None and not bool(inputs.square_sum.any()):
        note = _SILENT
    factor = None
    if inputs is not None and not note and (isinstance(method, SparseGPT) or method.bits):
        assert inputs.hessian is not None
        factor = sparsegpt.inverse_factor(inputs.hessian, _damping(method))
    if isinstance(method, SparseGPT) and factor is not None:
        results = _by_sparsegpt(matrices, method, factor)
    elif isinstance(method, ADMM) and inputs is not None and not note:
        results = _by_admm(matrices, method, inputs)
    else:
        masks = _masks(matrices, method, None if note else inputs)
        note = note if method.calibrated else ""
        results = [_masked(*pair, note) for pair in zip(matrices, masks, strict=True)]
    refits = method.update is not None and not isinstance(method, ADMM)  # which has done so
    if refits and inputs is not None and not note:
        results = _refitted(matrices, method, inputs, results)
    if method.bits is not None and inputs is not None:
        results = _rounded(matrices, method, inputs, factor, results)
    return results


def _masks(
    matrices: Sequence[Tensor], method: Method, inputs: InputStatistics | None
) -> list[Tensor]:
    """Masks by scores; without inputs all of them count alike."""
    pattern = method.target
    if isinstance(method, Magnitude):
        return [
            importance.select(importance.magnitude(m), pattern, per_row=False) for m in matrices
        ]
    mean_square = torch.ones(matrices[0].shape[1], device=matrices[0].device)
    mean_square = mean_square if inputs is None else inputs.mean_square
    if isinstance(method, Wanda) and (pattern.structured or not method.variant):
        return [importance.wanda_mask(matrix, mean_square, pattern) for matrix in matrices]
    found = []
    for matrix in matrices:
        if isinstance(method, RIA):
            ranked = importance.relative(matrix, mean_square, method.power)
        else:
            ranked = importance.wanda(matrix, mean_square)
        if isinstance(method, Wanda):
            ranked = importance.cumulative_shares(ranked)
        found.append(importance.select(ranked, pattern, per_row=False))
    return found


def _refitted(
    matrices: Sequence[Tensor],
    method: Method,
    inputs: InputStatistics,
    results: Sequence[Pruned],
) -> list[Pruned]:
    """The same masks with the values that ADMM finds."""
    assert inputs.hessian is not None
    if inputs.tokens < len(inputs.hessian):
        note = f"only {inputs.tokens} calibration tokens reached it: not updated"
        return [replace(result, note=note) for result in results]
    found = admm.system(inputs.hessian, _damping(method))
    done = []
    for matrix, result in zip(matrices, results, strict=True):
        free = result.mask if _revives(method) else result.mask & (matrix != 0)
        weights = admm.refit(found, matrix, result.weights, free)
        done.append(replace(result, weights=weights))
    return done


def _rounded(
    matrices: Sequence[Tensor],
    method: Method,
    inputs: InputStatistics,
    factor: InverseFactor | None,
    results: Sequence[Pruned],
) -> list[Pruned]:
    """The same masks with rounded weights; without a factor every weight goes to the nearest."""
    assert method.bits is not None and inputs.hessian is not None
    if factor is None:
        upper = hessian = torch.eye(len(inputs.hessian), device=inputs.hessian.device)
    else:
        upper, hessian = factor.upper, inputs.hessian.clone()
        hessian.diagonal().add_(factor.damping * hessian.diagonal().mean())
    done = []
    for matrix, result in zip(matrices, results, strict=True):
        shape = (matrix.shape[0], matrix.shape[1])
        found = Rounded.empty(shape, method.bits, method.group, matrix.device)
        rounding.round_(found, result.weights, result.mask, upper, hessian, matrix)
        done.append(replace(result, weights=found.to_dense(), rounded=found))
    return done


def _damping(method: Method) -> float:
    return method.damping if isinstance(method, SparseGPT | ADMM) else admm.DAMPING


def _revives(method: Method) -> bool:
    """Whether weights that are zero may get values."""
    return isinstance(method, SparseGPT) and not method.keep_zeros


def _masked(matrix: Tensor, mask: Tensor, note: str = "") -> Pruned:
    return Pruned(matrix.masked_fill(mask.logical_not(), 0), mask, note)


def _by_admm(matrices: Sequence[Tensor], method: ADMM, inputs: InputStatistics) -> list[Pruned]:
    assert inputs.hessian is not None
    found = admm.system(inputs.hessian, method.damping, admm.CHOOSING)
    return [Pruned(*admm.choose(found, matrix, method.target, matrix != 0)) for matrix in matrices]


def _by_sparsegpt(
    matrices: Sequence[Tensor], method: SparseGPT, factor: InverseFactor
) -> list[Pruned]:
    notes = []
    if factor.damping != method.damping:
        notes.append(f"damping raised from {method.damping:g} to {factor.damping:g}")
    results = sparsegpt.sparsify(
        matrices, factor.upper, method.target, method.block, keep_zeros=method.keep_zeros
    )
    done = []
    for matrix, (weights, mask) in zip(matrices, results, strict=True):
        alive = 0 if method.keep_zeros else int(((matrix == 0) & (weights != 0)).sum())
        again = [f"{alive} zeros are weights again"] if alive else []
        done.append(Pruned(weights, mask, "; ".join([*notes, *again])))
    return done
