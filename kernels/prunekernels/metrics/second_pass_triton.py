"""The statistics that need both normalisers first: Jensen–Shannon, total variation, Hellinger.

Each term is a non-linear function of ln(q/p), so that the logits are read a second time, in splits
of the vocabulary as in the first pass (METRICS, "Second pass"); `_full_terms` has the forms that
cancel nowhere.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="misc, var-annotated, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import KernelCase
from prunekernels.metrics import merge_triton, tuning
from prunekernels.metrics.rows import PairRows
from prunekernels.metrics.sums import triton as lib
from prunekernels.runtime import on


@triton.jit(do_not_specialize=["N", "V", "S"])
def _pair_full_kernel(
    base_ptr,  # logits a
    other_ptr,  # logits b
    starts_ptr,  # (2, N) int64 first element of each row, with ROW_TABLE
    norms_ptr,  # (4, N) float64, from the merge kernel
    sums_ptr,  # (N, S, 3) fp32: 2·JS, Σ|q−p|, Σ(√q−√p)²
    N,
    V,
    S,
    stride_an,
    stride_av,
    stride_bn,
    stride_bv,
    k,  # log2(e)/T
    inverse_t,  # 1/T
    ROW_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // S
    split = pid % S
    if ROW_TABLE:
        start_a = tl.load(starts_ptr + row)
        start_b = tl.load(starts_ptr + N + row)
    else:
        start_a = row * stride_an
        start_b = row * stride_bn
    ref_a = tl.load(norms_ptr + row).to(tl.float32)
    ref_b = tl.load(norms_ptr + N + row).to(tl.float32)
    norm_a = tl.load(norms_ptr + 2 * N + row)
    norm_b = tl.load(norms_ptr + 3 * N + row)
    apart = (norm_b - norm_a).to(tl.float32)
    norm_a = (norm_a * lib.LOG2E).to(tl.float32)
    norm_b = (norm_b * lib.LOG2E).to(tl.float32)
    whole = V // BLOCK
    first = (whole.to(tl.int64) * split // S).to(tl.int32) * BLOCK
    last = (whole.to(tl.int64) * (split + 1) // S).to(tl.int32) * BLOCK
    lanes = tl.arange(0, BLOCK)
    js = tl.zeros((BLOCK,), tl.float32)
    tv = tl.zeros((BLOCK,), tl.float32)
    he = tl.zeros((BLOCK,), tl.float32)
    for column in range(first, last, BLOCK):
        from_a = base_ptr + (start_a + tl.cast(column, tl.int64) * stride_av)
        from_b = other_ptr + (start_b + tl.cast(column, tl.int64) * stride_bv)
        a = tl.load(from_a + lanes * stride_av).to(tl.float32)
        b = tl.load(from_b + lanes * stride_bv).to(tl.float32)
        terms = _full_terms(a, b, ref_a, ref_b, norm_a, norm_b, apart, k, inverse_t)
        js += terms[0]
        tv += terms[1]
        he += terms[2]
    if (split == S - 1) & (last < V):
        columns = last + lanes
        mask = columns < V
        at_a = base_ptr + start_a + columns.to(tl.int64) * stride_av
        at_b = other_ptr + start_b + columns.to(tl.int64) * stride_bv
        a = tl.load(at_a, mask=mask, other=float("-inf")).to(tl.float32)
        b = tl.load(at_b, mask=mask, other=float("-inf")).to(tl.float32)
        terms = _full_terms(a, b, ref_a, ref_b, norm_a, norm_b, apart, k, inverse_t)
        js += terms[0]
        tv += terms[1]
        he += terms[2]
    tl.store(sums_ptr + pid * 3, tl.sum(js, 0))
    tl.store(sums_ptr + pid * 3 + 1, tl.sum(tv, 0))
    tl.store(sums_ptr + pid * 3 + 2, tl.sum(he, 0))


@triton.jit
def _full_terms(a, b, ref_a, ref_b, norm_a, norm_b, apart, k, inverse_t):
    """Terms of 2·JS, Σ|q−p| and Σ(√q−√p)² from logits and normalisers.

    With u = |ln(q/p)|, ρ = e^{−u/2} and m the larger of p and q, the smaller is mρ²:
    2·JS = Σ (p+q)(ln 2 − ln(1+ρ²)) − mρ²u, and (√q−√p)² = m(1−ρ)². Where p and q nearly agree
    that cancels, and series of s = (q−p)/(q+p) = tanh(u/2) serve.
    """
    none = (0.0, 0.0, 0.0)
    y, z, _, t = lib.exponents(a, b, ref_a, ref_b, none, k, inverse_t, True, False)
    p = tl.exp2(y - norm_a)
    q = tl.exp2(z - norm_b)
    both = p + q
    half = tl.abs(0.5 * (t - apart))
    half = tl.where(half < 1.0e4, half, 1.0e4)  # infinite or NaN where a logit is −inf
    rho = tl.exp2(half * -lib.LOG2E)
    r = rho * rho
    larger = tl.maximum(p, q)
    close = half < 0.25
    h2 = half * half
    s = half * (1.0 - h2 * (0.33333333 - h2 * (0.13333333 - h2 * 0.053968254)))
    s2 = s * s
    bend = 0.083333333 + s2 * (0.033333333 + s2 * (0.017857143 + s2 * 0.011111111))
    near = both * s2
    js = both * (lib.LN2 - tl.log(1.0 + r)) - larger * r * (2.0 * half)
    # 1 − √(1−s²)
    cap = 0.5 + s2 * (0.125 + s2 * (0.0625 + s2 * (0.0390625 + s2 * 0.02734375)))
    he = larger * (1.0 - rho) * (1.0 - rho)
    return (
        tl.where(close, near * (0.5 + s2 * bend), js),
        tl.where(close, both * s, tl.abs(q - p)),
        tl.where(close, near * cap, he),
    )


def second_pass(base: Tensor, other: Tensor, norms: Tensor, temperature: float) -> Tensor:
    """js, total_variation and hellinger `(3, N)` fp32, from the normalisers of the first pass."""
    rows = PairRows(base, other)
    splits = tuning.pair_splits(rows.count, rows.width)
    sums = torch.empty(rows.count, splits, 3, dtype=torch.float32, device=base.device)
    if rows.count:
        with on(base):
            _pair_full_kernel[(rows.count * splits,)](
                base,
                other,
                rows.starts,
                norms,
                sums,
                rows.count,
                rows.width,
                splits,
                *rows.strides,
                merge_triton.exponent_scale(temperature),
                1.0 / temperature,
                ROW_TABLE=rows.starts is not None,
                BLOCK=1024,
                num_warps=4,
                num_stages=1,
            )
    js, tv, he = sums.double().sum(1).unbind(-1)
    return torch.stack([0.5 * js, 0.5 * tv, torch.sqrt(0.5 * he)]).float()


def compile_cases() -> list[KernelCase]:
    """The pass over contiguous logits of two and of four bytes."""
    pointers = ("base_ptr", "other_ptr")
    strides = ("stride_an", "stride_bn")
    return [
        KernelCase(
            name=f"pair_stats/second_pass/{dtype}",
            kernel=_pair_full_kernel,
            signature={
                **dict.fromkeys(pointers, f"*{dtype}"),
                **dict.fromkeys(("N", "V", "S"), "i32"),
                **dict.fromkeys(strides, "i64"),
                **{"k": "fp32", "inverse_t": "fp32"},
                "norms_ptr": "*fp64",
                "sums_ptr": "*fp32",
            },
            constants={
                "starts_ptr": None,
                "stride_av": 1,
                "stride_bv": 1,
                "ROW_TABLE": False,
                "BLOCK": 1024,
            },
            num_stages=1,
            divisible=(*pointers, *strides),
            opcodes=("MUFU.EX2", "v_exp_f32"),
            elements_per_iteration=1024 // 4,
            archs=(80, 89, 90, "gfx942"),
        )
        for dtype in ("bf16", "fp32")
    ]
