"""Selection in rows of 16-bit scores by Triton, two scores to a 32-bit word: runs by name.

A score becomes a key of 15 bits that is ordered as the scores are; of signed scores those on the
cut's side of zero, while the others lie below or above all of them. Two keys fill a word whose
halves have their top bits set: one subtraction compares both with a guess, and a half keeps its top
bit where key > guess. The cut is the smallest key t with #{key ≤ t} ≥ prune. A program visits rows
one after the other. It guesses the last row's cut first, steps as far as that row's density says
until the cut lies between two guesses, then takes where it would lie if the keys between were even.
Of the keys equal to t the first #{key ≤ t} − prune stay: the row is read again to where they end.
"""

# ruff: noqa: RUF005  (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.pruning import masks_triton, tuning

#: The lowest bit of both halves of a word, the highest, and all but the highest.
ONES, TOPS, REST = tl.constexpr(0x00010001), tl.constexpr(-0x7FFF8000), tl.constexpr(0x7FFF7FFF)
#: Below every key.
BELOW = tl.constexpr(0x7FFF)
#: Keys between two guesses up to which the next one is where the cut would lie if they were even.
NEAR = tl.constexpr(512)
#: Guesses after which every other one is the middle: at most 8 + 2·15 are made.
PATIENCE = tl.constexpr(8)
#: Infinity's bits.
_INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def _read(row_ptr, WORDS, part, PART: tl.constexpr, INFINITE: tl.constexpr):
    """A part of a row's words; beyond the row the largest finite score."""
    at = part * PART + tl.arange(0, PART)
    return tl.load(row_ptr + at, mask=at < WORDS, other=(INFINITE - 1) * ONES)


@triton.jit
def _ordered(words):
    """0x8001 + |x| in each half of a word of scores x, 0x8001 - |x| where they are negative."""
    size = words & REST
    negative = ((words >> 15) & ONES) * 0xFFFF
    return ((TOPS + ONES + size) & ~negative) | ((TOPS + ONES - size) & negative)


@triton.jit
def _side(ordered, low):
    """Keys of the scores on one side: of the lower ones (low = 1) or of the others (low = 0)."""
    inside = (((ordered ^ -low) >> 15) & ONES) * 0xFFFF
    others = tl.where(low > 0, -1, TOPS)
    keys = (ordered | (TOPS & -low)) + (1 - 2 * low) * ONES
    return (keys & inside) | (others & ~inside)


@triton.jit
def _pair(key):
    """A key without its top bit, in both halves of a word."""
    return (key - BELOW - 1) * ONES


@triton.jit
def _reach(keys, pair):
    """1 in each half whose key is at least the one of the pair."""
    return ((keys - pair) >> 15) & ONES


@triton.jit
def _equal(keys, key):
    """1 in each half whose key it is."""
    other = (keys & REST) ^ _pair(key)
    return ((TOPS - other) >> 15) & ONES


@triton.jit
def _both(packed):
    """The sum of a word's halves."""
    return (packed & 0xFFFF) + (packed >> 16)


@triton.jit
def _find(
    keys,  # in parts
    prune,
    K,
    guess,  # the cut to be tried first
    rate,  # keys per score there
    last,  # the largest key
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """The cut, how many keys are not above it, and a quarter more than the keys per score there."""
    # #{key ≤ lo} = below < prune ≤ upto = #{key ≤ hi}
    lo = BELOW
    hi = last
    below = prune * 0
    upto = below + K
    tries = 0
    while (hi - lo > 1) & (upto != prune):
        guess = tl.minimum(tl.maximum(guess, lo + 1), hi - 1)
        above = tl.zeros((PART,), tl.int32)
        for part in tl.static_range(PARTS):
            above += _reach(keys[part], _pair(guess + 1))
        count = 2 * PART * PARTS - _both(tl.sum(above))
        less = count < prune
        lo = tl.where(less, guess, lo)
        below = tl.where(less, count, below)
        hi = tl.where(less, hi, guess)
        upto = tl.where(less, upto, count)
        tries += 1
        step = tl.floor((prune - count).to(tl.float32) * rate).to(tl.int32)
        rate = tl.minimum(2 * rate, 1.0)
        middle = lo + (hi - lo) // 2
        share = (prune - below).to(tl.float32) / (upto - below).to(tl.float32)
        even = lo + tl.ceil((hi - lo).to(tl.float32) * share).to(tl.int32)
        between = tl.where(hi - lo <= NEAR, even, middle)
        guess = tl.where((lo > BELOW) & (hi < last), between, guess + step)
        guess = tl.where((tries > PATIENCE) & (tries % 2 == 0), middle, guess)
    rate = 1.25 * (hi - lo).to(tl.float32) / tl.maximum(upto - below, 1).to(tl.float32)
    return hi, upto, rate


@triton.jit
def _tied(
    row_ptr, WORDS, part, low, cut, PART: tl.constexpr, ABS: tl.constexpr, INFINITE: tl.constexpr
):
    """1 in each half of a part of a row whose key is the cut; the part is read."""
    words = _read(row_ptr, WORDS, part, PART, INFINITE)
    keys = words if ABS else _side(_ordered(words), low)
    return _equal(keys, cut)


@triton.jit
def _last_tie(
    row_ptr, WORDS, low, cut, spare, PART: tl.constexpr, ABS: tl.constexpr, INFINITE: tl.constexpr
):
    """The column of the spare-th key that equals the cut; there are at least so many."""
    before = 0
    part = 0
    tied = _tied(row_ptr, WORDS, part, low, cut, PART, ABS, INFINITE)
    count = _both(tl.sum(tied))
    while before + count < spare:
        before += count
        part += 1
        tied = _tied(row_ptr, WORDS, part, low, cut, PART, ABS, INFINITE)
        count = _both(tl.sum(tied))
    left = spare - before
    # columns at which fewer than are left have been seen, the column itself included
    upto = tl.cumsum(_both(tied), 0)
    seen = (upto - (tied >> 16) < left).to(tl.int32) + (upto < left).to(tl.int32)
    return 2 * PART * part + tl.sum(seen)


@triton.jit(do_not_specialize=["N", "prune", "each"])
def _words_kernel(
    words_ptr,  # (N, K / 2) int32: two scores, or weights, each
    mask_ptr,  # (N, K / 2) int16, contiguous: two bytes each, 1 = keep
    bad_ptr,  # () int32: set if a score is NaN or infinite
    N,
    WORDS,  # K / 2
    prune,  # 1..K
    each,  # rows of a program
    stride_n,  # words between rows
    ABS: tl.constexpr,
    INPLACE: tl.constexpr,  # also write zeros over what goes
    INFINITE: tl.constexpr,  # its bits
    PARTS: tl.constexpr,
    PART: tl.constexpr,  # words of a part; PARTS·PART ≥ WORDS
):
    broken = tl.zeros((PART,), tl.int32)
    guess = BELOW + INFINITE // 2
    rate = 0.25
    first = tl.program_id(0) * each
    for row in range(first, tl.minimum(first + each, N)):
        row_ptr = words_ptr + tl.cast(row, tl.int64) * stride_n
        out_ptr = mask_ptr + tl.cast(row, tl.int64) * WORDS
        keys = ()
        lower = tl.zeros((PART,), tl.int32)
        for part in tl.static_range(PARTS):
            words = _read(row_ptr, WORDS, part, PART, INFINITE)
            broken |= _reach(words | TOPS, INFINITE * ONES)
            if ABS:
                keys = keys + (words | TOPS,)
            else:
                ordered = _ordered(words)
                lower += (ordered >> 15) & ONES
                keys = keys + (ordered,)
        low = 0
        largest = BELOW + INFINITE
        if not ABS:
            low = (prune <= 2 * PART * PARTS - _both(tl.sum(lower))).to(tl.int32)
            largest = tl.where(low > 0, 0xFFFE, BELOW + INFINITE + 2)
            sided = ()
            for part in tl.static_range(PARTS):
                sided = sided + (_side(keys[part], low),)
            keys = sided
        guess, upto, rate = _find(keys, prune, 2 * WORDS, guess, rate, largest, PARTS, PART)
        last = -1
        if upto > prune:
            last = _last_tie(row_ptr, WORDS, low, guess, upto - prune, PART, ABS, INFINITE)
        for part in tl.static_range(PARTS):
            at = part * PART + tl.arange(0, PART)
            # of those equal to the cut the columns up to `last` stay
            left = last - 2 * part * PART
            if (left >= 0) & (left < 2 * PART - 1):
                low_half = 2 * tl.arange(0, PART)
                among = (low_half <= left).to(tl.int32) + ((low_half < left).to(tl.int32) << 16)
                keep = _reach(keys[part] + among, _pair(guess + 1))
            else:
                keep = _reach(keys[part], _pair(guess + (left < 0).to(tl.int32)))
            tl.store(out_ptr + at, (keep | (keep >> 8)).to(tl.int16), mask=at < WORDS)
            if INPLACE:
                kept = _read(row_ptr, WORDS, part, PART, INFINITE) & (keep * 0xFFFF)
                tl.store(row_ptr + at, kept, mask=at < WORDS)
    if tl.max(broken) > 0:
        tl.atomic_max(bad_ptr, 1)


def rowwise_mask(
    scores: Tensor, norms: Tensor | None, prune: int, absolute: bool, inplace: bool
) -> Tensor:
    """`eager.rowwise_mask` by this kernel; by `masks_triton`'s where it does not serve."""
    rows = masks_triton.rows_of(scores, inplace)
    if prune == 0 or norms is not None or not _in_words(rows):
        return masks_triton.rowwise_mask(scores, norms, prune, absolute, inplace)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    bad = torch.zeros((), dtype=torch.int32, device=scores.device)
    _call(rows, mask.view(rows.shape), bad, prune, absolute, inplace).run()
    checks.no_flag("rowwise_mask", bad, scores, norms)
    return mask


def _in_words(rows: Tensor) -> bool:
    """Whether rows (N, K) are pairs of consecutive 16-bit scores at even places, and fit."""
    (count, width), (stride_n, stride_k) = rows.shape, rows.stride()
    pairs = stride_k == 1 and width % 2 == stride_n % 2 == rows.storage_offset() % 2 == 0
    return rows.dtype in _INFINITE and pairs and count > 0 and 0 < width <= tuning.ROW_ON_CHIP


def _call(
    rows: Tensor, mask: Tensor, bad: Tensor, prune: int, absolute: bool, inplace: bool
) -> Launch:
    """Selection in rows (N, K) that fit a program, real or on the meta device."""
    words = rows.view(torch.int32)
    count, width = words.shape
    config = tuning.words_tile(width)
    processors = runtime.processors(rows.device) if rows.is_cuda else 1
    each = tuning.rows_each(count, config.num_warps, processors)
    return Launch(
        _words_kernel,
        (triton.cdiv(count, each),),
        (words, mask.view(torch.int16), bad, count, width, prune, each, words.stride(0)),
        {
            "ABS": absolute,
            "INPLACE": inplace,
            "INFINITE": _INFINITE[rows.dtype],
            "PARTS": config.parts,
            "PART": config.words,
        },
        num_warps=config.num_warps,
        options={"maxnreg": tuning.WORDS_REGISTERS},
    )


def compile_cases() -> list[KernelCase]:
    """Weights in bfloat16 of 4096 and 14336 inputs; scores of either sign."""
    cases = []
    for width, absolute, name in (
        (4096, True, "sizes"),
        (14336, True, "sizes"),
        (14336, False, "signed"),
    ):
        rows, mask = meta((4096, width), torch.bfloat16), meta((4096, width), torch.bool)
        call = _call(rows, mask, meta((), torch.int32), width // 2, absolute, False)
        case = call.case(f"rowwise_mask/words/{width}/{name}", opcodes=("LDG.E.128", "STG.E.128"))
        cases.append(case)
    return cases
