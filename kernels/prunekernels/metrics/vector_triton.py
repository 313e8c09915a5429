"""Angles of pairs of vectors, every row of every layer in one launch (docs/metrics.md).

With h (base) and h+Δ (other): the five sums ‖h‖², ⟨h, Δ⟩, ‖Δ‖², ⟨h, h+Δ⟩, ‖h+Δ‖² in float32 lanes,
added and turned into the fields in float64 (`closed_form.angle_fields`) by the same program: a few
rows by four warps, or by name one row by one warp, whose lanes sum each tile by itself and add that
to the rest.
"""


# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.metrics import split_triton, tuning
from prunekernels.metrics.fields import Layout, VectorStats
from prunekernels.metrics.prepared import Prepared
from prunekernels.metrics.result_rows import VECTOR_FLOATS
from prunekernels.metrics.rows import PairRows
from prunekernels.metrics.sums.bundle_triton import add
from prunekernels.metrics.sums.elementwise_triton import angles


class Products(NamedTuple):
    """Sums over a pair of vectors a = h and b = h+Δ, with d = Δ."""

    aa: Any
    ad: Any
    dd: Any
    ab: Any
    bb: Any


@triton.jit(do_not_specialize=["N"])  # a D that 16 divides makes loads wide in spite of the mask
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
    s = _nothing((ROWS, BLOCK))
    for column in range(0, D, BLOCK):
        columns = (column + lanes).to(tl.int64)
        mask = inside[:, None] & (columns < D)[None, :]
        at_a = base_ptr + start_a[:, None] + columns[None, :] * stride_ad
        at_b = other_ptr + start_b[:, None] + columns[None, :] * stride_bd
        a = tl.load(at_a, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at_b, mask=mask, other=0.0).to(tl.float32)
        s = _add_terms(s, a, b)
    _store_fields(out_ptr, rows, N, s, 1, inside)


@triton.jit(do_not_specialize=["N", "D"])
def _vector_warp_kernel(
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
    PACKED: tl.constexpr,  # bf16 read two at a time, as 32-bit words
    LANES: tl.constexpr,
    UNITS: tl.constexpr,
):
    COLS: tl.constexpr = 8 if PACKED else 4
    WIDTH: tl.constexpr = COLS * LANES
    TILE: tl.constexpr = WIDTH * UNITS
    row = tl.program_id(0).to(tl.int64)
    if ROW_TABLE:
        row_a = base_ptr + tl.load(starts_ptr + row)
        row_b = other_ptr + tl.load(starts_ptr + N + row)
    else:
        row_a = base_ptr + row * stride_an
        row_b = other_ptr + row * stride_bn
    lanes = tl.arange(0, LANES)
    s = _nothing((LANES,))
    last = D // TILE * TILE
    for column in range(0, last, TILE):
        at_a = row_a + tl.cast(column, tl.int64) * stride_ad
        at_b = row_b + tl.cast(column, tl.int64) * stride_bd
        words_a = split_triton.tile(at_a, stride_ad, None, LANES, UNITS, PACKED)
        words_b = split_triton.tile(at_b, stride_bd, None, LANES, UNITS, PACKED)
        tile_a = split_triton.logits(words_a, PACKED)
        tile_b = split_triton.logits(words_b, PACKED)
        tile = Products(aa=-0.0, ad=-0.0, dd=-0.0, ab=-0.0, bb=-0.0)
        for j in tl.static_range(COLS * UNITS):
            tile = _add_terms(tile, tile_a[j], tile_b[j])
        s = Products(*add(s, tile))
    for column in range(last, D, WIDTH):
        for j in tl.static_range(COLS):
            columns = column + j * LANES + lanes
            mask = columns < D
            at_a = row_a + columns.to(tl.int64) * stride_ad
            at_b = row_b + columns.to(tl.int64) * stride_bd
            a = tl.load(at_a, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(at_b, mask=mask, other=0.0).to(tl.float32)
            s = _add_terms(s, a, b)
    _store_fields(out_ptr, row, N, s, 0, None)


@triton.jit
def _nothing(SHAPE: tl.constexpr):
    none = tl.zeros(SHAPE, tl.float32)
    return Products(aa=none, ad=none, dd=none, ab=none, bb=none)


@triton.jit
def _add_terms(s, a, b):
    d = b - a
    return Products(
        aa=s.aa + a * a, ad=s.ad + a * d, dd=s.dd + d * d, ab=s.ab + a * b, bb=s.bb + b * b
    )


@triton.jit
def _store_fields(out_ptr, rows, N, s, AXIS: tl.constexpr, mask):
    """Add the lanes of rows up and store their fields."""
    aa = tl.sum(s.aa.to(tl.float64), AXIS)
    bb = tl.sum(s.bb.to(tl.float64), AXIS)
    cosine, one_minus, alpha, orthogonal = angles(
        aa,
        tl.sum(s.ad.to(tl.float64), AXIS),
        tl.sum(s.dd.to(tl.float64), AXIS),
        tl.sum(s.ab.to(tl.float64), AXIS),
        bb,
    )
    fields = (
        cosine,
        one_minus,
        0.5 * orthogonal * orthogonal,
        alpha,
        tl.abs(alpha),
        orthogonal,
        tl.sqrt(aa),
        tl.sqrt(bb),
    )
    for i in tl.static_range(len(fields)):
        tl.store(out_ptr + tl.cast(i, tl.int64) * N + rows, fields[i].to(tl.float32), mask=mask)


def vector_launch(
    base: Tensor, other: Tensor, out: Tensor, config: tuning.VectorConfig | tuning.PairConfig
) -> Launch:
    """The call that fills `out` `(fields, N)`; a `PairConfig` is that of one warp to a row."""
    rows = PairRows(base, other)
    constants: dict[str, Any] = {"ROW_TABLE": rows.starts is not None}
    if isinstance(config, tuning.PairConfig):
        constants["PACKED"] = rows.packed and not rows.shift
        constants |= {"LANES": config.lanes, "UNITS": config.units}
        kernel, programs = _vector_warp_kernel, rows.count
    else:
        constants |= {"ROWS": config.rows, "BLOCK": config.block}
        kernel, programs = _vector_stats_kernel, triton.cdiv(rows.count, config.rows)
    return Launch(
        kernel,
        (programs,),
        (base, other, rows.starts, out, rows.count, rows.width, *rows.strides),
        constants,
        num_warps=config.num_warps,
        num_stages=1,
    )


def vector_stats(base: Tensor, other: Tensor) -> Tensor:
    """Packed `(fields, N)` statistics of `(…, D)` vectors (`eager.vector_stats` by Triton)."""
    return _run(base, other, _config(base, "triton"))


def vector_stats_by_warps(base: Tensor, other: Tensor) -> Tensor:
    """The same, one row to a warp."""
    return _run(base, other, _config(base, "triton_warp"))


def prepared(base: Tensor, other: Tensor, fields: Sequence[str], impl: str) -> Prepared | None:
    """`vector_stats` of such tensors, ready to be launched; None for rows that need a table.

    impl: "triton" or "triton_warp".
    """
    out = _empty(base)
    call = vector_launch(base, other, out, _config(base, impl))
    if call.arguments[2] is not None:
        return None
    places = {name: (0, VECTOR_FLOATS.index(name)) for name in fields}
    return Prepared((call,), (base, other), (out,), Layout(places, tuple(fields)), VectorStats)


def _config(base: Tensor, impl: str) -> tuning.VectorConfig | tuning.PairConfig:
    if impl == "triton":
        return tuning.vector_config(base.shape[-1])
    return tuning.vector_warp_config(32 if torch.version.hip is None else 64)


def _empty(base: Tensor) -> Tensor:
    rows = base.numel() // base.shape[-1]
    return torch.empty(len(VECTOR_FLOATS), rows, dtype=torch.float32, device=base.device)


def _run(base: Tensor, other: Tensor, config: tuning.VectorConfig | tuning.PairConfig) -> Tensor:
    out = _empty(base)
    if out.numel():
        vector_launch(base, other, out, config).run()
    return out


def compile_cases() -> list[KernelCase]:
    """Vectors of 4096 numbers."""
    rows, width = 1024, 4096
    nvidia: tuple[Arch, ...] = (80, 89, 90)
    blocks, warps = tuning.vector_config(width), tuning.vector_warp_config()
    cases = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        tensors = (meta((rows, width), dtype), meta((rows, width), dtype))
        out = meta((len(VECTOR_FLOATS), rows), torch.float32)
        cases += [
            vector_launch(*tensors, out, blocks).case(
                f"vector_stats/{short}",
                opcodes=("LDG.E.128", "global_load_dwordx"),
                elements_per_iteration=blocks.rows * blocks.block // blocks.num_warps,
                archs=(*nvidia, "gfx942"),
            ),
            vector_launch(*tensors, out, warps).case(
                f"vector_stats/warp/{short}",
                opcodes=("LDG.E.128",),
                elements_per_iteration=tuning.tile_columns(warps, dtype == torch.bfloat16),
                archs=nvidia,
            ),
        ]
    return cases
