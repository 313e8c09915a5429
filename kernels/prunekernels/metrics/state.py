"""Partial statistics of pairs of logit rows, for vocabularies that are split over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.metrics import eager, partial
from prunekernels.metrics.fields import PairStats, unpack_pair
from prunekernels.metrics.options import PairOptions, checked_labels


@torch.library.custom_op("prunekernels::pair_state", mutates_args=())
def _pair_state_op(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    temperature: float,
    level: str,
    weights: str,
    offset: int,
    fields: str,
    impl: str,
) -> Tensor:
    options = PairOptions(temperature, 0, level, weights, fields, labels is not None)
    run = runtime.run("pair_state", eager.pair_state, (base, other), impl)
    state: Tensor = run(base, other, labels, offset, options)
    if labels is not None:
        here = labels.reshape(-1) - offset
        state[:, partial.STATE_FIELDS.index("held")] = (here >= 0) & (here < base.shape[-1])
    return state


@_pair_state_op.register_fake
def _(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    temperature: float,
    level: str,
    weights: str,
    offset: int,
    fields: str,
    impl: str,
) -> Tensor:
    rows = base.numel() // base.shape[-1]
    return base.new_empty(rows, len(partial.STATE_FIELDS), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class PairState:
    """What some columns of the vocabulary contribute to the statistics of pairs of logit rows.

    Between processes, exchange `data` alone (it has the same shape everywhere), for instance with
    `torch.distributed.all_gather`, and put it back with `with_data`.

    Attributes:
        data: `(…, F)` float64, one number per name of `prunekernels.metrics.partial.STATE_FIELDS`.
        temperature: T.
        level: "core" or "precise".
        weights: "base" or "other".
        labels: whether logits of labels are in it.
        fields: names of what it can report, with commas between them; "" for all.
    """

    data: Tensor
    temperature: float
    level: str
    weights: str
    labels: bool
    fields: str = ""

    def with_data(self, data: Tensor) -> PairState:
        """The same kind of state with another process's numbers."""
        return replace(self, data=data)

    def stats(self) -> PairStats:
        """Statistics of whole rows, once all columns have been merged into this state."""
        lead = self.data.shape[:-1]
        options = PairOptions(
            self.temperature, 0, self.level, self.weights, self.fields, self.labels
        )
        packed = partial.finish(self.data.reshape(-1, self.data.shape[-1]), options)
        return unpack_pair(packed, lead, options, False)


def pair_state(
    base: Tensor,
    other: Tensor,
    *,
    offset: int = 0,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    level: str = "core",
    weights: str = "base",
    fields: Sequence[str] | None = None,
    impl: str = "auto",
) -> PairState:
    """Read some columns of two rows of logits, each once, into a state that merges with others.

    `merge([pair_state(a[:, :k], b[:, :k]), pair_state(a[:, k:], b[:, k:], offset=k)]).stats()`
    equals `pair_stats(a, b)` up to the rounding of sums, however the vocabulary is split: in chunks
    on one device, or over processes that hold a shard of the output head each. Rows that are split
    over processes need no merging: put their results together with `PairStats.cat`.

    Not every statistic merges: level "full" needs the normalisers of the whole vocabulary before it
    can sum, and top tokens and subsets need logits of other shards.

    Args:
        base: `(…, V)` logits, float32, bfloat16 or float16, any strides.
        other: logits of the same shape, dtype and device.
        offset: id of the first column.
        temperature: T, a finite number above 0.
        labels: `(…)` int64 ids in the whole vocabulary, the same for every shard; each must be
            among the columns of one of them, else what depends on it is NaN.
        level: "core" or "precise", as in `pair_stats`.
        weights: "base" or "other", as in `pair_stats`.
        fields: names of the fields to report, as in `pair_stats`.
        impl: "auto", "triton", "eager", or "triton_warp": kernels of one warp to a row, which are
            not proven on hardware yet.

    Raises:
        ValueError: as `pair_stats`; for level "full" or a negative offset.
    """
    op = "pair_state"
    checks.floats(op, base=base, other=other)
    checks.alike(op, base=base, other=other)
    if level == "full":
        raise ValueError(f"{op}: level 'full' cannot be merged; use 'core' or 'precise'")
    if offset < 0:
        raise ValueError(f"{op}: offset must be an id from 0, got {offset}")
    runtime.check_impl(impl, "triton_warp")
    options = PairOptions.checked(
        op,
        base.shape[-1],
        labels=labels is not None,
        temperature=temperature,
        level=level,
        weights=weights,
        fields=fields,
    )
    labels = checked_labels(op, labels, base.shape[:-1], base.device)
    t, _, _, _, asked = options.scalars
    data = _pair_state_op(base, other, labels, t, level, weights, offset, asked, impl)
    data = data.reshape(*base.shape[:-1], data.shape[-1])
    return PairState(data, t, level, weights, options.labels, asked)


def merge(states: Sequence[PairState]) -> PairState:
    """One state of disjoint columns of the same rows; the order only matters to the last bits.

    Args:
        states: at least one, all of the same shape, temperature, level, weights and fields.

    Raises:
        ValueError: if there are none, or two of them differ in kind; the message names both values.
    """
    if not states:
        raise ValueError("merge: no states to merge; pass at least one")
    first = states[0]
    for state in states[1:]:
        for what in ("temperature", "level", "weights", "labels", "fields"):
            left, right = getattr(first, what), getattr(state, what)
            if left != right:
                if what == "fields":
                    left, right = left or "all of them", right or "all of them"
                raise ValueError(f"merge: states must have the same {what}, got {left} and {right}")
        if state.data.shape != first.data.shape:
            raise ValueError(
                "merge: states must be of the same rows, got shapes "
                f"{tuple(first.data.shape)} and {tuple(state.data.shape)}"
            )
    stacked = torch.stack([state.data for state in states])
    flat = stacked.reshape(len(states), -1, stacked.shape[-1])
    return first.with_data(partial.merge(flat, first.temperature).reshape(first.data.shape))
