"""Selection by Triton: which weights stay, without sorting and without a matrix of scores.

A score becomes an int32 key that is ordered as the scores are: the float32's bits, those of
negative numbers flipped, ±0 alike. A row's cut is the smallest key t with #{key ≤ t} ≥ prune.
Short rows: one program keeps the keys on chip and narrows [lo, hi] ∋ t by counting. Long rows: four
histograms of eight bits each (radix select), shared by the row's programs through integer atomics.
Of the keys equal to t the first #{key ≤ t} − prune stay. N:M ranks a group by all its pairs.
"""

# ruff: noqa: RUF005  (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels import checks
from prunekernels.compilation import KernelCase
from prunekernels.pruning import tuning
from prunekernels.runtime import on

#: Above every key of a finite score.
LAST = tl.constexpr(0x7FFFFFFF)
#: The key of infinity.
INFINITE = tl.constexpr(0x7F800000)
BINS = tl.constexpr(256)


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


@triton.jit(do_not_specialize=["K", "prune"])
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
    BLOCK: tl.constexpr,  # ≥ K
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    at = row * stride_xn + columns.to(tl.int64) * stride_xk
    key, broken = _keys(x_ptr, norms_ptr, at, columns, inside, ABS, SCALED)
    _report(bad_ptr, broken)
    # #{key ≤ lo} = below < prune ≤ upto = #{key ≤ hi}
    lo = tl.min(key).to(tl.int64) - 1
    hi = tl.max(tl.where(inside, key, -LAST)).to(tl.int64)
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


@triton.jit(do_not_specialize=["N", "K", "prune"])
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


@triton.jit(do_not_specialize=["N", "K", "prune"])
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


@triton.jit(do_not_specialize=["N", "K", "prune"])
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
    rows = _rows(scores, inplace)
    levels, groups_each, warps = tuning.nm_tile(of)
    groups = scores.numel() // of
    bad = torch.zeros((), dtype=torch.int32, device=scores.device)
    with on(scores):
        _nm_kernel[(triton.cdiv(groups, groups_each),)](
            rows,
            norms,
            mask.view(torch.int8),
            bad,
            groups,
            scores.shape[-1] // of,
            rows.stride(0),
            rows.stride(1),
            KEEP=keep,
            M=of,
            LEVELS=levels,
            ABS=absolute,
            SCALED=norms is not None,
            INPLACE=inplace,
            G=groups_each,
            num_warps=warps,
        )
    checks.no_flag("nm_mask", bad, scores, norms)
    return mask


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
    rows = _rows(scores, inplace)
    count, width = rows.shape
    bad = torch.zeros((), dtype=torch.int32, device=scores.device)
    modes = {"ABS": absolute, "SCALED": norms is not None}
    shape = (width, prune, rows.stride(0), rows.stride(1))
    as_int = mask.view(torch.int8)
    with on(scores):
        if width <= tuning.ROW_ON_CHIP:
            block, warps = tuning.row_tile(width)
            _row_kernel[(count,)](
                *(rows, norms, as_int, bad, *shape),
                **modes,
                INPLACE=inplace,
                BLOCK=block,
                num_warps=warps,
            )
        else:
            block, warps = tuning.LONG_ROW
            grid = (triton.cdiv(width, block), count)
            counts = torch.zeros(4, count, 256, dtype=torch.int32, device=scores.device)
            ties = torch.empty(count, grid[0], dtype=torch.int32, device=scores.device)
            options = {**modes, "BLOCK": block, "num_warps": warps}
            for level in range(4):
                _histogram_kernel[grid](
                    rows, norms, counts, bad, count, *shape, LEVEL=level, **options
                )
            _ties_kernel[grid](rows, norms, counts, ties, count, *shape, **options)
            _long_kernel[grid](
                rows, norms, counts, ties, as_int, count, *shape, INPLACE=inplace, **options
            )
    checks.no_flag("rowwise_mask", bad, scores, norms)
    return mask


def _rows(scores: Tensor, inplace: bool) -> Tensor:
    """(rows, K) of the scores: a view where strides allow, and always if it will be written."""
    if inplace:
        return scores.view(-1, scores.shape[-1])
    return scores.reshape(-1, scores.shape[-1])


def compile_cases() -> list[KernelCase]:
    """Wanda's selection in bfloat16 weights of 4096 and 14336 inputs, long rows, and N:M."""
    strides = {"stride_xn": "i32"}
    norms = {"norms_ptr": "*fp32"}
    cases = []
    for width in (4096, 14336):
        block, warps = tuning.row_tile(width)
        cases.append(
            KernelCase(
                name=f"rowwise_mask/{width}/bf16",
                kernel=_row_kernel,
                signature={
                    **{"x_ptr": "*bf16", **norms, "mask_ptr": "*i8", "bad_ptr": "*i32"},
                    **{"K": "i32", "prune": "i32", **strides},
                },
                constants={
                    **{"stride_xk": 1, "ABS": True, "SCALED": True},
                    **{"INPLACE": False, "BLOCK": block},
                },
                num_warps=warps,
                divisible=("x_ptr", "norms_ptr", "mask_ptr", "K", *strides),
                opcodes=("LDG.E.128",),
            )
        )
    block, warps = tuning.LONG_ROW
    common = {"x_ptr": "*fp32", "counts_ptr": "*i32", "N": "i32", "K": "i32", "prune": "i32"}
    common |= strides
    fixed = {"norms_ptr": None, "stride_xk": 1, "ABS": True, "SCALED": False, "BLOCK": block}
    ties = {"ties_ptr": "*i32"}
    for kernel, name, more, constants in (
        (_histogram_kernel, "first digit", {"bad_ptr": "*i32"}, {"LEVEL": 0}),
        (_histogram_kernel, "last digit", {"bad_ptr": "*i32"}, {"LEVEL": 3}),
        (_ties_kernel, "ties", ties, {}),
        (_long_kernel, "mask", {**ties, "mask_ptr": "*i8"}, {"INPLACE": True}),
    ):
        cases.append(
            KernelCase(
                name=f"rowwise_mask/long/{name}",
                kernel=kernel,
                signature={**common, **more},
                constants={**fixed, **constants},
                num_warps=warps,
                divisible=("x_ptr", "counts_ptr", "K", *strides),
                opcodes=("LDG.E.128",),
            )
        )
    for keep, of in ((2, 4), (4, 8), (16, 32)):
        levels, groups, warps = tuning.nm_tile(of)
        cases.append(
            KernelCase(
                name=f"nm_mask/{keep}:{of}/bf16",
                kernel=_nm_kernel,
                signature={
                    **{"x_ptr": "*bf16", **norms, "mask_ptr": "*i8", "bad_ptr": "*i32"},
                    **{"GROUPS": "i32", "per_row": "i32", **strides},
                },
                constants={
                    **{"stride_xk": 1, "KEEP": keep, "M": of, "LEVELS": levels, "G": groups},
                    **{"ABS": True, "SCALED": True, "INPLACE": False},
                },
                num_warps=warps,
                divisible=("x_ptr", "norms_ptr", "mask_ptr", *strides),
                opcodes=("LDG",),
            )
        )
    return cases
