"""Statistics of pairs of logit rows (docs/metrics.md, "Fields")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.metrics import eager
from prunekernels.metrics.fields import PairStats, packed_like, unpack_pair
from prunekernels.metrics.options import PairOptions, checked_labels, checked_subset
from prunekernels.metrics.prepared import again, prepare


@torch.library.custom_op("prunekernels::pair_stats", mutates_args=())
def _pair_stats_op(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    temperature: float,
    topk: int,
    level: str,
    weights: str,
    fields: str,
    impl: str,
) -> list[Tensor]:
    options = PairOptions(temperature, topk, level, weights, fields, labels is not None)
    return _pair_stats(base, other, labels, subset, options, impl)


def _pair_stats(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
    impl: str,
) -> list[Tensor]:
    checks.token_ids("pair_stats", base.shape[-1], labels, subset)
    run = runtime.run("pair_stats", eager.pair_stats, (base, other), impl)
    if base.is_meta:
        return packed_like(base, options, subset is not None)
    packed: list[Tensor] = run(base, other, labels, subset, options)
    return packed


@_pair_stats_op.register_fake
def _(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    temperature: float,
    topk: int,
    level: str,
    weights: str,
    fields: str,
    impl: str,
) -> list[Tensor]:
    options = PairOptions(temperature, topk, level, weights, fields, labels is not None)
    return packed_like(base, options, subset is not None)


def pair_stats(
    base: Tensor,
    other: Tensor,
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    subset: Tensor | Sequence[int] | None = None,
    topk: int = 0,
    level: str = "core",
    weights: str = "base",
    fields: Sequence[str] | None = None,
    impl: str = "auto",
) -> PairStats:
    """Compare two rows of logits in every way that pruning studies report, reading each once.

    Its first field is equivalent to `F.kl_div(log_softmax(other / T, -1), log_softmax(base / T,
    -1), log_target=True, reduction="none").sum(-1)` without materialising either softmax.

    Logits rounded to bfloat16 carry a KL of about 1e-3 of their own: pass float32 logits where
    smaller divergences matter.

    Args:
        base: `(…, V)` logits, float32, bfloat16 or float16, any strides.
        other: logits of the same shape, dtype and device.
        temperature: T, a finite number above 0, dividing both rows.
        labels: `(…)` int64 ids of the actual tokens; adds `nll_base`, `nll_other`, `prob_delta`.
        subset: distinct token ids, the same for all rows; adds `subset`, the same statistics of
            the softmax over those tokens (without labels and topk).
        topk: how many of the likeliest tokens of each row to report; 0 for none.
        level: "core" sums in float32: a KL is within about 1e-6 of the truth, so one below that
            is rounding (and never negative). "precise" keeps its digits down to KL 1e-7 and
            less. "full" is precise, and adds `js`, `total_variation` and `hellinger` (a second
            pass over the rows).
        weights: whose distribution, "base" or "other", weighs `kl_estimate` and
            `one_minus_cos_prob_estimate`.
        fields: names of the fields to report, None for all that `level` and `labels` give. Only the
            sums that they need are summed: the KLs, normalisers, NLLs, argmaxes and margins alone
            take four of eighteen. Other fields are then not there, and say so when asked.
        impl: "auto", "triton", "eager", or "triton_warp": kernels of one warp to a row, which are
            not proven on hardware yet.

    Returns:
        A `PairStats` of `(…)` tensors. Identical rows give divergences of exactly 0 and cosines
        of exactly 1.

    Raises:
        ValueError: for mismatched or unsupported tensors, an empty vocabulary, a temperature that
            is not above 0, token ids out of range or given twice, k above V, unknown fields, or
            an `impl` that cannot run here. The message names both values.
    """
    if base is None or other is None:
        checks.given("pair_stats", base=base, other=other)
    if not (fields is None or type(fields) is tuple):
        fields = checks.names("pair_stats", fields)
    key = None
    if labels is None and subset is None and runtime.plain(base, other):
        options_key = temperature, topk, level, weights, fields, impl
        key, known = again("pair_stats", base, other, options_key)
        if known is not None:
            found: PairStats = known
            return found
    checks.floats("pair_stats", base=base, other=other)
    checks.alike("pair_stats", base=base, other=other)
    lead, vocab = base.shape[:-1], base.shape[-1]
    runtime.check_impl(impl, "triton_warp")
    options = PairOptions.checked(
        "pair_stats",
        vocab,
        labels=labels is not None,
        temperature=temperature,
        topk=topk,
        level=level,
        weights=weights,
        fields=fields,
    )
    labels = checked_labels("pair_stats", labels, lead, base.device)
    subset = checked_subset("pair_stats", subset, base.device)
    if key is not None or runtime.plain(base, other, labels, subset):
        packed = _pair_stats(base, other, labels, subset, options, impl)
        if key is not None:

            def by_torch(base: Tensor, other: Tensor) -> PairStats:
                again = eager.pair_stats(base, other, None, None, options)
                return unpack_pair(again, lead, options, False)

            prepare("pair_stats", key, base, other, options, impl, by_torch)
    else:
        packed = _pair_stats_op(base, other, labels, subset, *options.scalars, impl)
    return unpack_pair(packed, lead, options, subset is not None)
