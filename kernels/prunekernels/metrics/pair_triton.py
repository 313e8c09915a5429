"""Pair statistics of logits in one pass (METRICS: "One pass", "Kernels").

A program sums one split of the vocabulary of one pair of rows into 512 lanes, without reducing
across them: tiles of 4096 without masks, then what is left over at either end in masked pieces of
512. The references A = k·max a and B = k·b there move in a branch that is rarely taken. Four sums
are taken from the others, not from the logits. Where a split turns out to hold −inf, NaN or +inf,
or rows so different in size that this would cancel, it is summed again, in masked pieces alone.
Partial sums are merged in a fixed order by `merge_triton`; "full" then reads the logits a second
time (`second_pass_triton`).
"""


# ruff: noqa: RUF005  (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="misc, var-annotated, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.metrics import merge_triton, partial, result_rows, top_tokens, tuning
from prunekernels.metrics.merge_triton import State
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.rows import PairRows
from prunekernels.metrics.second_pass_triton import second_pass
from prunekernels.metrics.sums import triton as lib
from prunekernels.rows import take_rows
from prunekernels.runtime import on


@triton.jit(do_not_specialize=["N", "V", "S", "first_id"])
def _pair_sums_kernel(
    base_ptr,  # logits a
    other_ptr,  # logits b
    starts_ptr,  # (2, N) int64 first element of each row, with ROW_TABLE
    labels_ptr,  # (N,) int64, with LABELS
    floats_ptr,  # (N, S, F) fp32: `merge_triton.HEAD`, then the sums
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
    SUMS: tl.constexpr,  # the sums that are wanted: see `sums.triton`
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
    WIDTH: tl.constexpr = 4 * LANES
    TILE: tl.constexpr = WIDTH * UNITS
    # References are logits at the precise level, else exponents: see `sums.triton`.
    if PRECISE:
        unit = 1.0
        far = 20.0 / inverse_t
        step = k
    else:
        unit = k
        far = lib.FAR
        step = 1.0
    pid = tl.program_id(0).to(tl.int64)
    row = pid // S
    split = (pid % S).to(tl.int32)
    if ROW_TABLE:
        start_a = tl.load(starts_ptr + row)
        start_b = tl.load(starts_ptr + N + row)
    else:
        start_a = row * stride_an
        start_b = row * stride_bn
    lanes = tl.arange(0, LANES)
    # Columns are counted from `skew` elements before the row, where vectors are aligned.
    skew = 0
    head = 0
    if SHIFT:
        skew = (start_a % 4).to(tl.int32)
        start_a = tl.multiple_of(start_a - skew, 4)
        start_b = tl.multiple_of(start_b - skew, 4)
        head = tl.where(skew > 0, WIDTH, 0)
    end = V + skew
    whole = tl.maximum(end - head, 0) // TILE
    first = head + (whole.to(tl.int64) * split // S).to(tl.int32) * TILE
    last = head + (whole.to(tl.int64) * (split + 1) // S).to(tl.int32) * TILE

    minus_inf = float("-inf")
    s = lib.zeros((LANES,), tl.float32)
    ref_a = tl.full((), minus_inf, tl.float32)
    ref_b = tl.full((), minus_inf, tl.float32)
    best_a = tl.full((LANES,), minus_inf, tl.float32)
    best_b = tl.full((LANES,), minus_inf, tl.float32)
    next_a = best_a
    next_b = best_b
    unit_a = tl.full((LANES,), -1, tl.int32)
    unit_b = tl.full((LANES,), -1, tl.int32)
    top_b = tl.full((), minus_inf, tl.float32)
    parts = lib.gap(tl.full((), 0.0, tl.float32), ref_a, ref_b, unit, HALF)

    for column in range(first, last, TILE):
        tile_a = ()
        tile_b = ()
        from_a = base_ptr + (start_a + tl.cast(column, tl.int64) * stride_av)
        from_b = other_ptr + (start_b + tl.cast(column, tl.int64) * stride_bv)
        if PACKED:
            words_a = ()
            words_b = ()
            for u in tl.static_range(UNITS):
                words_a = words_a + _words(from_a, u * WIDTH, LANES)
                words_b = words_b + _words(from_b, u * WIDTH, LANES)
            for u in tl.static_range(2 * UNITS):
                tile_a = tile_a + lib.halves(words_a[u])
                tile_b = tile_b + lib.halves(words_b[u])
        else:
            for u in tl.static_range(UNITS):
                tile_a = tile_a + _quarters(from_a, stride_av, u * WIDTH, LANES)
                tile_b = tile_b + _quarters(from_b, stride_bv, u * WIDTH, LANES)
        if PAIRED:
            larger_a = words_a[0]
            larger_b = words_b[0]
            for u in tl.static_range(1, 2 * UNITS):
                larger_a = lib.larger_halves(larger_a, words_a[u])
                larger_b = lib.larger_halves(larger_b, words_b[u])
            low, high = lib.halves(larger_a)
            max_a = tl.maximum(low, high)
            low, high = lib.halves(larger_b)
            max_b = tl.maximum(low, high)
        else:
            max_a = tile_a[0]
            max_b = tile_b[0]
            for u in tl.static_range(1, 4 * UNITS):
                max_a = tl.maximum(max_a, tile_a[u])
                max_b = tl.maximum(max_b, tile_b[u])
        next_a = tl.maximum(next_a, tl.minimum(best_a, max_a))
        next_b = tl.maximum(next_b, tl.minimum(best_b, max_b))
        unit_a = tl.where(max_a > best_a, column, unit_a)
        unit_b = tl.where(max_b > best_b, column, unit_b)
        best_a = tl.maximum(best_a, max_a)
        best_b = tl.maximum(best_b, max_b)
        over = (max_a * unit > ref_a) | (max_b * unit > ref_b + far)
        if tl.max(over.to(tl.int32), 0) > 0:
            tile_top_a = tl.max(max_a, 0)
            top_b = tl.max(best_b, 0)
            new_a = ref_a
            new_b = ref_b
            size = lib.whole_gap(parts)
            if tile_top_a * unit > ref_a:
                new_a = tile_top_a * unit
                where = tl.full((LANES,), TILE, tl.int32)
                for j in range(4 * UNITS):
                    here = j * LANES + lanes
                    value = tl.load(from_a + here * stride_av).to(tl.float32)
                    where = tl.where(value == tile_top_a, tl.minimum(where, here), where)
                found = tl.min(where, 0)
                found = tl.where(found < TILE, found, 0)
                at_top = tl.load(from_b + found * stride_bv).to(tl.float32)
                new_b = at_top * unit
                size = at_top - tile_top_a
            away = top_b * unit > new_b + far
            new_b = tl.where(away, top_b * unit, new_b)
            size = tl.where(away, (new_b - new_a) / unit, size)
            old = (ref_a, ref_b, parts)
            new = (new_a, new_b, size)
            s, parts = lib.move(s, old, new, unit, step, tl.float64, SUMS, OTHER, HALF)
            ref_a = new_a
            ref_b = new_b
        for u in tl.static_range(4 * UNITS):
            a = tile_a[u]
            b = tile_b[u]
            y, z, x, t = lib.exponents(a, b, ref_a, ref_b, parts, k, inverse_t, PRECISE, False)
            s = lib.accumulate(s, a, b, y, z, x, t, None, None, None, SUMS, False, PRECISE, OTHER)
        s = lib.count(s, 4 * UNITS, SUMS)

    # −inf, NaN or +inf make Σwx or Σvx non-finite: sum the split again, looking at each.
    s = lib.complete(s, SUMS, OTHER)
    sign = tl.sum((s[1] + s[5]) + (s[14] + s[3] + s[6]), 0)
    again = ((sign - sign) != 0.0) | lib.thin(s)
    from_column = tl.where(split == 0, 0, first)
    to_column = tl.where(split == S - 1, end, last)
    heads = tl.where((split == 0) & (head > 0) & (end > 0), 1, 0)
    heads = tl.where(again, tl.cdiv(to_column - from_column, WIDTH), heads)
    tails = tl.where((split == S - 1) & ~again, tl.cdiv(tl.maximum(end - last, 0), WIDTH), 0)
    if again:
        s = lib.zeros((LANES,), tl.float32)
        ref_a = tl.full((), minus_inf, tl.float32)
        ref_b = tl.full((), minus_inf, tl.float32)
        parts = lib.gap(tl.full((), 0.0, tl.float32), ref_a, ref_b, unit, HALF)
        best_a = tl.full((LANES,), minus_inf, tl.float32)
        best_b = tl.full((LANES,), minus_inf, tl.float32)
        next_a = tl.full((LANES,), minus_inf, tl.float32)
        next_b = tl.full((LANES,), minus_inf, tl.float32)
        unit_a = tl.full((LANES,), -1, tl.int32)
        unit_b = tl.full((LANES,), -1, tl.int32)
    only_a = tl.zeros((LANES,), tl.float32)
    only_b = tl.zeros((LANES,), tl.float32)
    broken_a = tl.zeros((LANES,), tl.float32)
    broken_b = tl.zeros((LANES,), tl.float32)
    for part in range(0, 4 * (heads + tails)):
        piece = part // 4
        column = tl.where(
            piece < heads, from_column + piece * WIDTH, last + (piece - heads) * WIDTH
        )
        columns = column + 4 * lanes + part % 4
        inside = (columns >= skew) & (columns < end)
        offset = columns.to(tl.int64)
        a = tl.load(base_ptr + start_a + offset * stride_av, mask=inside, other=minus_inf)
        b = tl.load(other_ptr + start_b + offset * stride_bv, mask=inside, other=minus_inf)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        bad_a = (a != a) | (a == float("inf"))
        bad_b = (b != b) | (b == float("inf"))
        broken_a += tl.where(bad_a, 1.0, 0.0)
        broken_b += tl.where(bad_b, 1.0, 0.0)
        a = tl.where(bad_a, minus_inf, a)
        b = tl.where(bad_b, minus_inf, b)
        whole_a = a != minus_inf
        whole_b = b != minus_inf
        only_a += tl.where(whole_b & ~whole_a, 1.0, 0.0)
        only_b += tl.where(whole_a & ~whole_b, 1.0, 0.0)
        next_a = tl.maximum(next_a, tl.minimum(best_a, a))
        next_b = tl.maximum(next_b, tl.minimum(best_b, b))
        # The piece before the tiles comes after them here, and wins where it holds an equal.
        before = (piece < heads) & ~again
        unit_a = tl.where((a > best_a) | (before & whole_a & (a == best_a)), column, unit_a)
        unit_b = tl.where((b > best_b) | (before & whole_b & (b == best_b)), column, unit_b)
        best_a = tl.maximum(best_a, a)
        best_b = tl.maximum(best_b, b)
        piece_top_a = tl.max(a, 0)
        top_b = tl.max(best_b, 0)
        if (piece_top_a * unit > ref_a) | (top_b * unit > ref_b + far):
            new_a = ref_a
            new_b = ref_b
            size = lib.whole_gap(parts)
            if piece_top_a * unit > ref_a:
                new_a = piece_top_a * unit
                found = tl.min(tl.where(a == piece_top_a, lanes, LANES), 0)
                at_top = tl.max(tl.where(lanes == found, b, minus_inf), 0)
                new_b = at_top * unit
                size = at_top - piece_top_a
            away = top_b * unit > new_b + far
            new_b = tl.where(away, top_b * unit, new_b)
            size = tl.where(away, (new_b - new_a) / unit, size)
            old = (ref_a, ref_b, parts)
            new = (new_a, new_b, size)
            s, parts = lib.move(s, old, new, unit, step, tl.float64, SUMS, OTHER, HALF)
            ref_a = new_a
            ref_b = new_b
        y, z, x, t = lib.exponents(a, b, ref_a, ref_b, parts, k, inverse_t, PRECISE, True)
        y = tl.where(whole_a, y, lib.LOWEST)
        z = tl.where(whole_b, z, lib.LOWEST)
        a = tl.where(whole_a, a, 0.0)
        b = tl.where(whole_b, b, 0.0)
        keep = whole_a | whole_b
        s = lib.accumulate(s, a, b, y, z, x, t, whole_a, whole_b, keep, SUMS, True, PRECISE, OTHER)

    # Each lane reads its best unit again, for the first index of its maximum and the runner-up.
    index_a = tl.full((LANES,), -1, tl.int32)
    index_b = tl.full((LANES,), -1, tl.int32)
    for j in range(4 * UNITS):
        here = (j // 4) * WIDTH + 4 * lanes + j % 4
        columns = unit_a + here
        inside = (unit_a >= 0) & (columns >= skew) & (columns < end)
        where = base_ptr + start_a + columns.to(tl.int64) * stride_av
        value = tl.load(where, mask=inside, other=minus_inf).to(tl.float32)
        mine = (value == best_a) & (index_a < 0) & inside
        index_a = tl.where(mine, columns - skew, index_a)
        next_a = tl.maximum(next_a, tl.where(mine, minus_inf, value))
        columns = unit_b + here
        inside = (unit_b >= 0) & (columns >= skew) & (columns < end)
        where = other_ptr + start_b + columns.to(tl.int64) * stride_bv
        value = tl.load(where, mask=inside, other=minus_inf).to(tl.float32)
        mine = (value == best_b) & (index_b < 0) & inside
        index_b = tl.where(mine, columns - skew, index_b)
        next_b = tl.maximum(next_b, tl.where(mine, minus_inf, value))
    top_a, second_a, id_a = _lead(best_a, next_a, index_a)
    top_b, second_b, id_b = _lead(best_b, next_b, index_b)

    label_a = 0.0
    label_b = 0.0
    if LABELS:
        label = tl.load(labels_ptr + row) - first_id + skew
        mine = (label >= from_column) & (label < to_column) & (label >= skew)
        label_a = tl.load(base_ptr + start_a + label * stride_av, mask=mine, other=0.0)
        label_b = tl.load(other_ptr + start_b + label * stride_bv, mask=mine, other=0.0)
    else:
        label_a = tl.full((), 0.0, tl.float32)
        label_b = tl.full((), 0.0, tl.float32)
    head_fields = (
        ref_a,
        ref_b,
        top_a,
        top_b,
        second_a,
        second_b,
        label_a.to(tl.float32),
        label_b.to(tl.float32),
        tl.sum(only_a, 0),
        tl.sum(only_b, 0),
        tl.sum(broken_a, 0),
        tl.sum(broken_b, 0),
    )
    totals = ()
    for i in tl.static_range(len(s)):
        totals = totals + (tl.sum(s[i], 0),)
    totals = lib.to_states(totals, ref_a, ref_b, parts, k, inverse_t, SUMS, PRECISE, OTHER)
    sums = ()
    for i in tl.static_range(len(s)):
        if (SUMS >> i) & 1:
            sums = sums + (totals[i],)
    fields = head_fields + sums
    out = floats_ptr + pid * len(fields)
    for i in tl.static_range(len(fields)):
        tl.store(out + i, fields[i])
    tl.store(ids_ptr + pid * 2, id_a.to(tl.int64) + first_id)
    tl.store(ids_ptr + pid * 2 + 1, id_b.to(tl.int64) + first_id)


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


@triton.jit
def _quarters(ptr, stride, skip, LANES: tl.constexpr):
    """The same as four float32 tensors, whatever the type and the stride."""
    values = tl.load(ptr + (skip + tl.arange(0, 4 * LANES)) * stride)
    even, odd = tl.split(tl.reshape(values, (LANES, 2, 2)))
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    return (q0.to(tl.float32), q1.to(tl.float32), q2.to(tl.float32), q3.to(tl.float32))


def partial_state(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    options: PairOptions,
    first_id: int = 0,
    splits: int | None = None,
) -> State:
    """Launch the first pass: partial states of `(…, V)` logits whose first column is `first_id`."""
    rows = PairRows(base, other)
    if splits is None:
        splits = tuning.pair_splits(rows.count, rows.width)
    state = merge_triton.empty_state(base.device, rows.count, splits, options)
    if rows.count:
        warp = 32 if torch.version.hip is None else 64
        config = tuning.pair_config(warp)
        with on(base):
            _pair_sums_kernel[(rows.count * splits,)](
                base,
                other,
                rows.starts,
                labels,
                state.floats,
                state.ids,
                rows.count,
                rows.width,
                splits,
                *rows.strides,
                first_id,
                merge_triton.exponent_scale(options.temperature),
                1.0 / options.temperature,
                SUMS=merge_triton.summed(options),
                PRECISE=options.precise,
                OTHER=options.by_other,
                LABELS=labels is not None,
                HALF=base.element_size() == 2,
                ROW_TABLE=rows.starts is not None,
                SHIFT=rows.shift,
                PACKED=rows.packed,
                PAIRED=rows.packed and torch.version.hip is None,
                LANES=config.lanes,
                UNITS=config.units,
                num_warps=config.num_warps,
                num_stages=1,
                **tuning.pair_options(options.precise, warp),
            )
    return state


def pair_stats(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
) -> list[Tensor]:
    """Packed statistics of `(…, V)` logits (`eager.pair_stats` by Triton kernels)."""
    labels = None if labels is None else labels.reshape(-1)
    packed, norms, broken = partial_state(base, other, labels, options).finish()
    if asked := options.second_pass:
        extra = second_pass(base, other, norms, options.temperature)
        extra.masked_fill_(broken, float("nan"))
        # row by row: indexing with a list would copy it from the host, which no graph can capture
        for row, name in zip(packed[0][-len(asked) :], asked, strict=True):
            row.copy_(extra[result_rows.FULL_FLOATS.index(name)])
    if subset is not None:
        few_a, few_b = (x.index_select(-1, subset) for x in (base, other))
        packed += pair_stats(few_a, few_b, None, None, options.of_subset)
    if options.topk:
        packed += _top_tokens(base, other, norms, broken, options)
    return packed


def pair_state(
    base: Tensor, other: Tensor, labels: Tensor | None, offset: int, options: PairOptions
) -> Tensor:
    """Mergeable state `(N, F)` of `(…, V)` logits (`eager.pair_state` by Triton)."""
    labels = None if labels is None else labels.reshape(-1)
    state = partial_state(base, other, labels, options, first_id=offset)
    return partial.merge(state.natural().transpose(0, 1), options.temperature)


def _top_tokens(
    base: Tensor, other: Tensor, norms: Tensor, broken: Tensor, options: PairOptions
) -> list[Tensor]:
    """The likeliest tokens, a few rows at a time: selection is torch's."""
    rows, topk = norms.shape[1], options.topk
    device = base.device
    floats = torch.zeros(len(result_rows.TOPK_FLOATS), rows, topk, device=device)
    totals = torch.zeros(len(result_rows.TOPK_ROWS), rows, device=device)
    ids = torch.zeros(len(result_rows.TOPK_IDS), rows, topk, dtype=torch.int64, device=device)
    step = max(1, (64 << 20) // (16 * base.shape[-1]))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        pair = (take_rows(base, start, part.stop), take_rows(other, start, part.stop))
        norm = (norms[:2, part], norms[2:, part])
        found = top_tokens.compare(pair, *norm, options.temperature, topk, reads=False)
        floats[:, part], totals[:, part], ids[:, part] = found
    floats.masked_fill_(broken[:, None], float("nan"))
    totals.masked_fill_(broken, float("nan"))
    return [floats, totals, ids]


#: Loops that fewer fields lead to, and how many sums each has.
LOOPS: dict[str, tuple[str, ...]] = {
    # 4: also what "nll_base", "lse_base", "argmax_base" and their like run
    "kl": ("kl_base_other", "kl_other_base"),
    # 10: p and q without the logits and the squares' variance
    "prob": ("kl_base_other", "kl_other_base", "entropy_base", "cos_prob", "kl_estimate"),
    # 7
    "precise_kl": ("kl_base_other", "kl_other_base"),
}


def compile_cases() -> list[KernelCase]:
    """The pass over contiguous logits for what is asked most."""
    integers = dict.fromkeys(("N", "V", "S"), "i32")
    strides = dict.fromkeys(("stride_an", "stride_bn"), "i64")
    pointers = ("base_ptr", "other_ptr")
    numbers = {"k": "fp32", "inverse_t": "fp32"}
    cases = []
    nvidia: tuple[Arch, ...] = (80, 89, 90)
    amd: tuple[Arch, ...] = ("gfx942",)
    everything = (
        ("core", "bf16", "base"),
        ("core", "fp32", "base"),
        ("core", "fp16", "other"),
        ("precise", "bf16", "base"),
        ("precise", "fp32", "other"),
    )
    chosen = (*((name, "bf16", "base") for name in LOOPS), ("kl", "fp32", "base"))
    planned = [(*what, nvidia) for what in everything + chosen]
    for sums, dtype, weights, archs in planned + [(*what, amd) for what in everything]:
        warp = 32 if archs == nvidia else 64
        config = tuning.pair_config(warp)
        level = "precise" if sums.startswith("precise") else "core"
        fields = ",".join(LOOPS.get(sums, ()))
        options = PairOptions(level=level, weights=weights, fields=fields)
        outputs = {"floats_ptr": "*fp32", "ids_ptr": "*i64"}
        columns = config.lanes * 4 * config.units
        per_thread = columns // (32 * config.num_warps)
        cases.append(
            KernelCase(
                name=f"pair_stats/{sums}/{dtype}/{weights}",
                kernel=_pair_sums_kernel,
                signature={
                    **dict.fromkeys(pointers, f"*{dtype}"),
                    **outputs,
                    **integers,
                    **strides,
                    **numbers,
                    "first_id": "i64",
                },
                constants={
                    "starts_ptr": None,
                    "labels_ptr": None,
                    "stride_av": 1,
                    "stride_bv": 1,
                    "SUMS": merge_triton.summed(options),
                    "PRECISE": options.precise,
                    "OTHER": options.by_other,
                    "LABELS": False,
                    "HALF": dtype != "fp32",
                    "ROW_TABLE": False,
                    "SHIFT": False,
                    "PACKED": dtype == "bf16",
                    "PAIRED": dtype == "bf16" and archs == nvidia,
                    "LANES": config.lanes,
                    "UNITS": config.units,
                },
                num_warps=config.num_warps,
                num_stages=1,
                options=tuning.pair_options(options.precise, warp),
                divisible=(*pointers, *outputs, *strides),
                opcodes=("MUFU.EX2", "v_exp_f32"),
                elements_per_iteration=columns // config.num_warps,
                per_iteration=("MUFU.EX2", 2 * per_thread),
                rare="DFMA",
                archs=archs,
            )
        )
    return cases
