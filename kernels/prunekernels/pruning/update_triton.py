"""SparseGPT's walk over a block of columns by Triton: a program owns rows, and visits the columns.

For i = 0, 1, …: e_i = w_i / U_ii where column i is pruned, else 0; w_j −= e_i·U_ij for j > i. Under
N:M the pruned ones of a group are chosen when its first column is reached: smallest (w_j / U_jj)²
first, of equals the last. The tile of weights stays in registers, U's block in the first-level
cache. Derived in docs/pruning.md, "Mathematics"; source: SparseGPT (arXiv 2301.00774), algorithm 1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.pruning import tuning


@triton.jit(do_not_specialize=["R", "C"])
def _update_kernel(
    weight_ptr,  # (R, C) fp32
    upper_ptr,  # (C, C) fp32, rows of consecutive numbers
    chosen_ptr,  # (R, C) int8: 1 = keep; with M = 0
    pruned_ptr,  # (C, R) fp32
    errors_ptr,  # (C, R) fp32
    mask_ptr,  # (C, R) int8
    R,
    C,
    stride_wr,
    stride_wc,
    stride_u,
    stride_mr,
    stride_mc,
    KEEP: tl.constexpr,
    M: tl.constexpr,  # 0: `chosen_ptr` says what stays
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # ≥ C
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    at = rows[:, None] * stride_wr + columns.to(tl.int64)[None, :] * stride_wc
    w = tl.load(weight_ptr + at, mask=inside, other=0.0)
    diagonal = tl.load(upper_ptr + columns.to(tl.int64) * (stride_u + 1), columns < C, other=1.0)
    scale = 1.0 / diagonal
    keep = tl.full((ROWS, COLUMNS), 1, tl.int32)
    if M == 0:
        chosen = rows[:, None] * stride_mr + columns.to(tl.int64)[None, :] * stride_mc
        keep = tl.load(chosen_ptr + chosen, mask=inside, other=1).to(tl.int32)
    for i in range(0, C):
        here = (columns == i)[None, :]
        if M > 0 and i % M == 0:
            # a score's bits are ordered as it is; the column breaks ties and makes keys unique
            score = w * scale[None, :]
            bits = (score * score).to(tl.int32, bitcast=True).to(tl.int64)
            key = (bits << 8) | (255 - columns)[None, :].to(tl.int64)
            group = ((columns >= i) & (columns < i + M))[None, :]
            for _ in range(M - KEEP):
                left = tl.where(group & (keep > 0), key, 0x7FFFFFFFFFFFFFFF)
                least = tl.min(left, 1)
                keep = tl.where(left == least[:, None], 0, keep)
        stays = tl.sum(tl.where(here, keep, 0), 1)
        inverse = tl.sum(tl.where(columns == i, scale, 0.0))
        value = tl.sum(tl.where(here, w, 0.0), 1)
        e = tl.where(stays > 0, 0.0, value * inverse)
        row = upper_ptr + tl.cast(i, tl.int64) * stride_u + columns
        factor = tl.load(row, mask=(columns > i) & (columns < C), other=0.0)
        w = w - e[:, None] * factor[None, :]
        tl.store(errors_ptr + tl.cast(i, tl.int64) * R + rows, e, mask=rows < R)
    w = tl.where(keep > 0, w, 0.0)
    out = columns.to(tl.int64)[None, :] * R + rows[:, None]
    tl.store(pruned_ptr + out, w, mask=inside)
    tl.store(mask_ptr + out, keep.to(tl.int8), mask=inside)


def sparsegpt_update(
    weight: Tensor, upper: Tensor, mask: Tensor | None, keep: int, of: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`update_eager.sparsegpt_update` by Triton, at most 128 columns per launch."""
    return by_blocks(_call, weight, upper, mask, keep, of)


def by_blocks(
    call: Callable[..., Launch],
    weight: Tensor,
    upper: Tensor,
    mask: Tensor | None,
    keep: int,
    of: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The update by launches that `call` makes of inputs and outputs of a block of columns."""
    rows, width = weight.shape
    pruned = torch.empty(width, rows, dtype=torch.float32, device=weight.device)
    errors = torch.empty_like(pruned)
    kept = torch.empty(width, rows, dtype=torch.bool, device=weight.device)
    upper = upper if upper.stride(1) == 1 else upper.contiguous()
    most = tuning.UPDATE_COLUMNS
    step = most if mask is not None else most - most % of
    if width > step:
        weight = weight.clone()
    for start in range(0, width, step):
        stop = min(start + step, width)
        part = slice(start, stop)
        chosen = None if mask is None else mask[:, part]
        inputs = weight[:, part], upper[part, part], chosen, keep, of
        if weight.numel():
            call(inputs, (pruned[part], errors[part], kept[part])).run()
        if stop < width:
            weight[:, stop:].addmm_(errors[part].t(), upper[part, stop:], alpha=-1)
    return pruned.t(), errors.t(), kept.t()


def _call(
    inputs: tuple[Tensor, Tensor, Tensor | None, int, int], outputs: tuple[Tensor, Tensor, Tensor]
) -> Launch:
    """The update of one block of columns, real or on the meta device."""
    return launch(_update_kernel, tuning.update_tile(*inputs[0].shape), inputs, outputs)


def launch(
    kernel: Any,
    tile: tuning.UpdateConfig,
    inputs: tuple[Tensor, Tensor, Tensor | None, int, int],
    outputs: tuple[Tensor, Tensor, Tensor],
) -> Launch:
    """The call of a kernel with these parameters."""
    weight, upper, mask, keep, of = inputs
    pruned, errors, kept = outputs
    return Launch(
        kernel,
        (triton.cdiv(weight.shape[0], tile.rows),),
        (
            weight,
            upper,
            None if mask is None else mask.view(torch.int8),
            pruned,
            errors,
            kept.view(torch.int8),
            *weight.shape,
            *weight.stride(),
            upper.stride(0),
            *((0, 0) if mask is None else mask.stride()),
        ),
        {
            "KEEP": keep,
            "M": of if mask is None else 0,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
        },
        num_warps=tile.num_warps,
    )


def compile_cases() -> list[KernelCase]:
    """A whole block of 128 columns: the mask given, and 2:4 and 16:32 chosen inside."""
    return cases(_call, "sparsegpt_update", (2, 4), (16, 32))


def cases(call: Callable[..., Launch], name: str, *patterns: tuple[int, int]) -> list[KernelCase]:
    """What `call` compiles to for a whole block: the mask given, and these patterns chosen."""
    rows, width = 4096, tuning.UPDATE_COLUMNS
    out = meta((width, rows), torch.float32)
    # weight and mask are column-major, as pruning has them
    weight, upper = out.t(), meta((width, width), torch.float32)
    mask = meta((width, rows), torch.bool)
    found = []
    for keep, of in ((0, 0), *patterns):
        inputs = weight, upper, None if of else mask.t(), keep, of
        pattern = f"{keep}:{of}" if of else "unstructured"
        found.append(call(inputs, (out, out, mask)).case(f"{name}/{pattern}", opcodes=("FFMA",)))
    return found
