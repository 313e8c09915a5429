"""Round the weights that a mask keeps to 8 or 4 bits, and make up for it. No model here.

A weight becomes a code times a scale: an integer, or a number of float8_e4m3fn. Columns are visited
from left to right as SparseGPT does: with (H + λI)⁻¹ = UᵀU, rounding the weight w of column i to v
changes the columns j > i of its row by -((w - v) / U_ii)·U_ij; a weight that the mask leaves out is
rounded to 0. Afterwards each row's scales are fitted to its codes by least squares.
docs/pruning.md, "Mathematics", derives both, and why the walk may start from weights that are
updated already. Sources: GPTQ (arXiv 2210.17323); SparseGPT (arXiv 2301.00774), section 3.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FP8 = "fp8"  # `bits` of float8_e4m3fn
#: The largest code by `bits`.
_LARGEST: dict[int | str, float] = {8: 127.0, 4: 7.0, FP8: 448.0}
GROUP = 128  # columns that share a scale at 4 bits; at 8 bits a row has one scale
_BLOCK = 128  # columns whose errors reach the columns behind them by one matrix product
_SHRINKS = 16  # scales that are tried: the largest weight's, and smaller ones
_SMALLEST = 0.5  # … down to this part of it
_FITTED_TOGETHER = 2**24  # elements of the scales' fit that exist at once
_ATTRIBUTE = "_prunekit_rounded"


@dataclass(frozen=True)
class Rounded:
    """A matrix as codes and scales.

    Attributes:
        codes: (out, in), 0 where masked. int8: -127 to 127 or -7 to 7; float8_e4m3fn of "fp8".
        scales: (out, ⌈in / group⌉), float32, above 0.
        bits: 8, 4 or "fp8".
        group: Columns that share a scale; the last group of a row may be shorter.
    """

    codes: Tensor
    scales: Tensor
    bits: int | str
    group: int

    @classmethod
    def empty(
        cls, shape: tuple[int, int], bits: int | str, group: int | None, device: Any
    ) -> Rounded:
        """All zero, for a matrix (out, in); `group` None means `usual_group`."""
        rows, width = shape
        group = usual_group(bits, width) if group is None else min(group, width)
        kind = torch.float8_e4m3fn if bits == FP8 else torch.int8
        return cls(
            torch.zeros(shape, dtype=kind, device=device),
            torch.ones(rows, -(-width // group), device=device),
            bits,
            group,
        )

    @property
    def format(self) -> str:
        """The packed format that holds it, where its pattern is 2:4."""
        return "2:4-fp8" if self.bits == FP8 else f"2:4-int{self.bits}"

    def to_dense(self) -> Tensor:
        """code · scale, (out, in), float32."""
        return self.codes.float() * self._per_column

    @property
    def _per_column(self) -> Tensor:
        width = self.codes.shape[1]
        return self.scales.repeat_interleave(self.group, dim=1)[:, :width]


def usual_group(bits: int | str, width: int) -> int:
    """The columns that share a scale unless a method says otherwise."""
    return min(GROUP, width) if bits == 4 else width


def round_(
    found: Rounded, weights: Tensor, mask: Tensor, upper: Tensor, hessian: Tensor, dense: Tensor
) -> None:
    """Fill in the codes and scales of a matrix.

    Args:
        found: What to fill in.
        weights: (out, in): pruned weights, updated or not; zero outside the mask.
        mask: (out, in), bool, True = keep.
        upper: U, (in, in), float32; see `sparsegpt.InverseFactor`.
        hessian: (in, in): XᵀX, damped like U's.
        dense: (out, in): the weights whose outputs the scales are fitted to.
    """
    # Transposed: a visited column of all rows is contiguous.
    left = weights.t().float().clone(memory_format=torch.contiguous_format)
    keep = mask.t().contiguous()
    codes, scales = torch.zeros_like(left), found.scales.t().contiguous()
    for start, stop, opens in _blocks(len(left), found.group):
        group = start // found.group
        if opens:
            end = min(start + found.group, len(left))
            importance = upper.diagonal()[start:end].square().reciprocal()
            scales[group] = _scale(left[start:end] * keep[start:end], importance, found.bits)
        scale, errors = scales[group], torch.empty_like(left[start:stop])
        for column in range(start, stop):
            value = _nearest_(left[column] / scale, found.bits) * keep[column]
            codes[column] = value
            error = (left[column] - value * scale) / upper[column, column]
            left[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        left[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    found.codes.copy_(codes.t())
    found.scales.copy_(scales.t())
    _fit_scales_(found, hessian.float(), dense.float())


def _blocks(width: int, group: int) -> Iterator[tuple[int, int, bool]]:
    """Columns that are visited together, none over a group's end: start, stop, first of a group."""
    for first in range(0, width, group):
        last = min(first + group, width)
        for start in range(first, last, _BLOCK):
            yield start, min(start + _BLOCK, last), start == first


def _nearest_(values: Tensor, bits: int | str) -> Tensor:
    """The nearest codes, float32; `values` are used up."""
    limit = _LARGEST[bits]
    if bits == FP8:
        return values.clamp_(-limit, limit).to(torch.float8_e4m3fn).float()
    return values.round_().clamp_(-limit, limit)


def _scale(columns: Tensor, importance: Tensor, bits: int | str) -> Tensor:
    """The scale of each row that rounds (columns, rows) best, of `_SHRINKS` candidates: (rows,)."""
    largest = columns.abs().amax(0) / _LARGEST[bits]
    largest.masked_fill_(largest == 0, 1.0)
    best, least = largest, torch.full_like(largest, float("inf"))
    for part in torch.linspace(1.0, _SMALLEST, _SHRINKS).tolist():
        scale = largest * part
        missed = columns - _nearest_(columns / scale, bits) * scale
        error = importance @ missed.square_()
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _fit_scales_(found: Rounded, hessian: Tensor, dense: Tensor) -> None:
    """Give each row the scales s that minimise (Σ_g s_g·q_g - w)·H·(Σ_g s_g·q_g - w)ᵀ.

    q_g are the row's codes of group g, zero elsewhere. Rows whose normal equations have no
    usable answer (a scale that is not positive) keep the walk's scales.
    """
    rows, width = found.codes.shape
    groups = found.scales.shape[1]
    member = torch.zeros(groups, width, device=hessian.device)
    member[torch.arange(width, device=hessian.device) // found.group, torch.arange(width)] = 1
    step = max(1, _FITTED_TOGETHER // (groups * width))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        split = found.codes[part].float()[:, None] * member  # (rows, groups, in)
        product = split @ hessian
        normal = product @ split.mT
        empty = split.abs().sum(-1) == 0
        normal.diagonal(dim1=-2, dim2=-1)[empty] = 1.0
        wanted = (product @ dense[part, :, None]).squeeze(-1)
        wanted = torch.where(empty, 1.0, wanted)
        fitted, failed = torch.linalg.solve_ex(normal.double(), wanted.double())
        usable = (failed == 0) & (fitted > 0).all(-1) & fitted.isfinite().all(-1)
        scales = found.scales[part]
        scales.copy_(torch.where(usable[:, None], fitted.to(scales.dtype), scales))


def attach_(module: nn.Module, rounded: Rounded) -> None:
    """Remember a linear layer's codes and scales beside its weight, for packing."""
    vars(module)[_ATTRIBUTE] = rounded


def fill_(module: nn.Module, rounded: Rounded) -> None:
    """Copy codes and scales into what `attach_` put there."""
    room: Rounded = vars(module)[_ATTRIBUTE]
    room.codes.copy_(rounded.codes)
    room.scales.copy_(rounded.scales)


def forget_(module: nn.Module) -> None:
    """Let go of what `attach_` remembered."""
    vars(module).pop(_ATTRIBUTE, None)


def attached(module: nn.Module) -> Rounded | None:
    """What `attach_` remembered, if the layer's weight still has exactly these values."""
    rounded: Rounded | None = vars(module).get(_ATTRIBUTE)
    weight = getattr(module, "weight", None)
    if rounded is None or not isinstance(weight, Tensor):
        return None
    stored = weight.detach()
    stored = stored.t() if isinstance(module, Conv1D) else stored
    return rounded if torch.equal(rounded.to_dense().to(stored), stored) else None
