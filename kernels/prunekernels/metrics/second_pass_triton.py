"""The statistics that need both normalisers first: Jensen–Shannon, total variation, Hellinger.

Each term is a non-linear function of ln(q/p), so that the logits are read a second time, in splits
of the vocabulary as in the first pass. With h = |ln(q/p)|/2, ρ = e^{−h}, r = ρ² and m the larger
of p and q: 2·JS = m·(−(1+r)·ln((1+r)/2) − 2rh), |q−p| = m(1−r), (√q−√p)² = m(1−ρ)². Where h < 1/2
that cancels, and with √(pq) = mρ: 2·JS = √(pq)·2(h·sinh h − cosh h·ln cosh h), |q−p| =
√(pq)·2·sinh h, (√q−√p)² = √(pq)·2(cosh h − 1), from their series.
"""


# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="misc, var-annotated, assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.metrics import merge_triton, result_rows, split_triton, tuning
from prunekernels.metrics.rows import PairRows
from prunekernels.metrics.sums import elementwise_triton as elementwise

_LN2 = 0.6931471805599453
#: √(pq)·h²(1 + h⁴/72 − …)/(2 ln 2) and its like, in powers of h in base-2 units.
_JS = tl.constexpr(
    (
        _LN2 / 2,
        _LN2**5 / 2 / 72,
        _LN2**7 / 2 / -360,
        _LN2**9 / 2 * 443 / 604800,
    )
)
_TV = tl.constexpr((2 * _LN2, 2 * _LN2**3 / 6, 2 * _LN2**5 / 120, 2 * _LN2**7 / 5040))
_HE = tl.constexpr((_LN2**2, _LN2**4 / 12, _LN2**6 / 360))
#: Below this h, in base-2 units, series serve: 1/2.
_NEAR = tl.constexpr(0.5 / _LN2)


class Norms(NamedTuple):
    """What makes probabilities of the logits of a row.

    p = factor·2^(k·a−lse_a), q = factor·2^(k·b−lse_b+tilt), and ln(q/p) = ((b−a)−apart)/T, where
    `apart` comes in two parts, so that b−a loses nothing: tilt and factor are what rounding the
    normalisers to float32 takes away.
    """

    lse_a: Any
    lse_b: Any
    tilt: Any
    factor: Any
    apart: Any
    apart_rest: Any
    k: Any


class Terms(NamedTuple):
    """Sums of JS/ln 2, |q−p| and (√q−√p)²."""

    js: Any
    tv: Any
    he: Any


@triton.jit
def _norms(norms_ptr, row, N, k):
    scale = tl.cast(k, tl.float64)
    log2e = tl.cast(elementwise.LOG2E, tl.float64)
    lse_a = tl.load(norms_ptr + row) * scale + tl.load(norms_ptr + 2 * N + row) * log2e
    lse_b = tl.load(norms_ptr + N + row) * scale + tl.load(norms_ptr + 3 * N + row) * log2e
    apart = (lse_b - lse_a) / scale
    rest_a = lse_a - lse_a.to(tl.float32).to(tl.float64)
    rest_b = lse_b - lse_b.to(tl.float32).to(tl.float64)
    high = apart.to(tl.float32)
    return Norms(
        lse_a=lse_a.to(tl.float32),
        lse_b=lse_b.to(tl.float32),
        tilt=(rest_a - rest_b).to(tl.float32),
        factor=tl.exp2(-rest_a.to(tl.float32)),
        apart=high,
        apart_rest=(apart - high.to(tl.float64)).to(tl.float32),
        k=k,
    )


@triton.jit
def _add_terms(t, a, b, norms, NVIDIA: tl.constexpr):
    """Add the terms of logits, without the factor."""
    # h in base-2 units; infinite or NaN where a logit is −inf, and then 1000 will do
    h = tl.abs(((b - a) - norms.apart) - norms.apart_rest) * (0.5 * norms.k)
    h = elementwise.at_most(h, 1000.0)
    larger = tl.exp2(
        tl.maximum(
            elementwise.fma(a, norms.k, -norms.lse_a),
            elementwise.fma(b, norms.k, -norms.lse_b) + norms.tilt,
        )
    )
    rho = tl.exp2(-h)
    gone = 1.0 - rho
    r = rho * rho
    c = 0.5 + 0.5 * r
    h2 = h * h
    near = h < _NEAR
    near_js = h2 * (_JS[0] + (h2 * h2) * (_JS[1] + h2 * (_JS[2] + h2 * _JS[3])))
    near_tv = h * (_TV[0] + h2 * (_TV[1] + h2 * (_TV[2] + h2 * _TV[3])))
    near_he = h2 * (_HE[0] + h2 * (_HE[1] + h2 * _HE[2]))
    weight = tl.where(near, larger * rho, larger)
    far_js = -c * elementwise.log2(c, NVIDIA) - r * h
    return Terms(
        js=t.js + weight * tl.where(near, near_js, far_js),
        tv=t.tv + weight * tl.where(near, near_tv, 1.0 - r),
        he=t.he + weight * tl.where(near, near_he, gone * gone),
    )


@triton.jit
def _totals(t, norms):
    return Terms(
        js=tl.sum(t.js, 0) * norms.factor,
        tv=tl.sum(t.tv, 0) * norms.factor,
        he=tl.sum(t.he, 0) * norms.factor,
    )


@triton.jit
def _no_terms(LANES: tl.constexpr):
    none = tl.zeros((LANES,), tl.float32)
    return Terms(js=none, tv=none, he=none)


@triton.jit(do_not_specialize=["N", "V", "S"])
def _full_tile_kernel(
    base_ptr,  # logits a
    other_ptr,  # logits b
    starts_ptr,  # (2, N) int64 first element of each row, with ROW_TABLE
    norms_ptr,  # (4, N) float64, from the merge kernel
    sums_ptr,  # (N, S, 3) fp32: `Terms`
    N,
    V,
    S,
    stride_an,
    stride_av,
    stride_bn,
    stride_bv,
    k,  # log2(e)/T
    ROW_TABLE: tl.constexpr,
    NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = split_triton.span(
        *(base_ptr, other_ptr, starts_ptr, N, V, S, stride_an, stride_bn),
        *(ROW_TABLE, False, 1, BLOCK, BLOCK),
    )
    norms = _norms(norms_ptr, part.row, N, k)
    lanes = tl.arange(0, BLOCK)
    t = _no_terms(BLOCK)
    for column in range(part.first, part.last, BLOCK):
        from_a = part.base + tl.cast(column, tl.int64) * stride_av
        from_b = part.other + tl.cast(column, tl.int64) * stride_bv
        a = tl.load(from_a + lanes * stride_av).to(tl.float32)
        b = tl.load(from_b + lanes * stride_bv).to(tl.float32)
        t = _add_terms(t, a, b, norms, NVIDIA)
    if part.tails > 0:
        a, b = split_triton.piece(part, part.last, 0, stride_av, stride_bv, BLOCK, 1)
        t = _add_terms(t, a, b, norms, NVIDIA)
    t = _totals(t, norms)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 3
    for i in tl.static_range(3):
        tl.store(out + i, t[i])


@triton.jit(do_not_specialize=["N", "V", "S"])
def _full_warp_kernel(
    base_ptr,  # logits a
    other_ptr,  # logits b
    starts_ptr,  # (2, N) int64 first element of each row, with ROW_TABLE
    norms_ptr,  # (4, N) float64, from the merge kernel
    sums_ptr,  # (N, S, 3) fp32: `Terms`
    N,
    V,
    S,
    stride_an,
    stride_av,
    stride_bn,
    stride_bv,
    k,  # log2(e)/T
    ROW_TABLE: tl.constexpr,
    NVIDIA: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    LANES: tl.constexpr,
    UNITS: tl.constexpr,
):
    # as in `pair_warp_triton`: the next tile's loads are issued while this one is summed
    COLS: tl.constexpr = 8 if PACKED else 4
    WIDTH: tl.constexpr = COLS * LANES
    TILE: tl.constexpr = WIDTH * UNITS
    part = split_triton.span(
        *(base_ptr, other_ptr, starts_ptr, N, V, S, stride_an, stride_bn),
        *(ROW_TABLE, SHIFT, COLS, WIDTH, TILE),
    )
    norms = _norms(norms_ptr, part.row, N, k)
    t = _no_terms(LANES)
    at_a = part.base + tl.cast(part.first, tl.int64) * stride_av
    at_b = part.other + tl.cast(part.first, tl.int64) * stride_bv
    raw_a = split_triton.tile(at_a, stride_av, part.first < part.last, LANES, UNITS, PACKED)
    raw_b = split_triton.tile(at_b, stride_bv, part.first < part.last, LANES, UNITS, PACKED)
    for column in range(part.first, part.last, TILE):
        tile_a = split_triton.logits(raw_a, PACKED)
        tile_b = split_triton.logits(raw_b, PACKED)
        ahead = tl.where(column + TILE < part.last, TILE, 0)
        at_a += ahead * stride_av
        at_b += ahead * stride_bv
        raw_a = ()
        raw_b = ()
        tile = Terms(js=-0.0, tv=-0.0, he=-0.0)
        for u in tl.static_range(UNITS):
            raw_a = raw_a + split_triton.vectors(at_a, stride_av, u * WIDTH, None, LANES, PACKED)
            raw_b = raw_b + split_triton.vectors(at_b, stride_bv, u * WIDTH, None, LANES, PACKED)
            for j in tl.static_range(COLS):
                tile = _add_terms(tile, tile_a[u * COLS + j], tile_b[u * COLS + j], norms, NVIDIA)
        t = Terms(js=t.js + tile.js, tv=t.tv + tile.tv, he=t.he + tile.he)
    for number in range(0, part.heads + part.tails):
        column = tl.where(number < part.heads, 0, part.last + (number - part.heads) * WIDTH)
        for j in tl.static_range(COLS):
            a, b = split_triton.piece(part, column, j, stride_av, stride_bv, LANES, COLS)
            t = _add_terms(t, a, b, norms, NVIDIA)
    t = _totals(t, norms)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 3
    for i in tl.static_range(3):
        tl.store(out + i, t[i])


@triton.jit(do_not_specialize=["N", "S", "first"])
def _full_merge_kernel(
    sums_ptr,  # (N, S, 3) fp32: `Terms`
    broken_ptr,  # (N,) bool: whether NaN or infinity spoils the row
    out_ptr,  # (fields, N) fp32
    N,
    S,
    first,  # field of the first of those asked for
    ASKED: tl.constexpr,  # bits in the order of `result_rows.FULL_FLOATS`
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,  # splits read at a time
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    js = tl.zeros((ROWS,), tl.float64)
    tv = js
    he = js
    for start in range(0, S, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        mask = inside[:, None] & (splits < S)[None, :]
        at = sums_ptr + (rows[:, None] * S + splits[None, :]) * 3
        js += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), 1)
        tv += tl.sum(tl.load(at + 1, mask=mask, other=0.0).to(tl.float64), 1)
        he += tl.sum(tl.load(at + 2, mask=mask, other=0.0).to(tl.float64), 1)
    broken = tl.load(broken_ptr + rows, mask=inside, other=0) != 0
    js = js * elementwise.LN2
    fields = (tl.where(js < 0.0, 0.0, js), 0.5 * tv, tl.sqrt(0.5 * he))
    out = out_ptr + first * tl.cast(N, tl.int64) + rows
    for i in tl.static_range(3):
        if (ASKED >> i) & 1:
            value = tl.where(broken, float("nan"), fields[i]).to(tl.float32)
            tl.store(out, value, mask=inside)
            out += N


def sums_of_terms(
    base: Tensor,
    other: Tensor,
    norms: Tensor,
    sums: Tensor,
    temperature: float,
    config: tuning.PairConfig,
) -> Launch:
    """The call that reads the logits and fills `sums` `(N, S, 3)`."""
    rows = PairRows(base, other)
    splits = sums.shape[1]
    constants: dict[str, Any] = {"ROW_TABLE": rows.starts is not None, "NVIDIA": config.warp == 32}
    if config.design == "warp":
        constants |= {"SHIFT": rows.shift, "PACKED": rows.packed}
        constants |= {"LANES": config.lanes, "UNITS": config.units}
    else:
        constants["BLOCK"] = tuning.tile_columns(config, False)
    return Launch(
        _full_warp_kernel if config.design == "warp" else _full_tile_kernel,
        (rows.count * splits,),
        (
            *(base, other, rows.starts, norms, sums, rows.count, rows.width, splits),
            *(*rows.strides, merge_triton.exponent_scale(temperature)),
        ),
        constants,
        num_warps=config.num_warps,
        num_stages=1,
    )


def fields_of_sums(sums: Tensor, broken: Tensor, out: Tensor, asked: Sequence[str]) -> Launch:
    """The call that writes the fields asked for to the last rows of `out`."""
    rows, splits = sums.shape[:2]
    config = tuning.merge_config(splits, "warp")
    return Launch(
        _full_merge_kernel,
        (triton.cdiv(rows, config.rows),),
        (sums, broken, out, rows, splits, len(out) - len(asked)),
        {
            "ASKED": sum(1 << result_rows.FULL_FLOATS.index(name) for name in asked),
            "ROWS": config.rows,
            "SPLITS": config.splits,
        },
        num_warps=config.num_warps,
        num_stages=1,
    )


def second_pass(
    base: Tensor,
    other: Tensor,
    norms: Tensor,
    broken: Tensor,
    temperature: float,
    out: Tensor,
    asked: Sequence[str],
    design: str = "tile",
) -> None:
    """Write js, total_variation and hellinger, or those of them asked for.

    Args:
        base: logits `(…, V)`.
        other: logits of the same shape.
        norms: `(4, N)` float64 references and normalisers, from the first pass.
        broken: `(N,)` bool, rows that are to be NaN.
        temperature: T.
        out: `(fields, N)` fp32, whose last rows are written.
        asked: names of `result_rows.FULL_FLOATS`, in their order.
        design: one of `tuning.DESIGNS`.
    """
    vocab = base.shape[-1]
    count = base.numel() // vocab
    if not count:
        return
    config = tuning.full_config(design, 32 if torch.version.hip is None else 64)
    columns = tuning.tile_columns(config, base.dtype == torch.bfloat16)
    splits = tuning.pair_splits(count, vocab, config, columns, tuning.multiprocessors(base))
    sums = torch.empty(count, splits, 3, dtype=torch.float32, device=base.device)
    sums_of_terms(base, other, norms, sums, temperature, config).run()
    fields_of_sums(sums, broken, out, asked).run()


def compile_cases() -> list[KernelCase]:
    """The pass over contiguous logits of two and of four bytes, and the merge of many splits."""
    nvidia: tuple[Arch, ...] = (80, 89, 90)
    amd: tuple[Arch, ...] = ("gfx942",)
    rows, vocab = 64, 152064
    cases = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for design in tuning.DESIGNS:
            for warp, archs in ((32, nvidia), (64, amd)):
                config = tuning.full_config(design, warp)
                columns = tuning.tile_columns(config, dtype == torch.bfloat16)
                launch = sums_of_terms(
                    *(meta((rows, vocab), dtype), meta((rows, vocab), dtype)),
                    *(meta((4, rows), torch.float64), meta((rows, 8, 3), torch.float32)),
                    *(1.0, config),
                )
                prefix = "second_pass" if design == "tile" else f"second_pass/{design}"
                cases.append(
                    launch.case(
                        f"pair_stats/{prefix}/{short}",
                        opcodes=("MUFU.EX2", "v_exp_f32"),
                        elements_per_iteration=columns // config.num_warps,
                        archs=archs,
                    )
                )
    launch = fields_of_sums(
        *(meta((rows, 128, 3), torch.float32), meta((rows,), torch.bool)),
        *(meta((23, rows), torch.float32), result_rows.FULL_FLOATS),
    )
    cases.append(launch.case("pair_stats/second_merge", opcodes=("DADD", "v_add_f64")))
    return cases
