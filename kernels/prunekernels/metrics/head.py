"""Pair statistics of logits that are never materialised (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.metrics import eager
from prunekernels.metrics.fields import PairStats, packed_like, unpack_pair
from prunekernels.metrics.options import (
    OutputHead,
    PairOptions,
    checked_labels,
    checked_subset,
)


@torch.library.custom_op("prunekernels::head_pair_stats", mutates_args=())
def _head_pair_stats_op(
    base_hidden: Tensor,
    other_hidden: Tensor,
    head_weight: Tensor,
    other_head_weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    labels: Tensor | None,
    subset: Tensor | None,
    norm_eps: float,
    softcap: float | None,
    logit_scale: float | None,
    temperature: float,
    topk: int,
    level: str,
    weights: str,
    fields: str,
    impl: str,
) -> list[Tensor]:
    head = OutputHead(
        head_weight, other_head_weight, bias, norm_weight, norm_eps, softcap, logit_scale
    )
    options = PairOptions(temperature, topk, level, weights, fields, labels is not None)
    return _head_pair_stats(base_hidden, other_hidden, head, labels, subset, options, impl)


def _head_pair_stats(
    base_hidden: Tensor,
    other_hidden: Tensor,
    head: OutputHead,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
    impl: str,
) -> list[Tensor]:
    checks.token_ids("head_pair_stats", head.weight.shape[0], labels, subset)
    tensors = (base_hidden, other_hidden, head.weight)
    run = runtime.run("head_pair_stats", eager.head_pair_stats, tensors, impl)
    if base_hidden.is_meta:
        return packed_like(base_hidden, options, subset is not None)
    packed: list[Tensor] = run(base_hidden, other_hidden, head, labels, subset, options)
    return packed


@_head_pair_stats_op.register_fake
def _(
    base_hidden: Tensor,
    other_hidden: Tensor,
    head_weight: Tensor,
    other_head_weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    labels: Tensor | None,
    subset: Tensor | None,
    norm_eps: float,
    softcap: float | None,
    logit_scale: float | None,
    temperature: float,
    topk: int,
    level: str,
    weights: str,
    fields: str,
    impl: str,
) -> list[Tensor]:
    options = PairOptions(temperature, topk, level, weights, fields, labels is not None)
    return packed_like(base_hidden, options, subset is not None)


def head_pair_stats(
    base_hidden: Tensor,
    other_hidden: Tensor,
    head_weight: Tensor,
    *,
    other_head_weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    softcap: float | None = None,
    logit_scale: float | None = None,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    subset: Tensor | Sequence[int] | None = None,
    topk: int = 0,
    level: str = "core",
    weights: str = "base",
    fields: Sequence[str] | None = None,
    impl: str = "auto",
) -> PairStats:
    """Compare the logits that two hidden states lead to.

    Equivalent to `pair_stats(head(norm(base_hidden)).float(), head(norm(other_hidden)).float())`
    without materialising the logits: with head(h) = cap(scale·(h·Wᵀ + bias)) and cap(z) =
    softcap·tanh(z/softcap). The extra memory does not grow with the number of rows. Stack the
    hidden states of all layers of a step into one call: the head is then read once.

    Args:
        base_hidden: `(…, D)` hidden states, float32, bfloat16 or float16, any strides.
        other_hidden: hidden states of the same shape, dtype and device.
        head_weight: `(V, D)` output embedding. Products are summed in float32.
        other_head_weight: `(V, D)`, the head of `other_hidden` if it is another one.
        bias: `(V,)`, added to both.
        norm_weight: `(D,)`; applies `h·rsqrt(mean(h²)+norm_eps)·norm_weight` in float32 first and
            rounds to the states' dtype (for Gemma pass 1 + weight). None: the states already are
            what the head takes.
        norm_eps: ε of the norm.
        softcap: cap of the logits (Gemma 2), a number above 0, or None.
        logit_scale: factor of the logits (Cohere), or None; applied before the cap.
        temperature: T, a finite number above 0.
        labels: `(…)` int64 ids of the actual tokens.
        subset: distinct token ids.
        topk: how many of the likeliest tokens to report.
        level: "core", "precise" or "full", as in `pair_stats`.
        weights: "base" or "other", as in `pair_stats`.
        fields: names of the fields to report, as in `pair_stats`.
        impl: "auto", "triton" or "eager".

    Returns:
        A `PairStats` of `(…)` tensors. Identical hidden states (and one head) give divergences of
        exactly 0 and cosines of exactly 1.

    Raises:
        ValueError: as `pair_stats`, and for a head, bias or norm of the wrong shape or device.
    """
    op = "head_pair_stats"
    checks.given(op, base_hidden=base_hidden, other_hidden=other_hidden, head_weight=head_weight)
    checks.floats(
        op,
        base_hidden=base_hidden,
        other_hidden=other_hidden,
        head_weight=head_weight,
        other_head_weight=other_head_weight,
        bias=bias,
        norm_weight=norm_weight,
    )
    checks.alike(op, base_hidden=base_hidden, other_hidden=other_hidden)
    checks.same_device(
        op,
        base_hidden,
        head_weight=head_weight,
        other_head_weight=other_head_weight,
        bias=bias,
        norm_weight=norm_weight,
    )
    lead, width = base_hidden.shape[:-1], base_hidden.shape[-1]
    if head_weight.dim() != 2 or head_weight.shape[1] != width or head_weight.shape[0] == 0:
        raise ValueError(
            f"{op}: head_weight must be (V, {width}) for hidden states of width {width}, "
            f"got {tuple(head_weight.shape)}"
        )
    vocab = head_weight.shape[0]
    expected = (
        ("other_head_weight", other_head_weight, (vocab, width)),
        ("bias", bias, (vocab,)),
        ("norm_weight", norm_weight, (width,)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}")
    if softcap is not None:
        checks.positive(op, "softcap", softcap)
    if logit_scale is not None:
        checks.scale(op, "logit_scale", logit_scale)
    checks.positive(op, "norm_eps", norm_eps)
    runtime.check_impl(impl)
    options = PairOptions.checked(
        op,
        vocab,
        labels=labels is not None,
        temperature=temperature,
        topk=topk,
        level=level,
        weights=weights,
        fields=fields,
    )
    labels = checked_labels(op, labels, lead, base_hidden.device)
    subset = checked_subset(op, subset, base_hidden.device)
    head = OutputHead(
        head_weight, other_head_weight, bias, norm_weight, float(norm_eps), softcap, logit_scale
    )
    given = (base_hidden, other_hidden, *head.tensors)
    if runtime.plain(*given, labels, subset):
        packed = _head_pair_stats(base_hidden, other_hidden, head, labels, subset, options, impl)
    else:
        scalars = (head.norm_eps, softcap, logit_scale, *options.scalars)
        packed = _head_pair_stats_op(*given, labels, subset, *scalars, impl)
    return unpack_pair(packed, lead, options, subset is not None)
