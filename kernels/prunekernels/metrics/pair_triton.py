"""Pair statistics of logits by Triton: the passes over them, one after the other.

The first pass (`pair_tile_triton`, or `pair_warp_triton` by name) leaves partial sums of splits of
the vocabulary, which `merge_triton` adds in a fixed order and turns into the fields; "full" then
reads the logits a second time (`second_pass_triton`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.metrics import (
    merge_triton,
    partial,
    result_rows,
    second_pass_triton,
    top_tokens,
    tuning,
)
from prunekernels.metrics.fields import Layout, PairStats, pair_places
from prunekernels.metrics.merge_triton import State
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.pair_tile_triton import pair_tile_kernel
from prunekernels.metrics.pair_warp_triton import pair_warp_kernel
from prunekernels.metrics.prepared import Prepared
from prunekernels.metrics.rows import PairRows
from prunekernels.rows import take_rows
from prunekernels.runtime import capability


def first_pass(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    state: State,
    first_id: int,
    config: tuning.PairConfig,
    dependent: bool = False,
) -> Launch:
    """The call that fills `state` from `(…, V)` logits whose first column is `first_id`.

    dependent: the merge is launched early, and waits for the end of this ("warp" alone).
    """
    rows = PairRows(base, other)
    options = state.options
    constants: dict[str, Any] = {
        "SUMS": merge_triton.summed(options),
        "PRECISE": options.precise,
        "OTHER": options.by_other,
        "LABELS": labels is not None,
        "HALF": base.element_size() == 2,
        "ROW_TABLE": rows.starts is not None,
        "SHIFT": rows.shift,
        "PACKED": rows.packed,
        "PAIRED": rows.packed and config.warp == 32,
        "LANES": config.lanes,
        "UNITS": config.units,
    }
    if config.design == "warp":
        constants["DEPENDENT"] = dependent
    splits = state.ids.shape[1]
    return Launch(
        pair_warp_kernel if config.design == "warp" else pair_tile_kernel,
        (rows.count * splits,),
        (
            *(base, other, rows.starts, labels, state.floats, state.ids),
            *(rows.count, rows.width, splits, *rows.strides, first_id),
            *(merge_triton.exponent_scale(options.temperature), 1.0 / options.temperature),
        ),
        constants,
        num_warps=config.num_warps,
        num_stages=1,
        options={"maxnreg": config.registers} if config.registers else None,
    )


def partial_state(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    options: PairOptions,
    first_id: int = 0,
    splits: int | None = None,
    design: str = "tile",
) -> State:
    """Launch the first pass: partial states of `(…, V)` logits (arguments of `summing`)."""
    state, call = summing(base, other, labels, options, first_id, splits, design)
    if state.ids.shape[0]:
        call.run()
    return state


def summing(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    options: PairOptions,
    first_id: int = 0,
    splits: int | None = None,
    design: str = "tile",
) -> tuple[State, Launch]:
    """Room for the partial states of `(…, V)` logits, and the call that fills it.

    Args:
        base: logits.
        other: logits of the same shape.
        labels: ids of the actual tokens, or None.
        options: what is asked of them.
        first_id: id of the first column.
        splits: programs that share a row (None: as the table has it).
        design: one of `tuning.DESIGNS`.
    """
    vocab = base.shape[-1]
    count = base.numel() // vocab
    config = tuning.pair_config(
        count,
        vocab,
        base.element_size(),
        precise=options.precise,
        every=not options.fields,
        warp=32 if torch.version.hip is None else 64,
        capability=capability(base.device) if base.is_cuda else (9, 0),
        design=design,
    )
    if splits is None:
        columns = tuning.tile_columns(config, base.dtype == torch.bfloat16)
        splits = tuning.pair_splits(count, vocab, config, columns, tuning.multiprocessors(base))
    state = merge_triton.empty_state(base.device, count, splits, options)
    dependent = config.design == "warp" and merge_triton.may_depend(base.device)
    return state, first_pass(base, other, labels, state, first_id, config, dependent)


def pair_stats(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
    design: str = "tile",
) -> list[Tensor]:
    """Packed statistics of `(…, V)` logits (`eager.pair_stats` by Triton kernels).

    design: one of `tuning.DESIGNS`.
    """
    labels = None if labels is None else labels.reshape(-1)
    state = partial_state(base, other, labels, options, design=design)
    packed, norms, broken = state.finish(design)
    if asked := options.second_pass:
        second_pass_triton.second_pass(
            base, other, norms, broken, options.temperature, packed[0], asked, design
        )
    if subset is not None:
        few_a, few_b = (x.index_select(-1, subset) for x in (base, other))
        packed += pair_stats(few_a, few_b, None, None, options.of_subset, design)
    if options.topk:
        packed += _top_tokens(base, other, norms, broken, options)
    return packed


def pair_stats_by_warps(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
) -> list[Tensor]:
    """`pair_stats` by the kernels of design "warp"."""
    return pair_stats(base, other, labels, subset, options, "warp")


def prepared(base: Tensor, other: Tensor, options: PairOptions, impl: str) -> Prepared | None:
    """`pair_stats` of such tensors, ready to be launched; None for what takes more than launches.

    impl: "triton" or "triton_warp".
    """
    if options.topk or options.second_pass:
        return None
    design = "warp" if impl == "triton_warp" else "tile"
    state, first = summing(base, other, None, options, design=design)
    if first.arguments[2] is not None:  # a table of rows, which is a tensor of its own
        return None
    packed, _, merge = state.merging(design)
    places = pair_places(options)
    kept = sorted({block for block, _ in places.values()})
    layout = Layout(
        {name: (kept.index(block), row) for name, (block, row) in places.items()},
        tuple(places) if options.fields else PairStats.names(),
    )
    blocks = [packed[block] for block in kept]
    return Prepared((first, merge), (base, other), blocks, layout, PairStats)


def pair_state(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    offset: int,
    options: PairOptions,
    design: str = "tile",
) -> Tensor:
    """Mergeable state `(N, F)` of `(…, V)` logits (`eager.pair_state` by Triton)."""
    labels = None if labels is None else labels.reshape(-1)
    state = partial_state(base, other, labels, options, first_id=offset, design=design)
    return partial.merge(state.natural().transpose(0, 1), options.temperature)


def pair_state_by_warps(
    base: Tensor, other: Tensor, labels: Tensor | None, offset: int, options: PairOptions
) -> Tensor:
    """`pair_state` by the kernel of design "warp"."""
    return pair_state(base, other, labels, offset, options, "warp")


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
    """The pass over contiguous logits for what is asked most, by both kernels."""
    everything = (
        ("core", torch.bfloat16, "base"),
        ("core", torch.float32, "base"),
        ("core", torch.float16, "other"),
        ("precise", torch.bfloat16, "base"),
        ("precise", torch.float32, "other"),
    )
    few = (*((name, torch.bfloat16, "base") for name in LOOPS), ("kl", torch.float32, "base"))
    nvidia: tuple[tuple[Arch, ...], ...] = ((80,), (89,), (90,))
    cases = []
    for sums, dtype, weights in (*everything, *few):
        level = "precise" if sums.startswith("precise") else "core"
        fields = ",".join(LOOPS.get(sums, ()))
        options = PairOptions(level=level, weights=weights, fields=fields)
        for design in tuning.DESIGNS:
            prefix = "pair_stats" if design == "tile" else f"pair_stats/{design}"
            name = f"{prefix}/{sums}/{DTYPES[dtype]}/{weights}"
            cases += [_case(name, dtype, options, design, 32, archs) for archs in nvidia]
            if (sums, dtype, weights) in everything:
                cases.append(_case(name, dtype, options, design, 64, ("gfx942",)))
    return cases


#: Names of types in those of cases.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _case(
    name: str,
    dtype: torch.dtype,
    options: PairOptions,
    design: str,
    warp: int,
    archs: tuple[Arch, ...],
) -> KernelCase:
    """2048 rows of a large vocabulary."""
    shape = (2048, 152064)
    base, other = meta(shape, dtype), meta(shape, dtype)
    config = tuning.pair_config(
        *shape,
        dtype.itemsize,
        precise=options.precise,
        every=not options.fields,
        warp=warp,
        capability=(8, 0) if archs == (80,) else (9, 0),
        design=design,
    )
    state = merge_triton.empty_state(base.device, shape[0], 1, options)
    columns = tuning.tile_columns(config, base.dtype == torch.bfloat16)
    return first_pass(base, other, None, state, 0, config, dependent=archs == (90,)).case(
        name,
        opcodes=("MUFU.EX2", "v_exp_f32"),
        elements_per_iteration=columns // config.num_warps,
        per_iteration=("MUFU.EX2", 2 * columns // (32 * config.num_warps)),
        rare="DFMA",
        archs=archs,
    )
