"""Angles of pairs of vectors, every row of every layer in one launch (METRICS: `VectorStats`).

With h (base) and h+Δ (other): the five sums ‖h‖², ⟨h, Δ⟩, ‖Δ‖², ⟨h, h+Δ⟩, ‖h+Δ‖² in float32 lanes,
added and turned into the fields in float64 (`closed_form.angle_fields`) by the same program.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import KernelCase
from prunekernels.metrics import tuning
from prunekernels.metrics.result_rows import VECTOR_FLOATS
from prunekernels.metrics.rows import PairRows
from prunekernels.metrics.sums import triton as lib
from prunekernels.runtime import on


@triton.jit(do_not_specialize=["N", "D"])
def _vector_stats_kernel(
    base_ptr,  # vectors h
    other_ptr,  # vectors h+Δ
    starts_ptr,  # (2, N) int64 first element of each row, with ROW_TABLE
    out_ptr,  # (8, N) fp32, `result_rows.VECTOR_FLOATS`
    N,
    D,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    ROW_TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    if ROW_TABLE:
        start_a = tl.load(starts_ptr + rows, mask=inside, other=0)
        start_b = tl.load(starts_ptr + N + rows, mask=inside, other=0)
    else:
        start_a = rows * stride_an
        start_b = rows * stride_bn
    lanes = tl.arange(0, BLOCK)
    z2 = tl.zeros((ROWS, BLOCK), tl.float32)
    zd = z2
    d2 = z2
    zz = z2
    b2 = z2
    for column in range(0, D, BLOCK):
        columns = (column + lanes).to(tl.int64)
        mask = inside[:, None] & (columns < D)[None, :]
        at_a = base_ptr + start_a[:, None] + columns[None, :] * stride_ad
        at_b = other_ptr + start_b[:, None] + columns[None, :] * stride_bd
        a = tl.load(at_a, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at_b, mask=mask, other=0.0).to(tl.float32)
        d = b - a
        z2 += a * a
        zd += a * d
        d2 += d * d
        zz += a * b
        b2 += b * b
    z2 = tl.sum(z2.to(tl.float64), 1)
    zd = tl.sum(zd.to(tl.float64), 1)
    d2 = tl.sum(d2.to(tl.float64), 1)
    zz = tl.sum(zz.to(tl.float64), 1)
    b2 = tl.sum(b2.to(tl.float64), 1)
    cosine, one_minus, alpha, orthogonal = lib.angles(z2, zd, d2, zz, b2)
    fields = (
        cosine,
        one_minus,
        0.5 * orthogonal * orthogonal,
        alpha,
        tl.abs(alpha),
        orthogonal,
        tl.sqrt(z2),
        tl.sqrt(b2),
    )
    for i in tl.static_range(len(fields)):
        tl.store(out_ptr + tl.cast(i, tl.int64) * N + rows, fields[i].to(tl.float32), mask=inside)


def vector_stats(base: Tensor, other: Tensor) -> Tensor:
    """Packed `(fields, N)` statistics of `(…, D)` vectors (`eager.vector_stats` by Triton)."""
    rows = PairRows(base, other)
    out = torch.empty(len(VECTOR_FLOATS), rows.count, dtype=torch.float32, device=base.device)
    if rows.count:
        config = tuning.vector_config(rows.width)
        with on(base):
            _vector_stats_kernel[(triton.cdiv(rows.count, config.rows),)](
                base,
                other,
                rows.starts,
                out,
                rows.count,
                rows.width,
                *rows.strides,
                ROW_TABLE=rows.starts is not None,
                ROWS=config.rows,
                BLOCK=config.block,
                num_warps=config.num_warps,
                num_stages=1,
            )
    return out


def compile_cases() -> list[KernelCase]:
    """Vectors of 4096 numbers."""
    config = tuning.vector_config(4096)
    strides = dict.fromkeys(("stride_an", "stride_bn"), "i64")
    return [
        KernelCase(
            name=f"vector_stats/{dtype}",
            kernel=_vector_stats_kernel,
            signature={
                **{"base_ptr": f"*{dtype}", "other_ptr": f"*{dtype}", "out_ptr": "*fp32"},
                **{"N": "i32", "D": "i32"},
                **strides,
            },
            constants={
                **{"starts_ptr": None, "stride_ad": 1, "stride_bd": 1, "ROW_TABLE": False},
                **{"ROWS": config.rows, "BLOCK": config.block},
            },
            num_warps=config.num_warps,
            num_stages=1,
            divisible=("base_ptr", "other_ptr", "D", *strides),
            opcodes=("LDG.E.128", "global_load_dwordx"),
            elements_per_iteration=config.rows * config.block // config.num_warps,
            archs=(80, 89, 90, "gfx942"),
        )
        for dtype in ("bf16", "fp32")
    ]
