"""A program's split of a pair of rows in Triton: its columns, how they are read, what it stores."""

# ruff: noqa: RUF005, SIM108  (Triton compiles neither starred tuples nor every ternary)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="misc, var-annotated, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prunekernels.metrics.sums import elementwise_triton as elementwise


class Span(NamedTuple):
    """Columns of one split, counted from `skew` elements before the row, where vectors are aligned.

    Whole tiles are read without masks. What is left over at either end of a row is read in pieces,
    by its first split (`heads`) and its last (`tails`).
    """

    row: Any  # int64
    base: Any  # pointer to column 0 of a
    other: Any  # pointer to column 0 of b
    skew: Any
    end: Any  # after the row's last column
    first: Any  # of the tiles
    last: Any  # after the tiles
    start: Any  # of all columns of the split
    stop: Any  # after all columns of the split
    heads: Any  # pieces before the tiles
    tails: Any  # pieces after the tiles


class Head(NamedTuple):
    """What a partial state holds before its sums."""

    ref_a: Any  # A
    ref_b: Any  # B
    top_a: Any  # largest logits
    top_b: Any
    second_a: Any  # largest of the others
    second_b: Any
    label_a: Any  # the label's logit, 0 where another split has it
    label_b: Any
    only_a: Any  # how many elements are −inf in a alone
    only_b: Any
    broken_a: Any  # how many are NaN or +inf in a
    broken_b: Any


class Odd(NamedTuple):
    """How many elements each lane has left out: −inf in one row alone, NaN or +inf."""

    only_a: Any
    only_b: Any
    broken_a: Any
    broken_b: Any


@triton.jit
def span(
    base_ptr,
    other_ptr,
    starts_ptr,  # (2, N) int64 first element of each row, with ROW_TABLE
    N,
    V,
    S,
    stride_an,
    stride_bn,
    ROW_TABLE: tl.constexpr,
    SHIFT: tl.constexpr,  # rows start at any element of an aligned vector, alike for both
    COLS: tl.constexpr,  # of a vector
    WIDTH: tl.constexpr,  # columns of a piece
    TILE: tl.constexpr,  # columns of a tile
):
    """The split of this program, of S that share a row's tiles as evenly as can be."""
    pid = tl.program_id(0)
    row32 = pid // S
    split = pid - row32 * S
    row = row32.to(tl.int64)
    if ROW_TABLE:
        start_a = tl.load(starts_ptr + row)
        start_b = tl.load(starts_ptr + N + row)
    else:
        start_a = row * stride_an
        start_b = row * stride_bn
    skew = 0
    head = 0
    if SHIFT:
        skew = (start_a % COLS).to(tl.int32)
        start_a = tl.multiple_of(start_a - skew, COLS)
        start_b = tl.multiple_of(start_b - skew, COLS)
        head = tl.where(skew > 0, WIDTH, 0)
    end = V + skew
    whole = tl.maximum(end - head, 0) // TILE
    each = whole // S
    more = whole - each * S
    first = head + (each * split + tl.minimum(split, more)) * TILE
    last = first + (each + tl.where(split < more, 1, 0)) * TILE
    at_start = split == 0
    at_end = split == S - 1
    return Span(
        row=row,
        base=base_ptr + start_a,
        other=other_ptr + start_b,
        skew=skew,
        end=end,
        first=first,
        last=last,
        start=tl.where(at_start, 0, first),
        stop=tl.where(at_end, end, last),
        heads=tl.where(at_start & (head > 0), 1, 0),
        tails=tl.where(at_end, tl.cdiv(tl.maximum(end - last, 0), WIDTH), 0),
    )


@triton.jit
def vectors(ptr, stride, skip, mask, LANES: tl.constexpr, PACKED: tl.constexpr):
    """Four tensors of what 16 bytes a lane hold: words of two bfloat16 (PACKED), or logits."""
    if PACKED:
        at = (ptr + skip).to(tl.pointer_type(tl.int32)) + tl.arange(0, 4 * LANES)
    else:
        at = ptr + (skip + tl.arange(0, 4 * LANES)) * stride
    if mask is None:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=mask)
    even, odd = tl.split(tl.reshape(values, (LANES, 2, 2)))
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    return (q0, q1, q2, q3)


@triton.jit
def tile(ptr, stride, mask, LANES: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr):
    """The `vectors` of UNITS neighbouring pieces."""
    WIDTH: tl.constexpr = (8 if PACKED else 4) * LANES
    out = ()
    for u in tl.static_range(UNITS):
        out = out + vectors(ptr, stride, u * WIDTH, mask, LANES, PACKED)
    return out


@triton.jit
def logits(words, PACKED: tl.constexpr):
    """What `vectors` read, as float32, in the order of columns."""
    out = ()
    for u in tl.static_range(len(words)):
        if PACKED:
            out = out + elementwise.halves(words[u])
        else:
            out = out + (words[u].to(tl.float32),)
    return out


@triton.jit
def column_of(j, LANES: tl.constexpr, COLS: tl.constexpr):
    """Columns of the j-th of the tensors of a tile (`logits`), counted from the tile's first."""
    return (j // COLS) * (COLS * LANES) + COLS * tl.arange(0, LANES) + j % COLS


@triton.jit
def piece(part, column, j, stride_av, stride_bv, LANES: tl.constexpr, COLS: tl.constexpr):
    """The j-th logits of each lane of a piece of a `Span`, −inf where there are none."""
    columns = column + column_of(j, LANES, COLS)
    inside = (columns >= part.skew) & (columns < part.end)
    offset = columns.to(tl.int64)
    a = tl.load(part.base + offset * stride_av, mask=inside, other=float("-inf"))
    b = tl.load(part.other + offset * stride_bv, mask=inside, other=float("-inf"))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def nothing_odd(LANES: tl.constexpr):
    """`Odd` before anything is read."""
    none = tl.zeros((LANES,), tl.float32)
    return Odd(only_a=none, only_b=none, broken_a=none, broken_b=none)


@triton.jit
def cleaned(a, b, odd):
    """Logits with −inf for NaN and +inf, and what was odd about them counted."""
    minus_inf = float("-inf")
    bad_a = (a != a) | (a == float("inf"))
    bad_b = (b != b) | (b == float("inf"))
    a = tl.where(bad_a, minus_inf, a)
    b = tl.where(bad_b, minus_inf, b)
    counted = Odd(
        only_a=odd.only_a + tl.where((b != minus_inf) & (a == minus_inf), 1.0, 0.0),
        only_b=odd.only_b + tl.where((a != minus_inf) & (b == minus_inf), 1.0, 0.0),
        broken_a=odd.broken_a + tl.where(bad_a, 1.0, 0.0),
        broken_b=odd.broken_b + tl.where(bad_b, 1.0, 0.0),
    )
    return a, b, counted


@triton.jit
def label_logits(part, labels_ptr, first_id, stride_av, stride_bv, LABELS: tl.constexpr):
    """The label's logits if they are in this `Span`, else 0."""
    label_a = tl.full((), 0.0, tl.float32)
    label_b = tl.full((), 0.0, tl.float32)
    if LABELS:
        label = tl.load(labels_ptr + part.row) - first_id + part.skew
        mine = (label >= part.start) & (label < part.stop) & (label >= part.skew)
        at_a = part.base + label * stride_av
        at_b = part.other + label * stride_bv
        label_a = tl.load(at_a, mask=mine, other=0.0).to(tl.float32)
        label_b = tl.load(at_b, mask=mine, other=0.0).to(tl.float32)
    return label_a, label_b


@triton.jit
def store_state(floats_ptr, at, head, s, mask, SUMS: tl.constexpr):
    """Store partial state number `at`: its `Head`, then the sums that are wanted."""
    fields = ()
    for i in tl.static_range(len(head)):
        fields = fields + (head[i],)
    for i in tl.static_range(len(s)):
        if (SUMS >> i) & 1:
            fields = fields + (s[i],)
    out = floats_ptr + at * len(fields)
    for i in tl.static_range(len(fields)):
        tl.store(out + i, fields[i], mask=mask)
