"""Angles between pairs of vectors such as hidden states (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.metrics import eager
from prunekernels.metrics.fields import VectorStats
from prunekernels.metrics.prepared import again, prepare
from prunekernels.metrics.result_rows import VECTOR_FLOATS, chosen


@torch.library.custom_op("prunekernels::vector_stats", mutates_args=())
def _vector_stats_op(base: Tensor, other: Tensor, impl: str, fields: str = "") -> Tensor:
    return _vector_stats(base, other, chosen(VECTOR_FLOATS, fields), impl)


def _vector_stats(base: Tensor, other: Tensor, fields: Sequence[str], impl: str) -> Tensor:
    run = runtime.run("vector_stats", eager.vector_stats, (base, other), impl)
    packed: Tensor = run(base, other, fields) if run is eager.vector_stats else run(base, other)
    return packed


@_vector_stats_op.register_fake
def _(base: Tensor, other: Tensor, impl: str, fields: str = "") -> Tensor:
    rows = base.numel() // base.shape[-1]
    return base.new_empty(len(VECTOR_FLOATS), rows, dtype=torch.float32)


def vector_stats(
    base: Tensor, other: Tensor, *, fields: Sequence[str] | None = None, impl: str = "auto"
) -> VectorStats:
    """Compare pairs of vectors: angle, and the part of the difference along and across the first.

    Its `cosine` is equivalent to `F.cosine_similarity(base.double(), other.double(), dim=-1)`
    without the copies; `one_minus_cosine` keeps the digits that subtracting it from 1 would lose.

    Args:
        base: `(…, D)` float32, bfloat16 or float16, any strides.
        other: vectors of the same shape, dtype and device.
        fields: names of the fields to report, None for all. On a CPU, the cosine alone takes
            three of the five sums. Other fields are then not there, and say so when asked.
        impl: "auto", "triton", "eager", or "triton_warp": kernels of one warp to a row, which are
            not proven on hardware yet.

    Returns:
        A `VectorStats` of `(…)` float32 tensors. Identical vectors give cosine exactly 1 and
        differences exactly 0; where base is zero and other is not, cosine is 0 and the ratios NaN.

    Raises:
        ValueError: for mismatched or unsupported tensors, unknown fields, or an `impl` that
            cannot run here.
    """
    if base is None or other is None:
        checks.given("vector_stats", base=base, other=other)
    if not (fields is None or type(fields) is tuple):
        fields = checks.names("vector_stats", fields)
    direct, key = runtime.plain(base, other), None
    if direct:
        key, known = again("vector_stats", base, other, fields, impl)
        if known is not None:
            found: VectorStats = known
            return found
    checks.floats("vector_stats", base=base, other=other)
    checks.alike("vector_stats", base=base, other=other)
    runtime.check_impl(impl, "triton_warp")
    names = checks.names("vector_stats", fields)
    asked = VECTOR_FLOATS if names is None else _checked_fields(names)
    if direct:
        packed = _vector_stats(base, other, asked, impl)

        def by_torch(base: Tensor, other: Tensor) -> VectorStats:
            return _named(eager.vector_stats(base, other, asked), base.shape[:-1], asked)

        prepare("vector_stats", key, base, other, asked, impl, by_torch)
    else:
        packed = _vector_stats_op(base, other, impl, ",".join(asked))
    return _named(packed, base.shape[:-1], asked)


def _named(packed: Tensor, lead: torch.Size, asked: Sequence[str]) -> VectorStats:
    rows = packed.view(len(VECTOR_FLOATS), *lead).unbind(0)
    named = dict(zip(VECTOR_FLOATS, rows, strict=True))
    return VectorStats.of({name: named[name] for name in asked})


def _checked_fields(fields: tuple[str, ...]) -> tuple[str, ...]:
    """The names in the order of a result."""
    for name in fields:
        if name not in VECTOR_FLOATS:
            raise ValueError(
                f"vector_stats: fields holds {name!r}, which is not one of "
                f"{', '.join(VECTOR_FLOATS)}"
            )
    return tuple(name for name in VECTOR_FLOATS if name in fields)
