"""Pair statistics of logits in one pass, one warp to a row and split (docs/metrics.md).

The design "warp", which is to replace `pair_tile_triton` once it has run on hardware. A warp needs
no barrier: nothing is reduced across warps, and the next tile's 16-byte loads are issued while this
one is summed. Each lane sums a tile by itself and adds that to the rest, which rounds
less. Of each row it keeps the tile that holds the first largest logit, and per lane the two largest
logits, two bfloat16 at a time; that tile alone is read again, for the index and the runner-up.

Rare paths (references that move, what is left over at either end of a row in masked pieces, and
splits with −inf, NaN or +inf, which are summed again in pieces alone) are as in `pair_tile_triton`.
"""

# ruff: noqa: RUF005  (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="misc, var-annotated, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prunekernels.metrics import split_triton
from prunekernels.metrics.sums import bundle_triton as bundle
from prunekernels.metrics.sums import elementwise_triton as elementwise
from prunekernels.metrics.sums import triton as lib


class Lead(NamedTuple):
    """The largest logit of one row so far, and per lane what may be the runner-up."""

    top: Any  # the largest
    place: Any  # first column of the tile or piece that has its first place, −1 before any
    best: Any  # of each lane; with PAIRED, of its even and of its odd columns, as int32 words
    runner_up: Any  # of each lane, the largest of all tiles but the best one's


@triton.jit(do_not_specialize=["N", "V", "S", "first_id"])
def pair_warp_kernel(
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
    SHIFT: tl.constexpr,  # rows start at any element of an aligned vector, alike for both
    PACKED: tl.constexpr,  # bf16 read two at a time, as 32-bit words
    PAIRED: tl.constexpr,  # and their maxima found two at a time (NVIDIA)
    LANES: tl.constexpr,
    UNITS: tl.constexpr,
    DEPENDENT: tl.constexpr,  # the merge may be launched early, and waits for the end
):
    # Each lane takes COLS neighbouring columns of each of the units of a tile: 16 bytes.
    COLS: tl.constexpr = 8 if PACKED else 4
    WIDTH: tl.constexpr = COLS * LANES
    SIZE: tl.constexpr = COLS * UNITS
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
    s = bundle.zeros((LANES,), tl.float32)
    ref = lib.nowhere((), scale.unit, HALF)
    lead_a = _no_lead(LANES, PAIRED)
    lead_b = _no_lead(LANES, PAIRED)
    at_a = part.base + tl.cast(part.first, tl.int64) * stride_av
    at_b = part.other + tl.cast(part.first, tl.int64) * stride_bv
    raw_a = split_triton.tile(at_a, stride_av, part.first < part.last, LANES, UNITS, PACKED)
    raw_b = split_triton.tile(at_b, stride_bv, part.first < part.last, LANES, UNITS, PACKED)
    for column in range(part.first, part.last, TILE):
        words_a = raw_a
        words_b = raw_b
        # the last tile is read twice rather than what follows it
        ahead = tl.where(column + TILE < part.last, TILE, 0)
        at_a += ahead * stride_av
        at_b += ahead * stride_bv
        raw_a = ()
        raw_b = ()
        tile_a = split_triton.logits(words_a, PACKED)
        tile_b = split_triton.logits(words_b, PACKED)
        if PAIRED:
            largest_a = _largest_words(words_a)
            largest_b = _largest_words(words_b)
        else:
            largest_a = _largest(tile_a)
            largest_b = _largest(tile_b)
        lead_a = _ahead(lead_a, largest_a, PAIRED)
        lead_b = _ahead(lead_b, largest_b, PAIRED)
        over = (_above(lead_a, largest_a, PAIRED) | _above(lead_b, largest_b, PAIRED)) != 0
        if tl.max(over.to(tl.int32), 0) > 0:
            top_a = _top(largest_a, PAIRED)
            rises = top_a > lead_a.top
            lead_b = _raised(lead_b, _top(largest_b, PAIRED), column, False)
            if rises | (lead_b.top * scale.unit > ref.b + scale.far):
                new = lib.next_reference(
                    ref, rises, top_a, _other_at(tile_a, tile_b, top_a), lead_b.top, scale, HALF
                )
                lead_a = _raised(lead_a, top_a, column, False)
                if column > part.first:
                    s = lib.move(s, ref, new, scale, tl.float64, SUMS, OTHER)
                ref = new
        sums = bundle.filled(-0.0)
        for u in tl.static_range(UNITS):
            if PACKED:
                raw_a = raw_a + split_triton.vectors(at_a, stride_av, u * WIDTH, None, LANES, True)
                raw_b = raw_b + split_triton.vectors(at_b, stride_bv, u * WIDTH, None, LANES, True)
            for j in tl.static_range(COLS):
                a = tile_a[u * COLS + j]
                b = tile_b[u * COLS + j]
                e = lib.exponents(a, b, ref, scale, PRECISE, False)
                sums = lib.accumulate(sums, a, b, e, None, None, SUMS, False, PRECISE, OTHER)
            if not PACKED:
                raw_a = raw_a + split_triton.vectors(at_a, stride_av, u * WIDTH, None, LANES, False)
                raw_b = raw_b + split_triton.vectors(at_b, stride_bv, u * WIDTH, None, LANES, False)
        s = bundle.add_tile(s, sums, SUMS, OTHER)
        s = bundle.count(s, SIZE, SUMS)

    if PAIRED:
        lead_a = _unpaired(lead_a)
        lead_b = _unpaired(lead_b)
    # −inf, NaN or +inf make a sum non-finite: sum the split again, looking at each.
    s = lib.complete(s, SUMS, OTHER)
    again = lib.spoiled(s) | lib.thin(s)
    heads = tl.where(again, tl.cdiv(part.stop - part.start, WIDTH), part.heads)
    tails = tl.where(again, 0, part.tails)
    if again:
        s = bundle.zeros((LANES,), tl.float32)
        ref = lib.nowhere((), scale.unit, HALF)
        lead_a = _no_lead(LANES, False)
        lead_b = _no_lead(LANES, False)
    odd = split_triton.nothing_odd(LANES)
    for number in range(0, heads + tails):
        column = tl.where(
            number < heads, part.start + number * WIDTH, part.last + (number - heads) * WIDTH
        )
        piece_a = ()
        piece_b = ()
        for j in tl.static_range(COLS):
            a, b = split_triton.piece(part, column, j, stride_av, stride_bv, LANES, COLS)
            piece_a = piece_a + (a,)
            piece_b = piece_b + (b,)
        clean_a = ()
        clean_b = ()
        for j in tl.static_range(COLS):
            a, b, odd = split_triton.cleaned(piece_a[j], piece_b[j], odd)
            lead_a = _ahead(lead_a, a, False)
            lead_b = _ahead(lead_b, b, False)
            clean_a = clean_a + (a,)
            clean_b = clean_b + (b,)
        # The piece before the tiles comes after them here, and wins where it holds an equal.
        before = (number < heads) & ~again
        largest_a = _largest(clean_a)
        largest_b = _largest(clean_b)
        over = (_above(lead_a, largest_a, False) | _above(lead_b, largest_b, False)) != 0
        if tl.max((over | before).to(tl.int32), 0) > 0:
            top_a = tl.max(largest_a, 0)
            rises = top_a > lead_a.top
            lead_a = _raised(lead_a, top_a, column, before)
            lead_b = _raised(lead_b, tl.max(largest_b, 0), column, before)
            if rises | (lead_b.top * scale.unit > ref.b + scale.far):
                new = lib.next_reference(
                    ref, rises, top_a, _other_at(clean_a, clean_b, top_a), lead_b.top, scale, HALF
                )
                s = lib.move(s, ref, new, scale, tl.float64, SUMS, OTHER)
                ref = new
        for j in tl.static_range(COLS):
            s = lib.accumulate_logits(s, clean_a[j], clean_b[j], ref, scale, SUMS, PRECISE, OTHER)

    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    second_a, id_a = _search(part.base, stride_av, lead_a, part, LANES, COLS, SIZE)
    second_b, id_b = _search(part.other, stride_bv, lead_b, part, LANES, COLS, SIZE)
    label_a, label_b = split_triton.label_logits(
        part, labels_ptr, first_id, stride_av, stride_bv, LABELS
    )
    head = split_triton.Head(
        ref_a=ref.a,
        ref_b=ref.b,
        top_a=lead_a.top,
        top_b=lead_b.top,
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
def _no_lead(LANES: tl.constexpr, PAIRED: tl.constexpr):
    """`Lead` before anything is read."""
    if PAIRED:
        lanes = tl.full((LANES,), -8323200, tl.int32)  # 0xFF80FF80: −inf twice
    else:
        lanes = tl.full((LANES,), float("-inf"), tl.float32)
    return Lead(
        top=tl.full((), float("-inf"), tl.float32),
        place=tl.full((), -1, tl.int32),
        best=lanes,
        runner_up=lanes,
    )


@triton.jit
def _largest(tile):
    """Per lane the largest of a tile's tensors."""
    largest = tile[0]
    for u in tl.static_range(1, len(tile)):
        largest = tl.maximum(largest, tile[u])
    return largest


@triton.jit
def _largest_words(words):
    """The same, of the lower and of the upper halves of words."""
    largest = words[0]
    for u in tl.static_range(1, len(words)):
        largest = elementwise.larger_halves(largest, words[u])
    return largest


@triton.jit
def _ahead(lead, largest, PAIRED: tl.constexpr):
    """A lead whose lanes have seen the largest of one more tile (or one more logit)."""
    if PAIRED:
        passed = elementwise.smaller_halves(lead.best, largest)
        runner_up = elementwise.larger_halves(lead.runner_up, passed)
        best = elementwise.larger_halves(lead.best, largest)
    else:
        runner_up = tl.maximum(lead.runner_up, tl.minimum(lead.best, largest))
        best = tl.maximum(lead.best, largest)
    return Lead(top=lead.top, place=lead.place, best=best, runner_up=runner_up)


@triton.jit
def _above(lead, largest, PAIRED: tl.constexpr):
    """Not 0 in lanes whose largest logit of a tile is above the lead's."""
    if PAIRED:
        tops = elementwise.both_halves(lead.top)
        return elementwise.larger_halves(largest, tops) ^ tops
    else:
        return (largest > lead.top).to(tl.int32)


@triton.jit
def _top(largest, PAIRED: tl.constexpr):
    """The largest of all lanes."""
    if PAIRED:
        low, high = elementwise.halves(largest)
        return tl.max(tl.maximum(low, high), 0)
    else:
        return tl.max(largest, 0)


@triton.jit
def _raised(lead, top, column, before):
    """A lead that knows the largest logit of the tile at a column.

    before: the tile comes before all others, so that an equal logit takes the lead.
    """
    level = before & (top == lead.top) & (top > float("-inf"))
    return Lead(
        top=tl.maximum(lead.top, top),
        place=tl.where((top > lead.top) | level, column, lead.place),
        best=lead.best,
        runner_up=lead.runner_up,
    )


@triton.jit
def _unpaired(lead):
    """A lead of lanes from that of their even and odd columns."""
    low, high = elementwise.halves(lead.best)
    next_low, next_high = elementwise.halves(lead.runner_up)
    return Lead(
        top=lead.top,
        place=lead.place,
        best=tl.maximum(low, high),
        runner_up=tl.maximum(tl.minimum(low, high), tl.maximum(next_low, next_high)),
    )


@triton.jit
def _other_at(tile_a, tile_b, top_a):
    """b where a is `top_a`: the largest such b, where that is in several places."""
    there = tl.full(tile_a[0].shape, float("-inf"), tl.float32)
    for u in tl.static_range(len(tile_a)):
        there = tl.where(tile_a[u] == top_a, tl.maximum(there, tile_b[u]), there)
    return tl.max(there, 0)


@triton.jit
def _search(
    row_ptr, stride, lead, part, LANES: tl.constexpr, COLS: tl.constexpr, SIZE: tl.constexpr
):
    """The runner-up of a lead's largest logit, and its first column, from its tile read again."""
    minus_inf = float("-inf")
    nowhere = 2147483647
    at = row_ptr + lead.place.to(tl.int64) * stride
    values = ()
    for j in tl.static_range(SIZE):
        here = split_triton.column_of(j, LANES, COLS)
        column = lead.place + here
        inside = (lead.place >= 0) & (column >= part.skew) & (column < part.end)
        value = tl.load(at + here * stride, mask=inside, other=minus_inf).to(tl.float32)
        values = values + (value,)
    found = tl.full((LANES,), nowhere, tl.int32)
    for j in tl.static_range(SIZE):
        here = split_triton.column_of(j, LANES, COLS)
        found = tl.minimum(found, tl.where(values[j] == lead.top, here, nowhere))
    first = tl.min(found, 0)
    # Lanes whose largest logit is the one found, or its equal in the same tile, offer their next.
    second = tl.where((lead.best == lead.top) & (found < nowhere), lead.runner_up, lead.best)
    for j in tl.static_range(SIZE):
        here = split_triton.column_of(j, LANES, COLS)
        second = tl.maximum(second, tl.where(here == first, minus_inf, values[j]))
    index = tl.where(lead.place >= 0, lead.place + first - part.skew, nowhere)
    return tl.max(second, 0), index
