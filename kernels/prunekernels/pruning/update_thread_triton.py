"""SparseGPT's walk over a block of columns by Triton, one row per thread: runs by name.

The sums of `update_triton`, in the same order, a part of the columns at a time, each column in a
register: they take the errors of all columns before them, then unrolled code visits one after the
other. A thread needs nothing of another one, so no column costs a barrier or a shuffle. U's numbers
are the same for all threads.
"""

# ruff: noqa: RUF005  (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch
from prunekernels.pruning import tuning, update_triton


@triton.jit
def _number(pair, j: tl.constexpr):
    """The number of column j, of its pair."""
    return (pair >> (32 * (j % 2))).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _take(w, e, upper_ptr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Take errors e out of the columns from FIRST on; upper_ptr is all columns' row of U."""
    left = ()
    for j in tl.static_range(COLUMNS):
        if j < FIRST:
            left = left + (w[j],)
        else:
            if j == FIRST or j % 2 == 0:
                pair = tl.load(upper_ptr + j // 2)
            left = left + (w[j] - e * _number(pair, j),)
    return left


@triton.jit
def _stays(w, scales, FIRST: tl.constexpr, KEEP: tl.constexpr, M: tl.constexpr):
    """Which KEEP of the M columns from FIRST on stay: the largest scores, of equals the first."""
    scores = ()
    for j in tl.static_range(M):
        score = w[FIRST + j] * scales[FIRST + j]
        scores = scores + (score * score,)
    stays = ()
    for i in tl.static_range(M):
        better = tl.zeros(scores[0].shape, tl.int32)
        for j in tl.static_range(M):
            if j < i:
                better += (scores[j] >= scores[i]).to(tl.int32)
            elif j > i:
                better += (scores[j] > scores[i]).to(tl.int32)
        stays = stays + (better < KEEP,)
    return stays


@triton.jit(do_not_specialize=["R", "C"])
def _thread_kernel(
    weight_ptr,  # (R, C) fp32
    upper_ptr,  # (C, C / 2) int64: two fp32 of a row each
    chosen_ptr,  # (R, C) int8: 1 = keep; with M = 0
    pruned_ptr,  # (C, R) fp32
    errors_ptr,  # (C, R) fp32
    mask_ptr,  # (C, R) int8
    R,
    C,  # a multiple of COLUMNS
    stride_wr,
    stride_wc,
    stride_u,
    stride_mr,
    stride_mc,
    KEEP: tl.constexpr,
    M: tl.constexpr,  # 0: `chosen_ptr` says what stays
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # visited together, a multiple of M
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < R
    for first in range(0, C, COLUMNS):
        at = tl.cast(first, tl.int64)
        here = weight_ptr + rows * stride_wr + at * stride_wc
        corner = upper_ptr + at * stride_u + first // 2
        w = ()
        scales = ()
        for j in tl.static_range(COLUMNS):
            w = w + (tl.load(here, mask=inside, other=0.0),)
            here += stride_wc
            scales = scales + (1.0 / _number(tl.load(corner + j * stride_u + j // 2), j),)
        before = errors_ptr + rows
        above = upper_ptr + first // 2
        for _ in tl.range(0, first, loop_unroll_factor=4):
            e = tl.load(before, mask=inside, other=0.0)
            w = _take(w, e, above, 0, COLUMNS)
            before += R
            above += stride_u
        stays = ()
        errors = ()
        if M == 0:
            chosen = chosen_ptr + rows * stride_mr + at * stride_mc
        for i in tl.static_range(COLUMNS):
            if M == 0:
                stays = stays + (tl.load(chosen, mask=inside, other=1) > 0,)
                chosen += stride_mc
            elif i % M == 0:
                stays = stays + _stays(w, scales, i, KEEP, M)
            e = tl.where(stays[i], 0.0, w[i] * scales[i])
            errors = errors + (e,)
            w = _take(w, e, corner + i * stride_u, i + 1, COLUMNS)
        # after all loads, which stores would hold up
        out = at * R + rows
        for i in tl.static_range(COLUMNS):
            tl.store(errors_ptr + out, errors[i], mask=inside)
            tl.store(pruned_ptr + out, tl.where(stays[i], w[i], 0.0), mask=inside)
            tl.store(mask_ptr + out, stays[i].to(tl.int8), mask=inside)
            out += R
        # a row's errors are read back for the next columns
        tl.debug_barrier()


def sparsegpt_update(
    weight: Tensor, upper: Tensor, mask: Tensor | None, keep: int, of: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`update_eager.sparsegpt_update` by this kernel, or by `update_triton` where it cannot."""
    together = tuning.UPDATE_THREAD.columns
    if weight.shape[1] % together or (mask is None and together % of):
        return update_triton.sparsegpt_update(weight, upper, mask, keep, of)
    if upper.stride(1) != 1 or upper.stride(0) % 2 or upper.storage_offset() % 2:
        upper = upper.clone(memory_format=torch.contiguous_format)
    return update_triton.by_blocks(_call, weight, upper, mask, keep, of)


def _call(
    inputs: tuple[Tensor, Tensor, Tensor | None, int, int], outputs: tuple[Tensor, Tensor, Tensor]
) -> Launch:
    """The update of one block of columns, real or on the meta device."""
    weight, upper, mask, keep, of = inputs
    pairs = weight, upper.view(torch.int64), mask, keep, of
    return update_triton.launch(_thread_kernel, tuning.UPDATE_THREAD, pairs, outputs)


def compile_cases() -> list[KernelCase]:
    """A whole block of 128 columns: the mask given, and 2:4 and 8:16 chosen inside."""
    return update_triton.cases(_call, "sparsegpt_update/thread", (2, 4), (8, 16))
