"""Selection by Triton: which weights stay, without sorting and without a matrix of scores.

A score becomes an int32 key that is ordered as the scores are: the float32's bits, those of
negative numbers flipped, ±0 alike. A row's cut is the smallest key t with #{key ≤ t} ≥ prune.
Short rows: one program keeps the keys on chip and narrows [lo, hi] ∋ t by counting, over 16 or 19
bits where scores are of 16 bits (the other bits of their keys are 0). Long rows: four
histograms of eight bits each (radix select), shared by the row's programs through integer atomics.
Of the keys equal to t the first #{key ≤ t} − prune stay. N:M ranks a group by all its pairs.
"""

# ruff: noqa: RUF005  (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels import checks
from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.pruning import tuning

#: Above every key of a finite score.
LAST = tl.constexpr(0x7FFFFFFF)
#: The key of infinity.
INFINITE = tl.constexpr(0x7F800000)
BINS = tl.constexpr(256)
#: Low bits of the float32 bits of a 16-bit number: always 0.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def _keys(x_ptr, norms_ptr, at, columns, inside, ABS: tl.constexpr, SCALED: tl.constexpr):
    """Ordered int32 keys of scores x, |x| (ABS) or |x|·norm (ABS, SCALED); LAST outside."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if x.dtype == tl.bfloat16:
        # by its bits: the interpreter's conversion loses subnormals
        high = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        x = high.to(tl.float32, bitcast=True)
    x = x.to(tl.float32)
    if ABS:
        x = tl.abs(x)
    if SCALED:
        x = x * tl.load(norms_ptr + columns, mask=inside, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # a negative number's bits grow as it falls; -0 becomes -1 + 1 = 0
    key = tl.where(bits < 0, (bits ^ 0x7FFFFFFF) + 1, bits)
    return tl.where(inside, key, LAST), inside & (size >= INFINITE)


@triton.jit
def _report(bad_ptr, broken):
    """Remember that a score is NaN or infinite."""
    if tl.max(broken.to(tl.int32)) > 0:
        tl.atomic_max(bad_ptr, 1)


@triton.jit(do_not_specialize=["prune"])  # where 16 divides K, loads are wide
def _row_kernel(
    x_ptr,  # (N, K) scores, or weights
    norms_ptr,  # (K,) fp32, with SCALED
    mask_ptr,  # (N, K) int8, contiguous: 1 = keep
    bad_ptr,  # () int32: set if a score is NaN or infinite
    K,
    prune,  # 1..K
    stride_xn,
    stride_xk,
    ABS: tl.constexpr,
    SCALED: tl.constexpr,
    INPLACE: tl.constexpr,  # also write zeros over what goes
    SPARE: tl.constexpr,  # low bits that are 0 in every key
    BLOCK: tl.constexpr,  # ≥ K
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    at = row * stride_xn + columns.to(tl.int64) * stride_xk
    key, broken = _keys(x_ptr, norms_ptr, at, columns, inside, ABS, SCALED)
    _report(bad_ptr, broken)
    key = key >> SPARE
    # #{key ≤ lo} = below < prune ≤ upto = #{key ≤ hi}
    lo = tl.min(key).to(tl.int64) - 1
    hi = tl.max(tl.where(inside, key, -LAST >> SPARE)).to(tl.int64)
    below = prune * 0
    upto = below + K
    step = 0
    while (hi - lo > 1) & (upto != prune):
        # where the cut would lie if keys were even; every other time the middle, which bounds
        # the number of steps
        share = (prune - below).to(tl.float32) / (upto - below).to(tl.float32)
        even = lo + ((hi - lo).to(tl.float32) * share).to(tl.int64)
        guess = tl.where(step % 2 == 0, even, lo + (hi - lo) // 2)
        guess = tl.minimum(tl.maximum(guess, lo + 1), hi - 1)
        count = tl.sum((key <= guess.to(tl.int32)).to(tl.int32))
        less = count < prune
        lo = tl.where(less, guess, lo)
        below = tl.where(less, count, below)
        hi = tl.where(less, hi, guess)
        upto = tl.where(less, upto, count)
        step += 1
    cut = hi.to(tl.int32)
    keep = key > cut
    spare = upto - prune
    if spare > 0:
        tied = key == cut
        keep = keep | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= spare))
    tl.store(mask_ptr + row * K + columns, keep.to(tl.int8), mask=inside)
    if INPLACE:
        tl.store(x_ptr + at, tl.zeros((BLOCK,), tl.float32), mask=inside & (keep == 0))


@triton.jit
def _cut(counts_ptr, row, N, prune, LEVELS: tl.constexpr):
    """The first 8·LEVELS bits of the cut, and how many scores with just these bits go."""
    bins = tl.arange(0, BINS)
    prefix = 0
    rest = prune
    for level in tl.static_range(LEVELS):
        counts = tl.load(counts_ptr + (tl.cast(level, tl.int64) * N + row) * BINS + bins)
        digit = tl.sum((tl.cumsum(counts, 0) < rest).to(tl.int32))
        rest -= tl.sum(tl.where(bins < digit, counts, 0))
        prefix = prefix * BINS + digit
        if level == 0:
            prefix -= 128  # the first digit carries the sign
    return prefix, rest


@triton.jit(do_not_specialize=["N", "prune"])
def _histogram_kernel(
    x_ptr,
    norms_ptr,
    counts_ptr,  # (4, N, 256) int32: histograms of the digits so far
    bad_ptr,
    N,
    K,
    prune,
    stride_xn,
    stride_xk,
    LEVEL: tl.constexpr,  # which digit is counted
    ABS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    at = row * stride_xn + columns * stride_xk
    key, broken = _keys(x_ptr, norms_ptr, at, columns, inside, ABS, SCALED)
    if LEVEL == 0:
        _report(bad_ptr, broken)
        digit = (key >> 24) + 128
    else:
        prefix, _ = _cut(counts_ptr, row, N, prune, LEVEL)
        inside = inside & ((key >> (32 - 8 * LEVEL)) == prefix)
        digit = (key >> (24 - 8 * LEVEL)) & 255
    counts = tl.histogram(digit, BINS, mask=inside)
    bins = tl.arange(0, BINS)
    here = counts_ptr + (tl.cast(LEVEL, tl.int64) * N + row) * BINS + bins
    tl.atomic_add(here, counts, mask=counts > 0)


@triton.jit(do_not_specialize=["N", "prune"])
def _ties_kernel(
    x_ptr,
    norms_ptr,
    counts_ptr,
    ties_ptr,  # (N, programs of a row) int32: keys equal to the cut
    N,
    K,
    prune,
    stride_xn,
    stride_xk,
    ABS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    at = row * stride_xn + columns * stride_xk
    key, _ = _keys(x_ptr, norms_ptr, at, columns, inside, ABS, SCALED)
    cut, _ = _cut(counts_ptr, row, N, prune, 4)
    tied = tl.sum((key == cut).to(tl.int32))
    tl.store(ties_ptr + row * tl.num_programs(0) + tl.program_id(0), tied)


@triton.jit(do_not_specialize=["N", "prune"])
def _long_kernel(
    x_ptr,
    norms_ptr,
    counts_ptr,
    ties_ptr,
    mask_ptr,
    N,
    K,
    prune,
    stride_xn,
    stride_xk,
    ABS: tl.constexpr,
    SCALED: tl.constexpr,
    INPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    columns = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    at = row * stride_xn + columns * stride_xk
    key, _ = _keys(x_ptr, norms_ptr, at, columns, inside, ABS, SCALED)
    cut, rest = _cut(counts_ptr, row, N, prune, 4)
    before = 0
    total = 0
    for start in range(0, tl.num_programs(0), BINS):
        parts = start + tl.arange(0, BINS)
        ties = tl.load(
            ties_ptr + row * tl.num_programs(0) + parts, mask=parts < tl.num_programs(0), other=0
        )
        before += tl.sum(tl.where(parts < part, ties, 0))
        total += tl.sum(ties)
    tied = key == cut
    first = before + tl.cumsum(tied.to(tl.int32), 0) <= total - rest
    keep = (key > cut) | (tied & first)
    tl.store(mask_ptr + row * K + columns, keep.to(tl.int8), mask=inside)
    if INPLACE:
        tl.store(x_ptr + at, tl.zeros((BLOCK,), tl.float32), mask=inside & (keep == 0))


@triton.jit
def _members(tile, LEVELS: tl.constexpr):
    """The 2^LEVELS columns of a tile (G, 2^LEVELS), as a tuple of (G, 1) in their order."""
    parts = (tile,)
    for _level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for i in tl.static_range(len(parts)):
            part = parts[i]
            pairs = tl.reshape(part, (part.shape[0], part.shape[1] // 2, 2))
            left, right = tl.split(pairs)
            even = even + (left,)
            odd = odd + (right,)
        parts = even + odd
    return parts


@triton.jit
def _tile(parts, LEVELS: tl.constexpr):
    """Undo `_members`."""
    for _level in tl.static_range(LEVELS):
        whole = ()
        for i in tl.static_range(len(parts) // 2):
            pairs = tl.join(parts[i], parts[i + len(parts) // 2])
            whole = whole + (tl.reshape(pairs, (pairs.shape[0], pairs.shape[1] * 2)),)
        parts = whole
    return parts[0]


@triton.jit(do_not_specialize=["GROUPS"])
def _nm_kernel(
    x_ptr,  # (N, K) scores, or weights
    norms_ptr,  # (K,) fp32, with SCALED
    mask_ptr,  # (N, K) int8, contiguous: 1 = keep
    bad_ptr,
    GROUPS,  # in all rows
    per_row,  # groups of a row: K / M
    stride_xn,
    stride_xk,
    KEEP: tl.constexpr,
    M: tl.constexpr,
    LEVELS: tl.constexpr,  # 2^LEVELS ≥ M
    ABS: tl.constexpr,
    SCALED: tl.constexpr,
    INPLACE: tl.constexpr,
    G: tl.constexpr,  # groups per program
):
    group = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    member = tl.arange(0, 1 << LEVELS)
    inside = (group < GROUPS)[:, None] & (member < M)[None, :]
    columns = ((group % per_row) * M)[:, None] + member[None, :]
    at = (group // per_row)[:, None] * stride_xn + columns * stride_xk
    key, broken = _keys(x_ptr, norms_ptr, at, columns, inside, ABS, SCALED)
    _report(bad_ptr, broken)
    parts = _members(key, LEVELS)
    kept = ()
    for i in tl.static_range(len(parts)):
        beaten = tl.zeros(parts[0].shape, tl.int32)
        for j in tl.static_range(M):
            # of equals the earlier one stays
            if j < i:
                beaten += (parts[j] >= parts[i]).to(tl.int32)
            elif j > i:
                beaten += (parts[j] > parts[i]).to(tl.int32)
        kept = kept + ((beaten < KEEP).to(tl.int8),)
    keep = _tile(kept, LEVELS)
    tl.store(mask_ptr + (group * M)[:, None] + member[None, :], keep, mask=inside)
    if INPLACE:
        zeros = tl.zeros((G, 1 << LEVELS), tl.float32)
        tl.store(x_ptr + at, zeros, mask=inside & (keep == 0))


def nm_mask(
    scores: Tensor, norms: Tensor | None, keep: int, of: int, absolute: bool, inplace: bool
) -> Tensor:
    """`eager.nm_mask` by Triton."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel() == 0:
        return mask
    bad = torch.zeros((), dtype=torch.int32, device=scores.device)
    parts = rows_of(scores, inplace), norms, mask.view(torch.int8), bad
    _groups_call(*parts, keep, of, absolute, inplace).run()
    checks.no_flag("nm_mask", bad, scores, norms)
    return mask


def _groups_call(
    rows: Tensor,
    norms: Tensor | None,
    mask: Tensor,
    bad: Tensor,
    keep: int,
    of: int,
    absolute: bool,
    inplace: bool,
) -> Launch:
    """N:M selection in rows (N, K), real or on the meta device."""
    levels, groups_each, warps = tuning.nm_tile(of)
    groups = rows.numel() // of
    return Launch(
        _nm_kernel,
        (triton.cdiv(groups, groups_each),),
        (rows, norms, mask, bad, groups, rows.shape[1] // of, *rows.stride()),
        {
            "KEEP": keep,
            "M": of,
            "LEVELS": levels,
            "ABS": absolute,
            "SCALED": norms is not None,
            "INPLACE": inplace,
            "G": groups_each,
        },
        num_warps=warps,
    )


def rowwise_mask(
    scores: Tensor, norms: Tensor | None, prune: int, absolute: bool, inplace: bool
) -> Tensor:
    """`eager.rowwise_mask` by Triton."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel() == 0:
        return mask
    if prune == 0:
        checks.finite("rowwise_mask", scores, norms)
        return mask.fill_(True)
    rows = rows_of(scores, inplace)
    bad = torch.zeros((), dtype=torch.int32, device=scores.device)
    if rows.shape[1] <= tuning.ROW_ON_CHIP:
        calls = [_row_call(rows, norms, mask.view(torch.int8), bad, prune, absolute, inplace)]
    else:
        calls = _long_calls(rows, norms, mask.view(torch.int8), bad, prune, absolute, inplace)
    for call in calls:
        call.run()
    checks.no_flag("rowwise_mask", bad, scores, norms)
    return mask


def _row_call(
    rows: Tensor,
    norms: Tensor | None,
    mask: Tensor,
    bad: Tensor,
    prune: int,
    absolute: bool,
    inplace: bool,
) -> Launch:
    """Selection in rows (N, K) that fit a program, real or on the meta device."""
    count, width = rows.shape
    block, warps = tuning.row_tile(width)
    return Launch(
        _row_kernel,
        (count,),
        (rows, norms, mask, bad, width, prune, *rows.stride()),
        {
            "ABS": absolute,
            "SCALED": norms is not None,
            "INPLACE": inplace,
            "SPARE": _SPARE_BITS.get(rows.dtype, 0) if norms is None else 0,
            "BLOCK": block,
        },
        num_warps=warps,
    )


def _long_calls(
    rows: Tensor,
    norms: Tensor | None,
    mask: Tensor,
    bad: Tensor,
    prune: int,
    absolute: bool,
    inplace: bool,
) -> list[Launch]:
    """Selection in longer rows: four histograms of digits, ties at the cut, then the mask."""
    count, width = rows.shape
    block, warps = tuning.LONG_ROW
    grid = (triton.cdiv(width, block), count)
    counts = torch.zeros(4, count, 256, dtype=torch.int32, device=rows.device)
    ties = torch.empty(count, grid[0], dtype=torch.int32, device=rows.device)
    sizes = (count, width, prune, *rows.stride())
    modes = {"ABS": absolute, "SCALED": norms is not None, "BLOCK": block}

    def call(kernel: Any, tensors: tuple[Tensor, ...], **constants: Any) -> Launch:
        given = (rows, norms, counts, *tensors, *sizes)
        return Launch(kernel, grid, given, {**modes, **constants}, num_warps=warps)

    return [
        *(call(_histogram_kernel, (bad,), LEVEL=level) for level in range(4)),
        call(_ties_kernel, (ties,)),
        call(_long_kernel, (ties, mask), INPLACE=inplace),
    ]


def rows_of(scores: Tensor, inplace: bool) -> Tensor:
    """(rows, K) of the scores: a view where strides allow, and always if it will be written."""
    if inplace:
        return scores.view(-1, scores.shape[-1])
    return scores.reshape(-1, scores.shape[-1])


def compile_cases() -> list[KernelCase]:
    """Wanda's selection in bfloat16 weights of 4096 and 14336 inputs, long rows, and N:M."""

    def parts(
        count: int, width: int, dtype: torch.dtype, scaled: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        norms = meta((width,), torch.float32) if scaled else None
        shape = (count, width)
        return meta(shape, dtype), norms, meta(shape, torch.int8), meta((), torch.int32)

    cases = []
    for width in (4096, 14336):
        call = _row_call(*parts(4096, width, torch.bfloat16), width // 2, True, False)
        cases.append(call.case(f"rowwise_mask/{width}/bf16", opcodes=("LDG.E.128",)))
    call = _row_call(*parts(4096, 14336, torch.bfloat16, False), 7168, True, False)
    cases.append(call.case("rowwise_mask/14336/bf16/no norms", opcodes=("LDG.E.128",)))
    long = parts(16, 1 << 20, torch.float32, False)
    first, _, _, last, ties, mask = _long_calls(*long, 1 << 19, True, True)
    for call, name in (
        (first, "first digit"),
        (last, "last digit"),
        (ties, "ties"),
        (mask, "mask"),
    ):
        cases.append(call.case(f"rowwise_mask/long/{name}", opcodes=("LDG.E.128",)))
    for keep, of in ((2, 4), (4, 8), (16, 32)):
        call = _groups_call(*parts(4096, 4096, torch.bfloat16), keep, of, True, False)
        cases.append(call.case(f"nm_mask/{keep}:{of}/bf16", opcodes=("LDG",)))
    return cases
