"""From partial sums of pairs of logit rows to the reported fields, in one launch.

The splits of a row (of one vocabulary, or of shards of it held by several processes) are moved to
common references and added in float64, in an order that only depends on their number; the fields
are then evaluated as `closed_form` defines them, with exponents in base 2 (`sums.triton`).
"""

# ruff: noqa: RUF005  (Triton compiles neither starred tuples nor every ternary)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, call-arg"

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.metrics import closed_form, partial, result_rows, tuning
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.split_triton import Head
from prunekernels.metrics.sums import bundle_triton as bundle
from prunekernels.metrics.sums import triton as lib
from prunekernels.metrics.sums.elementwise_triton import LN2, angles, log1p
from prunekernels.runtime import capability

ROUNDING = tl.constexpr(closed_form.ROUNDING)

#: Names of what a partial state holds before its sums.
HEAD: tuple[str, ...] = Head._fields


@triton.jit(do_not_specialize=["N", "S"])
def _pair_merge_kernel(
    floats_ptr,  # (N, S, FIELDS) partial states
    ids_ptr,  # (N, S, 2) int64
    out_ptr,  # (fields, N) fp32, `result_rows.pair_floats`
    out_ids_ptr,  # (2, N) int64
    flags_ptr,  # (4, N) bool: `result_rows.PAIR_FLAGS`, and whether NaN or infinity spoils the row
    norms_ptr,  # (4, N) float64: references of base and other (logits), ln W0, ln V0
    N,
    S,
    k,  # log2(e)/T as the sums used it
    temperature,  # T = temperature + temperature_rest
    temperature_rest,
    SUMS: tl.constexpr,  # the sums of a state: see `bundle_triton`
    FIELDS: tl.constexpr,  # the fields that are wanted: bits in the order of `result_rows`
    PRECISE: tl.constexpr,
    OTHER: tl.constexpr,
    LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,  # splits read at a time
    DEPENDENT: tl.constexpr,  # launched before the sums are there
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    HEADS: tl.constexpr = _heads()
    WIDTH: tl.constexpr = _width(SUMS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    minus_inf = float("-inf")
    big = 9223372036854775807

    # References, maxima and their ids first: all that needs no sums.
    ref_a = tl.full((ROWS,), minus_inf, tl.float64)
    ref_b = tl.full((ROWS,), minus_inf, tl.float64)
    top_a = tl.full((ROWS,), minus_inf, tl.float64)
    top_b = tl.full((ROWS,), minus_inf, tl.float64)
    second_a = tl.full((ROWS,), minus_inf, tl.float64)
    second_b = tl.full((ROWS,), minus_inf, tl.float64)
    id_a = tl.full((ROWS,), big, tl.int64)
    id_b = tl.full((ROWS,), big, tl.int64)
    label_a = tl.zeros((ROWS,), tl.float64)
    label_b = tl.zeros((ROWS,), tl.float64)
    counts = (label_a, label_a, label_a, label_a)
    for start in range(0, S, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        mask = inside[:, None] & (splits < S)[None, :]
        at = rows[:, None] * S + splits[None, :]
        state = floats_ptr + at * WIDTH
        a = tl.load(state, mask=mask, other=minus_inf).to(tl.float64)
        b = tl.load(state + 1, mask=mask, other=minus_inf).to(tl.float64)
        block_a = tl.max(a, 1)
        holder = tl.min(tl.where(a == block_a[:, None], splits[None, :], 2147483647), 1)
        block_b = tl.max(tl.where(splits[None, :] == holder[:, None], b, minus_inf), 1)
        ref_b = tl.where(block_a > ref_a, block_b, ref_b)
        ref_a = tl.maximum(ref_a, block_a)
        top_a, second_a, id_a = _lead(
            state + 2, state + 4, ids_ptr + at * 2, mask, top_a, second_a, id_a
        )
        top_b, second_b, id_b = _lead(
            state + 3, state + 5, ids_ptr + at * 2 + 1, mask, top_b, second_b, id_b
        )
        label_a += tl.sum(tl.load(state + 6, mask=mask, other=0.0).to(tl.float64), 1)
        label_b += tl.sum(tl.load(state + 7, mask=mask, other=0.0).to(tl.float64), 1)
        found = ()
        for i in tl.static_range(4):
            part = tl.load(state + 8 + i, mask=mask, other=0.0)
            found = found + (tl.sum(part.to(tl.float64), 1),)
        counts = bundle.add(counts, found)
    # From here on references are exponents.
    scale = tl.cast(k, tl.float64)
    t = tl.cast(temperature, tl.float64) + tl.cast(temperature_rest, tl.float64)
    if PRECISE:
        unit = scale
        nats = 1.0
    else:
        unit = 1.0
        nats = LN2
    ref_a = ref_a * unit
    ref_b = ref_b * unit
    ref_b = tl.where((top_b * scale > ref_b + lib.FAR) | (ref_b == minus_inf), top_b * scale, ref_b)

    s = bundle.zeros((ROWS,), tl.float64)
    for start in range(0, S, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        mask = inside[:, None] & (splits < S)[None, :]
        state = floats_ptr + (rows[:, None] * S + splits[None, :]) * WIDTH
        a = tl.load(state, mask=mask, other=minus_inf).to(tl.float64) * unit
        b = tl.load(state + 1, mask=mask, other=minus_inf).to(tl.float64) * unit
        part = ()
        state += HEADS
        for i in tl.static_range(len(s)):
            if (SUMS >> i) & 1:
                part = part + (tl.load(state, mask=mask, other=0.0).to(tl.float64),)
                state += 1
            else:
                part = part + (tl.zeros((ROWS, SPLITS), tl.float64),)
        moves = lib.moves(a, ref_a[:, None], b, ref_b[:, None], 1.0, tl.float64)
        x = moves.t if PRECISE else moves.db - moves.da
        part = lib.rebase(bundle.Sums(*part), moves, x, tl.float64, SUMS, OTHER)
        s = bundle.add_columns(s, part, SUMS)

    nan = float("nan")
    inf = float("inf")
    only_a = counts[0] > 0
    only_b = counts[1] > 0
    one_sided = only_a | only_b
    broken_a = (counts[2] > 0) | (tl.abs(top_a) == inf)
    broken_b = (counts[3] > 0) | (tl.abs(top_b) == inf)
    broken = broken_a | broken_b

    w0 = s.W0
    v0 = s.V0
    ln_w0 = tl.log(w0)
    ln_v0 = tl.log(v0)
    w1 = s.W1 / w0
    v1 = s.V1 / v0
    c = tl.log(v0 / w0)
    kl_pq = c - w1 * nats
    kl_qp = v1 * nats - c
    if PRECISE:
        # The φ sums keep a small divergence. Where the masses differ much they would cancel, and
        # where references moved far (a KL above 1 then) they have cancelled already.
        mean = s.A / w0
        bend = log1p(mean)
        alike = (tl.abs(mean) < 0.5) & (kl_pq < 1.0) & (kl_qp < 1.0)
        kl_pq = tl.where(alike, s.Fp / w0 - (mean - bend), kl_pq)
        kl_qp = tl.where(alike, s.Fq / v0 + mean / (1.0 + mean) - bend, kl_qp)
    kl_pq = tl.where(only_b, inf, _at_least_0(kl_pq))
    kl_qp = tl.where(only_a, inf, _at_least_0(kl_qp))
    square = nats * nats
    var_p = tl.where(only_b, inf, _at_least_0(s.W2 / w0 - w1 * w1)) * square
    if OTHER:
        var = tl.where(only_a, inf, _at_least_0(s.V2 / v0 - v1 * v1)) * square
        q0 = s.S0
        lost = only_a
    else:
        var = var_p
        q0 = s.R0
        lost = only_b
    q1 = s.Q1 / q0
    var_q = tl.where(lost, inf, _at_least_0(s.Q2 / q0 - q1 * q1)) * square
    cos_p = tl.minimum(s.C0 / tl.sqrt(s.R0 * s.S0), 1.0)
    apart = _at_least_0(s.P2 - s.Pw * s.Pw / s.R0)
    # The residual v−w is worth its rounding where it is shorter than v; else 1−cos itself is.
    residual = apart / (s.S0 * (1.0 + cos_p))
    one_minus_cos_p = tl.where(s.P2 < s.S0, residual, 1.0 - cos_p)
    cos_z, one_minus_cos_z, alpha, orthogonal = angles(s.Z2, s.Zd, s.D2, s.ZZ, s.B2)
    # d = x + β − α: subtract the smaller mean's square.
    mean_x = s.U1 / s.n * (nats * t)
    mean_d = mean_x + (ref_b - ref_a) / scale
    from_x = s.U2 / s.n * (nats * t) * (nats * t) - mean_x * mean_x
    from_d = s.D2 / s.n - mean_d * mean_d
    uniform = _at_least_0(tl.where(tl.abs(mean_d) < tl.abs(mean_x), from_d, from_x))
    lse_a = ref_a / scale / t + ln_w0
    lse_b = ref_b / scale / t + ln_v0
    margin_a = top_a - second_a
    margin_b = top_b - second_b
    fields = (
        kl_pq,
        kl_qp,
        _at_least_0(ln_w0 - s.Wy / w0 * LN2),
        _at_least_0(ln_v0 - s.Vy / v0 * LN2),
        lse_a,
        lse_b,
        cos_p,
        one_minus_cos_p,
        tl.where(one_sided, nan, cos_z),
        tl.where(one_sided, nan, one_minus_cos_z),
        tl.where(one_sided, nan, alpha),
        tl.where(one_sided, nan, tl.abs(alpha)),
        tl.where(one_sided, nan, orthogonal),
        0.5 * var,
        0.5 * var_q,
        tl.where(one_sided, inf, uniform),
        tl.where(one_sided, inf, s.L1),
        tl.where(one_sided, inf, s.D2),
        margin_a,
        margin_b,
    )
    if LABELS:
        nll_a = lse_a - label_a / t
        nll_b = lse_b - label_b / t
        fields = fields + (nll_a, nll_b, tl.exp(-nll_b) - tl.exp(-nll_a))
    out = out_ptr + rows
    for i in tl.static_range(len(fields)):
        if (FIELDS >> i) & 1:
            tl.store(out, tl.where(broken, nan, fields[i]).to(tl.float32), mask=inside)
            out += N
    id_a = tl.where(broken_a, -1, id_a)
    id_b = tl.where(broken_b, -1, id_b)
    tl.store(out_ids_ptr + rows, id_a, mask=inside)
    tl.store(out_ids_ptr + N + rows, id_b, mask=inside)
    tie = (margin_a == 0.0) | (margin_b == 0.0)
    tl.store(flags_ptr + rows, (id_a != id_b) & ~broken, mask=inside)
    tl.store(flags_ptr + N + rows, tie & ~broken, mask=inside)
    # see closed_form.estimate_applies
    gap = kl_pq + kl_qp
    alike = (gap <= 2.0 * var + ROUNDING) & (var <= 2.0 * gap + ROUNDING)
    valid = (var <= 1.0) & (gap <= 1.0) & alike & ~one_sided & ~broken
    tl.store(flags_ptr + 2 * N + rows, valid, mask=inside)
    tl.store(flags_ptr + 3 * N + rows, broken, mask=inside)
    tl.store(norms_ptr + rows, ref_a / scale, mask=inside)
    tl.store(norms_ptr + N + rows, ref_b / scale, mask=inside)
    tl.store(norms_ptr + 2 * N + rows, ln_w0, mask=inside)
    tl.store(norms_ptr + 3 * N + rows, ln_v0, mask=inside)


@triton.jit
def _lead(top_ptr, second_ptr, id_ptr, mask, top, second, index):
    """Take a block of splits into the running maximum, runner-up and first index."""
    tops = tl.load(top_ptr, mask=mask, other=float("-inf")).to(tl.float64)
    seconds = tl.load(second_ptr, mask=mask, other=float("-inf")).to(tl.float64)
    ids = tl.load(id_ptr, mask=mask, other=9223372036854775807)
    best = tl.max(tops, 1)
    first = tl.min(tl.where(tops == best[:, None], ids, 9223372036854775807), 1)
    mine = (ids == first[:, None]) & (tops == best[:, None])
    runner_up = tl.max(tl.where(mine, seconds, tops), 1)
    wins = (best > top) | ((best == top) & (first < index))
    runner_up = tl.where(wins, tl.maximum(runner_up, top), tl.maximum(second, best))
    return tl.maximum(top, best), runner_up, tl.where(wins, first, index)


@triton.jit
def _at_least_0(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.constexpr_function
def _heads():
    """Numbers in a partial state before its sums."""
    return len(HEAD)


@triton.constexpr_function
def _width(sums):
    """Numbers in a partial state."""
    return len(HEAD) + sums.bit_count()


@functools.cache
def summed(options: PairOptions) -> int:
    """The constant SUMS of `bundle_triton`: the sums that a state holds for these options."""
    return bundle.wanted(options.sums(float32=True))


@dataclass(frozen=True, eq=False)
class State:
    """Partial sums of N rows in S splits.

    Attributes:
        floats: `(N, S, F)` float32: `HEAD`, then the sums that the options need.
        ids: `(N, S, 2)` int64, first ids of the largest logits.
        options: what was asked for.
    """

    floats: Tensor
    ids: Tensor
    options: PairOptions

    def natural(self) -> Tensor:
        """The splits in the units of `partial`: `(N, S, F)` float64."""
        options = self.options
        names = HEAD + bundle.bundle(summed(options))
        s = dict(zip(names, self.floats.double().unbind(-1), strict=True))
        logits = 1.0 / exponent_scale(options.temperature)  # per unit of an exponent
        unit = options.temperature if options.precise else logits  # of x
        reference = 1.0 if options.precise else logits
        zero = torch.zeros_like(s["W0"])
        found = {name: s.get(name, zero) for name in partial.SUM_FIELDS}
        squared = "S" if options.by_other else "R"
        found |= {name: logits * found[name] for name in ("Wy", "Vy")}
        for power, moments in enumerate((("W1", "V1", "U1"), ("W2", "V2", "U2")), 1):
            found |= {name: unit**power * found[name] for name in moments}
            found[f"{squared}{power}"] = unit**power * s.get(f"Q{power}", zero)
        found["held"] = zero  # known to the op
        found |= {"only_base": s["only_a"], "only_other": s["only_b"]}
        found |= {"alpha": reference * s["ref_a"], "beta": reference * s["ref_b"]}
        for index, (side, letter) in enumerate((("base", "a"), ("other", "b"))):
            broken = s[f"broken_{letter}"] > 0
            found[f"top_{side}"] = s[f"top_{letter}"].masked_fill(broken, math.nan)
            found[f"second_{side}"] = s[f"second_{letter}"]
            found[f"id_{side}"] = self.ids[..., index].double()
            found[f"label_{side}"] = s[f"label_{letter}"] if options.labels else zero
        return torch.stack([found[name] for name in partial.STATE_FIELDS], -1)

    def finish(self, design: str = "tile") -> tuple[list[Tensor], Tensor, Tensor]:
        """Merge the splits.

        Args:
            design: What summed them, one of `tuning.DESIGNS`.

        Returns:
            Floats, ids and flags as `layout` packs them (rows of the second pass left open); the
            norms `(4, N)` that this needs; and whether NaN or infinity spoils a row, `(N,)`.
        """
        packed, norms, call = self.merging(design)
        if self.ids.shape[0]:
            call.run()
        floats, ids, flags = packed
        return [floats, ids, flags[:3]], norms, flags[3]

    def merging(self, design: str) -> tuple[list[Tensor], Tensor, Launch]:
        """Floats, ids, flags (as the kernel has them) and norms, and the call that fills them."""
        rows, splits = self.ids.shape[:2]
        device = self.floats.device
        floats = torch.empty(len(self.options.floats), rows, dtype=torch.float32, device=device)
        ids = torch.empty(2, rows, dtype=torch.int64, device=device)
        flags = torch.empty(4, rows, dtype=torch.bool, device=device)
        norms = torch.empty(4, rows, dtype=torch.float64, device=device)
        config = tuning.merge_config(splits, design)
        early = design == "warp" and may_depend(device)
        return [floats, ids, flags], norms, merge(self, floats, ids, flags, norms, config, early)


def merge(
    state: State,
    floats: Tensor,
    ids: Tensor,
    flags: Tensor,
    norms: Tensor,
    config: tuning.MergeConfig,
    dependent: bool = False,
) -> Launch:
    """The call that turns partial sums into fields.

    dependent: start while the pass before it ends, and wait for its end then (`may_depend`).
    """
    rows, splits = state.ids.shape[:2]
    options = state.options
    high = _to_float32(options.temperature)
    return Launch(
        _pair_merge_kernel,
        (triton.cdiv(rows, config.rows),),
        (
            *(state.floats, state.ids, floats, ids, flags, norms),
            *(rows, splits, exponent_scale(options.temperature), high, options.temperature - high),
        ),
        {
            "SUMS": summed(options),
            "FIELDS": _bits(options.floats),
            "PRECISE": options.precise,
            "OTHER": options.by_other,
            "LABELS": options.labels,
            "ROWS": config.rows,
            "SPLITS": config.splits,
            "DEPENDENT": dependent,
        },
        num_warps=config.num_warps,
        num_stages=1,
        options={"launch_pdl": True} if dependent else None,
    )


def may_depend(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one that it waits for ends (capability 9.0).

    Elsewhere the merge is an ordinary launch after it.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return capability(device) >= (9, 0)


def empty_state(device: torch.device, rows: int, splits: int, options: PairOptions) -> State:
    """Room for the partial sums of `rows` rows in `splits` splits."""
    width = len(HEAD) + summed(options).bit_count()
    floats = torch.empty(rows, splits, width, dtype=torch.float32, device=device)
    ids = torch.empty(rows, splits, 2, dtype=torch.int64, device=device)
    return State(floats, ids, options)


def merge_states(states: Sequence[State]) -> State:
    """One state of all splits, in the given order; nothing is added up until `finish`."""
    return replace(
        states[0],
        floats=torch.cat([state.floats for state in states], 1),
        ids=torch.cat([state.ids for state in states], 1),
    )


def _bits(floats: Sequence[str]) -> int:
    """The constant FIELDS of the merge kernel."""
    order = result_rows.PAIR_FLOATS + result_rows.LABEL_FLOATS
    return sum(1 << i for i, name in enumerate(order) if name in floats)


def exponent_scale(temperature: float) -> float:
    """log2(e)/T rounded to float32, as a kernel argument is."""
    return _to_float32(math.log2(math.e) / temperature)


def _to_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def compile_cases() -> list[KernelCase]:
    """Many rows of one split, and one row of many; and by design "warp" as a dependent launch."""
    cases = []
    nvidia: tuple[Arch, ...] = (80, 89, 90)
    for level, weights, splits, design in (
        ("core", "base", 1, "tile"),
        ("core", "base", 64, "tile"),
        ("precise", "other", 1, "tile"),
        ("core", "base", 128, "warp"),
    ):
        options = PairOptions(level=level, weights=weights, labels=True)
        rows = 64
        state = empty_state(torch.device("meta"), rows, splits, options)
        launch = merge(
            state,
            meta((len(options.floats), rows), torch.float32),
            meta((2, rows), torch.int64),
            meta((4, rows), torch.bool),
            meta((4, rows), torch.float64),
            config := tuning.merge_config(splits, design),
            dependent=design == "warp",
        )
        cases.append(
            launch.case(
                f"pair_stats/merge/{level}/{splits}",
                opcodes=("DFMA", "v_fma_f64"),
                elements_per_iteration=config.rows * config.splits // config.num_warps,
                archs=(90,) if design == "warp" else (*nvidia, "gfx942"),
            )
        )
    return cases
