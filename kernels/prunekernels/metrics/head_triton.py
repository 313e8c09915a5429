"""Pair statistics of logits that never exist (docs/metrics.md).

A program multiplies a block of base rows and the same block of other rows with one tile of the
head after another, so that the two accumulators share each tile that is read. What leaves the
program is a partial state per row; `merge_triton` turns those of all splits of the vocabulary into
the fields. Row blocks vary fastest over programs, so that a tile stays in the second-level cache
while all rows use it. The final norm is applied to the `(N, D)` states beforehand.

What needs the logits twice or by rank ("full", `topk`) goes through logits of a few rows at a
time, and so do shapes for which `tuning.head_fused` prefers it.
"""


# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="misc, var-annotated, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.metrics import merge_triton, pair_triton, split_triton, tuning
from prunekernels.metrics.eager import logit_blocks, rms_normalised
from prunekernels.metrics.merge_triton import State
from prunekernels.metrics.options import OutputHead, PairOptions
from prunekernels.metrics.sums import bundle_triton as bundle
from prunekernels.metrics.sums import triton as lib
from prunekernels.metrics.sums.elementwise_triton import tanh
from prunekernels.runtime import interpreting, on


@triton.jit(do_not_specialize=["N", "V", "S"])
def _head_pair_kernel(
    base_ptr,  # (N, D) normalised states of base
    other_ptr,  # (N, D) of other
    head_ptr,  # (V, D)
    other_head_ptr,  # (V, D), with TWO_HEADS
    bias_ptr,  # (V,), with BIAS
    labels_ptr,  # (N,) int64, with LABELS
    floats_ptr,  # (N, S, F) fp32: `split_triton.Head`, then the sums
    ids_ptr,  # (N, S, 2) int64
    N,
    V,
    S,
    D,
    stride_hv,
    stride_hd,
    stride_ov,
    stride_od,
    k,  # log2(e)/T
    inverse_t,  # 1/T
    logit_scale,
    softcap,
    SUMS: tl.constexpr,  # the sums that are wanted: see `bundle_triton`
    PRECISE: tl.constexpr,
    OTHER: tl.constexpr,
    TWO_HEADS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LABELS: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in fp32: operands of two dtypes, or interpreted
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    scale = lib.scales(k, inverse_t, PRECISE)
    minus_inf = float("-inf")
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    depth = tl.arange(0, BLOCK_D)
    tiles = tl.cdiv(V, BLOCK_V).to(tl.int64)
    first = (tiles * split // S).to(tl.int32)
    last = (tiles * (split + 1) // S).to(tl.int32)

    s = bundle.zeros((BLOCK_N,), tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    ref = lib.nowhere((BLOCK_N,), scale.unit, False)
    top_a = zero + minus_inf
    top_b = zero + minus_inf
    second_a = zero + minus_inf
    second_b = zero + minus_inf
    id_a = tl.zeros((BLOCK_N,), tl.int32)
    id_b = tl.zeros((BLOCK_N,), tl.int32)
    label_a = zero
    label_b = zero
    oddities = tl.zeros((BLOCK_N,), tl.int32)
    label = tl.zeros((BLOCK_N,), tl.int64) - 1
    if LABELS:
        label = tl.load(labels_ptr + rows, mask=inside, other=-1)
    for tile in range(first, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        real = columns < V
        wide = columns.to(tl.int64)
        a = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        b = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, D, BLOCK_D):
            at = start + depth
            deep = at < D
            mask = inside[:, None] & deep[None, :]
            ha = tl.load(base_ptr + rows[:, None] * D + at[None, :], mask=mask, other=0.0)
            hb = tl.load(other_ptr + rows[:, None] * D + at[None, :], mask=mask, other=0.0)
            mask = deep[:, None] & real[None, :]
            w = head_ptr + at[:, None] * stride_hd + wide[None, :] * stride_hv
            w = tl.load(w, mask=mask, other=0.0)
            if TWO_HEADS:
                u = other_head_ptr + at[:, None] * stride_od + wide[None, :] * stride_ov
                u = tl.load(u, mask=mask, other=0.0)
            else:
                u = w
            if UPCAST:
                ha = ha.to(tl.float32)
                hb = hb.to(tl.float32)
                w = w.to(tl.float32)
                u = u.to(tl.float32)
            a = tl.dot(ha, w, a, input_precision="ieee")
            b = tl.dot(hb, u, b, input_precision="ieee")
        if BIAS:
            bias = tl.load(bias_ptr + columns, mask=real, other=0.0).to(tl.float32)
            a += bias[None, :]
            b += bias[None, :]
        if SCALE:
            a *= logit_scale
            b *= logit_scale
        if CAP:
            a = softcap * tanh(a / softcap)
            b = softcap * tanh(b / softcap)

        bad_a = (a != a) | (a == float("inf"))
        bad_b = (b != b) | (b == float("inf"))
        a = tl.where(bad_a | ~real[None, :], minus_inf, a)
        b = tl.where(bad_b | ~real[None, :], minus_inf, b)
        if LABELS:
            mine = wide[None, :] == label[:, None]
            label_a += tl.sum(tl.where(mine, a, 0.0), 1)
            label_b += tl.sum(tl.where(mine, b, 0.0), 1)
        whole_a = a != minus_inf
        whole_b = b != minus_inf
        # Bits: −inf in base alone, in other alone, NaN or +inf in base, in other.
        bits = (whole_b & ~whole_a).to(tl.int32) | ((whole_a & ~whole_b).to(tl.int32) << 1)
        bits = bits | (bad_a.to(tl.int32) << 2) | (bad_b.to(tl.int32) << 3)
        bits = tl.where(real[None, :], bits, 0)
        oddities = oddities | tl.reduce(bits, 1, _either)

        best_a, at_a, next_a = _tile_lead(a, columns)
        best_b, at_b, next_b = _tile_lead(b, columns)
        found = columns[None, :] == at_a[:, None]
        at_top = tl.max(tl.where(found, b, minus_inf), 1)
        second_a = tl.where(best_a > top_a, tl.maximum(top_a, next_a), tl.maximum(second_a, best_a))
        second_b = tl.where(best_b > top_b, tl.maximum(top_b, next_b), tl.maximum(second_b, best_b))
        id_a = tl.where(best_a > top_a, at_a, id_a)
        id_b = tl.where(best_b > top_b, at_b, id_b)
        top_a = tl.maximum(top_a, best_a)
        top_b = tl.maximum(top_b, best_b)

        rises = best_a * scale.unit > ref.a
        new = lib.next_reference(ref, rises, best_a, at_top, top_b, scale, False)
        s = lib.move(s, ref, new, scale, tl.float32, SUMS, OTHER)
        ref = new
        column = lib.Reference(
            a=tl.where(ref.a == minus_inf, 0.0, ref.a)[:, None],
            b=tl.where(ref.b == minus_inf, 0.0, ref.b)[:, None],
            gap=lib.Gap(
                base=ref.gap.base[:, None],
                other=ref.gap.other[:, None],
                rest=ref.gap.rest[:, None],
            ),
        )
        terms = lib.accumulate_logits(bundle.filled(0.0), a, b, column, scale, SUMS, PRECISE, OTHER)
        s = bundle.add_columns(s, terms, SUMS)
    s = lib.to_states(s, ref, scale, SUMS, PRECISE, OTHER)

    head = split_triton.Head(
        ref_a=ref.a,
        ref_b=ref.b,
        top_a=top_a,
        top_b=top_b,
        second_a=second_a,
        second_b=second_b,
        label_a=label_a,
        label_b=label_b,
        only_a=(oddities & 1).to(tl.float32),
        only_b=((oddities >> 1) & 1).to(tl.float32),
        broken_a=((oddities >> 2) & 1).to(tl.float32),
        broken_b=((oddities >> 3) & 1).to(tl.float32),
    )
    split_triton.store_state(floats_ptr, rows * S + split, head, s, inside, SUMS)
    at = ids_ptr + (rows * S + split) * 2
    tl.store(at, id_a.to(tl.int64), mask=inside)
    tl.store(at + 1, id_b.to(tl.int64), mask=inside)


@triton.jit
def _either(left, right):
    return left | right


@triton.jit
def _tile_lead(z, columns):
    """Largest of each row, its first column, and the largest of the rest."""
    best = tl.max(z, 1)
    at = tl.min(tl.where(z == best[:, None], columns[None, :], 2147483647), 1)
    rest = tl.max(tl.where(columns[None, :] == at[:, None], float("-inf"), z), 1)
    return best, at, rest


@triton.jit(do_not_specialize=["V"])
def _copy_rows_kernel(
    same_ptr,  # (N,) bool: rows to copy
    from_ptr,  # (N, V) fp32
    to_ptr,  # (N, V) fp32
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(same_ptr + row):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = row * V + columns
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=columns < V), mask=columns < V)


def copy_equal_rows(same: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy the rows of `(N, V)` logits that a mask names; the others cost a byte each."""
    _copying(same, source, target).run()


def _copying(same: Tensor, source: Tensor, target: Tensor) -> Launch:
    rows, vocab = source.shape
    grid = (rows, triton.cdiv(vocab, 4096))
    return Launch(_copy_rows_kernel, grid, (same, source, target, vocab), {"BLOCK": 4096})


def partial_state(
    hidden: tuple[Tensor, Tensor],
    head: OutputHead,
    labels: Tensor | None,
    options: PairOptions,
    splits: int | None = None,
) -> State:
    """Launch the fused kernel on normalised, contiguous `(N, D)` states."""
    base, other = hidden
    weight, other_weight = head.weights
    bias, softcap, logit_scale = head.bias, head.softcap, head.logit_scale
    rows, width = base.shape
    vocab = weight.shape[0]
    mixed = not base.dtype == weight.dtype == other_weight.dtype
    capability = torch.cuda.get_device_capability(base.device) if base.is_cuda else (9, 0)
    config = tuning.head_config(
        rows, 4 if mixed else base.element_size(), options.precise, capability
    )
    if splits is None:
        splits = tuning.head_splits(rows, vocab, config)
    state = merge_triton.empty_state(base.device, rows, splits, options)
    if rows:
        with on(base):
            _head_pair_kernel[(triton.cdiv(rows, config.block_n) * splits,)](
                base,
                other,
                weight,
                other_weight,
                bias,
                labels,
                state.floats,
                state.ids,
                rows,
                vocab,
                splits,
                width,
                *weight.stride(),
                *other_weight.stride(),
                merge_triton.exponent_scale(options.temperature),
                1.0 / options.temperature,
                1.0 if logit_scale is None else float(logit_scale),
                1.0 if softcap is None else float(softcap),
                SUMS=merge_triton.summed(options),
                PRECISE=options.precise,
                OTHER=options.by_other,
                TWO_HEADS=other_weight is not weight,
                BIAS=bias is not None,
                SCALE=logit_scale is not None,
                CAP=softcap is not None,
                LABELS=labels is not None,
                UPCAST=mixed or interpreting(),
                BLOCK_N=config.block_n,
                BLOCK_V=config.block_v,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    return state


def head_pair_stats(
    base_hidden: Tensor,
    other_hidden: Tensor,
    head: OutputHead,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
) -> list[Tensor]:
    """Packed statistics of the logits of hidden states (`eager.head_pair_stats` by Triton)."""
    vocab, width = head.weight.shape
    rows = base_hidden.numel() // width
    labels = None if labels is None else labels.reshape(-1)
    if (
        options.second_pass
        or options.topk
        or not tuning.head_fused(rows, head.other_weight is None)
    ):
        parts = []
        for start, a, b in logit_blocks((base_hidden, other_hidden), head, copy_equal_rows):
            some = None if labels is None else labels[start : start + a.shape[0]]
            parts.append(pair_triton.pair_stats(a, b, some, subset, options))
        if parts:
            return [torch.cat(blocks, 1) for blocks in zip(*parts, strict=True)]
        none = head.weight.new_empty(0, vocab)
        return pair_triton.pair_stats(none, none, labels, subset, options)
    states = (
        rms_normalised(base_hidden.reshape(-1, width), head.norm_weight, head.norm_eps),
        rms_normalised(other_hidden.reshape(-1, width), head.norm_weight, head.norm_eps),
    )
    packed = partial_state(states, head, labels, options).finish()[0]
    if subset is not None:
        few = partial_state(states, head.only(subset), None, options.of_subset)
        packed += few.finish()[0]
    return packed


def compile_cases() -> list[KernelCase]:
    """One bfloat16 head and everything that models add to logits, as each architecture runs it."""
    pointers = ("base_ptr", "other_ptr", "head_ptr", "bias_ptr")
    cases = []
    for rows, level, arch, opcode in (
        (1024, "core", 80, "HMMA.16816.F32.BF16"),
        (1024, "core", 89, "HMMA.16816.F32.BF16"),
        (1024, "core", 90, "HGMMA"),
        (1024, "core", "gfx942", "v_mfma"),
        (1024, "precise", 90, "HMMA.16816.F32.BF16"),
        (8, "core", 90, "HMMA.16816.F32.BF16"),
    ):
        capability = (arch // 10, arch % 10) if isinstance(arch, int) else (9, 4)
        config = tuning.head_config(rows, 2, level == "precise", capability)
        signature = {
            **dict.fromkeys(pointers, "*bf16"),
            **{"labels_ptr": "*i64", "floats_ptr": "*fp32", "ids_ptr": "*i64"},
            **dict.fromkeys(("N", "V", "S", "D"), "i32"),
            "stride_hv": "i64",
            **dict.fromkeys(("k", "inverse_t", "logit_scale", "softcap"), "fp32"),
        }
        constants = {
            **{"other_head_ptr": None, "stride_hd": 1, "stride_ov": 1, "stride_od": 1},
            **{"PRECISE": level == "precise", "OTHER": False, "TWO_HEADS": False},
            **{"BIAS": True, "SCALE": True, "CAP": True, "LABELS": True, "UPCAST": False},
            "SUMS": merge_triton.summed(PairOptions(level=level, labels=True)),
            **{"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d},
        }
        cases.append(
            KernelCase(
                name=f"head_pair_stats/{level}/{rows}",
                kernel=_head_pair_kernel,
                signature=signature,
                constants=constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                divisible=[*(n for n in signature if n.endswith("_ptr")), "D", "stride_hv"],
                opcodes=(opcode,),
                # of the head, in the loop over depth
                elements_per_iteration=config.block_v * config.block_d // config.num_warps,
                archs=(arch,),
            )
        )
    logits = meta((64, 152064), torch.float32)
    copying = _copying(meta((64,), torch.bool), logits, logits)
    every: tuple[Arch, ...] = (80, 89, 90, "gfx942")
    opcodes = ("STG.E", "global_store_dword")  # rows of any length start anywhere
    cases.append(copying.case("head_pair_stats/copy_rows", opcodes=opcodes, archs=every))
    return cases
