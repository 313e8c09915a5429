"""Pair statistics of logits in one pass, four warps to a row and split (docs/metrics.md).

The design "tile". A program sums one split of the vocabulary of one pair of rows into a lane per
thread, without reducing across them: whole tiles without masks, then what is left over at either
end in masked pieces. The references A = k·max a and B = k·b there move in a branch that is rarely
taken. Four sums are taken from the others, not from the logits. Where a split turns out to hold
−inf, NaN or +inf, or rows so different in size that this would cancel, it is summed again, in
masked pieces alone.
"""


# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="misc, var-annotated, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from prunekernels.metrics import split_triton
from prunekernels.metrics.sums import bundle_triton as bundle
from prunekernels.metrics.sums import elementwise_triton as elementwise
from prunekernels.metrics.sums import triton as lib


@triton.jit(do_not_specialize=["N", "V", "S", "first_id"])
def pair_tile_kernel(
    base_ptr,  # logits a
    other_ptr,  # logits b
    starts_ptr,  # (2, N) int64 first element of each row, with ROW_TABLE
    labels_ptr,  # (N,) int64, with LABELS
    floats_ptr,  # (N, S, F) fp32: `split_triton.Head`, then the sums
    ids_ptr,  # (N, S, 2) int64
    N,
    V,
    S,
    stride_an,
    stride_av,
    stride_bn,
    stride_bv,
    first_id,  # id of the first column
    k,  # log2(e)/T
    inverse_t,  # 1/T
    SUMS: tl.constexpr,  # the sums that are wanted: see `bundle_triton`
    PRECISE: tl.constexpr,
    OTHER: tl.constexpr,
    LABELS: tl.constexpr,
    HALF: tl.constexpr,  # logits of 16 bits
    ROW_TABLE: tl.constexpr,
    SHIFT: tl.constexpr,  # rows start at any element of an aligned vector of 4, alike for both
    PACKED: tl.constexpr,  # bf16 read two at a time, as 32-bit words
    PAIRED: tl.constexpr,  # and their maxima found two at a time (NVIDIA)
    LANES: tl.constexpr,
    UNITS: tl.constexpr,
):
    COLS: tl.constexpr = 4
    WIDTH: tl.constexpr = COLS * LANES
    TILE: tl.constexpr = WIDTH * UNITS
    scale = lib.scales(k, inverse_t, PRECISE)
    part = split_triton.span(
        base_ptr,
        other_ptr,
        starts_ptr,
        N,
        V,
        S,
        stride_an,
        stride_bn,
        ROW_TABLE,
        SHIFT,
        COLS,
        WIDTH,
        TILE,
    )
    lanes = tl.arange(0, LANES)
    minus_inf = float("-inf")
    s = bundle.zeros((LANES,), tl.float32)
    ref = lib.nowhere((), scale.unit, HALF)
    best_a = tl.full((LANES,), minus_inf, tl.float32)
    best_b = tl.full((LANES,), minus_inf, tl.float32)
    next_a = best_a
    next_b = best_b
    unit_a = tl.full((LANES,), -1, tl.int32)
    unit_b = tl.full((LANES,), -1, tl.int32)
    top_b = tl.full((), minus_inf, tl.float32)

    for column in range(part.first, part.last, TILE):
        from_a = part.base + tl.cast(column, tl.int64) * stride_av
        from_b = part.other + tl.cast(column, tl.int64) * stride_bv
        words_a = ()
        words_b = ()
        for u in tl.static_range(UNITS):
            if PACKED:
                words_a = words_a + _words(from_a, u * WIDTH, LANES)
                words_b = words_b + _words(from_b, u * WIDTH, LANES)
            else:
                words_a = words_a + split_triton.vectors(
                    from_a, stride_av, u * WIDTH, None, LANES, False
                )
                words_b = words_b + split_triton.vectors(
                    from_b, stride_bv, u * WIDTH, None, LANES, False
                )
        tile_a = split_triton.logits(words_a, PACKED)
        tile_b = split_triton.logits(words_b, PACKED)
        if PAIRED:
            max_a = _largest_of_words(words_a)
            max_b = _largest_of_words(words_b)
        else:
            max_a = _largest(tile_a)
            max_b = _largest(tile_b)
        next_a = tl.maximum(next_a, tl.minimum(best_a, max_a))
        next_b = tl.maximum(next_b, tl.minimum(best_b, max_b))
        unit_a = tl.where(max_a > best_a, column, unit_a)
        unit_b = tl.where(max_b > best_b, column, unit_b)
        best_a = tl.maximum(best_a, max_a)
        best_b = tl.maximum(best_b, max_b)
        over = (max_a * scale.unit > ref.a) | (max_b * scale.unit > ref.b + scale.far)
        if tl.max(over.to(tl.int32), 0) > 0:
            tile_top_a = tl.max(max_a, 0)
            top_b = tl.max(best_b, 0)
            rises = tile_top_a * scale.unit > ref.a
            at_top = tl.full((), minus_inf, tl.float32)
            if rises:
                where = tl.full((LANES,), TILE, tl.int32)
                for j in range(COLS * UNITS):
                    here = j * LANES + lanes
                    value = tl.load(from_a + here * stride_av).to(tl.float32)
                    where = tl.where(value == tile_top_a, tl.minimum(where, here), where)
                found = tl.min(where, 0)
                found = tl.where(found < TILE, found, 0)
                at_top = tl.load(from_b + found * stride_bv).to(tl.float32)
            new = lib.next_reference(ref, rises, tile_top_a, at_top, top_b, scale, HALF)
            s = lib.move(s, ref, new, scale, tl.float64, SUMS, OTHER)
            ref = new
        # a tile by itself, and then to the rest: a long float32 sum would lose small terms
        sums = bundle.filled(-0.0)
        for u in tl.static_range(COLS * UNITS):
            e = lib.exponents(tile_a[u], tile_b[u], ref, scale, PRECISE, False)
            sums = lib.accumulate(
                sums, tile_a[u], tile_b[u], e, None, None, SUMS, False, PRECISE, OTHER
            )
        s = bundle.add_tile(s, sums, SUMS, OTHER)
        s = bundle.count(s, COLS * UNITS, SUMS)

    # −inf, NaN or +inf make a sum non-finite: sum the split again, looking at each.
    s = lib.complete(s, SUMS, OTHER)
    again = lib.spoiled(s) | lib.thin(s)
    heads = tl.where(again, tl.cdiv(part.stop - part.start, WIDTH), part.heads)
    tails = tl.where(again, 0, part.tails)
    if again:
        s = bundle.zeros((LANES,), tl.float32)
        ref = lib.nowhere((), scale.unit, HALF)
        best_a = tl.full((LANES,), minus_inf, tl.float32)
        best_b = tl.full((LANES,), minus_inf, tl.float32)
        next_a = tl.full((LANES,), minus_inf, tl.float32)
        next_b = tl.full((LANES,), minus_inf, tl.float32)
        unit_a = tl.full((LANES,), -1, tl.int32)
        unit_b = tl.full((LANES,), -1, tl.int32)
    odd = split_triton.nothing_odd(LANES)
    for quarter in range(0, COLS * (heads + tails)):
        piece = quarter // COLS
        column = tl.where(
            piece < heads, part.start + piece * WIDTH, part.last + (piece - heads) * WIDTH
        )
        j = quarter % COLS
        a, b = split_triton.piece(part, column, j, stride_av, stride_bv, LANES, COLS)
        a, b, odd = split_triton.cleaned(a, b, odd)
        next_a = tl.maximum(next_a, tl.minimum(best_a, a))
        next_b = tl.maximum(next_b, tl.minimum(best_b, b))
        # The piece before the tiles comes after them here, and wins where it holds an equal.
        before = (piece < heads) & ~again
        unit_a = tl.where((a > best_a) | (before & (a > minus_inf) & (a == best_a)), column, unit_a)
        unit_b = tl.where((b > best_b) | (before & (b > minus_inf) & (b == best_b)), column, unit_b)
        best_a = tl.maximum(best_a, a)
        best_b = tl.maximum(best_b, b)
        piece_top_a = tl.max(a, 0)
        top_b = tl.max(best_b, 0)
        rises = piece_top_a * scale.unit > ref.a
        if rises | (top_b * scale.unit > ref.b + scale.far):
            found = tl.min(tl.where(a == piece_top_a, lanes, LANES), 0)
            at_top = tl.max(tl.where(lanes == found, b, minus_inf), 0)
            new = lib.next_reference(ref, rises, piece_top_a, at_top, top_b, scale, HALF)
            s = lib.move(s, ref, new, scale, tl.float64, SUMS, OTHER)
            ref = new
        s = lib.accumulate_logits(s, a, b, ref, scale, SUMS, PRECISE, OTHER)

    # Each lane reads its best unit again, for the first index of its maximum and the runner-up.
    index_a = tl.full((LANES,), -1, tl.int32)
    index_b = tl.full((LANES,), -1, tl.int32)
    for j in range(COLS * UNITS):
        here = split_triton.column_of(j, LANES, COLS)
        index_a, next_a = _again(
            part.base, stride_av, unit_a, unit_a + here, best_a, next_a, index_a, part
        )
        index_b, next_b = _again(
            part.other, stride_bv, unit_b, unit_b + here, best_b, next_b, index_b, part
        )
    top_a, second_a, id_a = _lead(best_a, next_a, index_a)
    top_b, second_b, id_b = _lead(best_b, next_b, index_b)
    label_a, label_b = split_triton.label_logits(
        part, labels_ptr, first_id, stride_av, stride_bv, LABELS
    )
    head = split_triton.Head(
        ref_a=ref.a,
        ref_b=ref.b,
        top_a=top_a,
        top_b=top_b,
        second_a=second_a,
        second_b=second_b,
        label_a=label_a,
        label_b=label_b,
        only_a=tl.sum(odd.only_a, 0),
        only_b=tl.sum(odd.only_b, 0),
        broken_a=tl.sum(odd.broken_a, 0),
        broken_b=tl.sum(odd.broken_b, 0),
    )
    state = lib.to_states(bundle.totals(s), ref, scale, SUMS, PRECISE, OTHER)
    pid = tl.program_id(0).to(tl.int64)
    split_triton.store_state(floats_ptr, pid, head, state, None, SUMS)
    tl.store(ids_ptr + pid * 2, id_a.to(tl.int64) + first_id)
    tl.store(ids_ptr + pid * 2 + 1, id_b.to(tl.int64) + first_id)


@triton.jit
def _largest(tile):
    """Per lane the largest of a tile's tensors."""
    largest = tile[0]
    for u in tl.static_range(1, len(tile)):
        largest = tl.maximum(largest, tile[u])
    return largest


@triton.jit
def _largest_of_words(words):
    """The same of a tile's words of two bfloat16."""
    largest = words[0]
    for u in tl.static_range(1, len(words)):
        largest = elementwise.larger_halves(largest, words[u])
    low, high = elementwise.halves(largest)
    return tl.maximum(low, high)


@triton.jit
def _again(row_ptr, stride, unit, columns, best, runner_up, index, part):
    """First index of each lane's maximum and the runner-up, with one more of its best unit."""
    inside = (unit >= 0) & (columns >= part.skew) & (columns < part.end)
    at = row_ptr + columns.to(tl.int64) * stride
    value = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    mine = (value == best) & (index < 0) & inside
    index = tl.where(mine, columns - part.skew, index)
    return index, tl.maximum(runner_up, tl.where(mine, float("-inf"), value))


@triton.jit
def _lead(best, runner_up, index):
    """Maximum over the lanes, the largest other value, and the maximum's first index."""
    top = tl.max(best, 0)
    first = tl.min(tl.where((best == top) & (index >= 0), index, 2147483647), 0)
    second = tl.max(tl.where(index == first, runner_up, best), 0)
    return top, second, first


@triton.jit
def _words(ptr, skip, LANES: tl.constexpr):
    """Logits `skip` … `skip`+4·LANES as two tensors of pairs; lane i has the columns 4i … 4i+3."""
    at = (ptr + skip).to(tl.pointer_type(tl.int32))
    words = tl.load(at + tl.arange(0, 2 * LANES))
    return tl.split(tl.reshape(words, (LANES, 2)))
