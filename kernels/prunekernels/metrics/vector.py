"""Angles between pairs of vectors such as hidden states (METRICS: `VectorStats`)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels import checks, runtime
from prunekernels.metrics import eager
from prunekernels.metrics.fields import VectorStats
from prunekernels.metrics.result_rows import VECTOR_FLOATS


@torch.library.custom_op("prunekernels::vector_stats", mutates_args=())
def _vector_stats_op(base: Tensor, other: Tensor, impl: str) -> Tensor:
    run = runtime.run("vector_stats", eager.vector_stats, (base, other), impl)
    return run(base, other)


@_vector_stats_op.register_fake
def _(base: Tensor, other: Tensor, impl: str) -> Tensor:
    rows = base.numel() // base.shape[-1]
    return base.new_empty(len(VECTOR_FLOATS), rows, dtype=torch.float32)


def vector_stats(base: Tensor, other: Tensor, *, impl: str = "auto") -> VectorStats:
    """Compare pairs of vectors: angle, and the part of the difference along and across the first.

    Its `cosine` is equivalent to `F.cosine_similarity(base.double(), other.double(), dim=-1)`
    without the copies; `one_minus_cosine` keeps the digits that subtracting it from 1 would lose.

    Args:
        base: `(…, D)` float32, bfloat16 or float16, any strides.
        other: vectors of the same shape, dtype and device.
        impl: "auto", "triton" or "eager".

    Returns:
        A `VectorStats` of `(…)` float32 tensors. Identical vectors give cosine exactly 1 and
        differences exactly 0; where base is zero and other is not, cosine is 0 and the ratios NaN.

    Raises:
        ValueError: for mismatched or unsupported tensors, or an `impl` that cannot run here.
    """
    checks.floats("vector_stats", base=base, other=other)
    checks.alike("vector_stats", base=base, other=other)
    runtime.check_impl(impl)
    packed = _vector_stats_op(base, other, impl)
    lead = base.shape[:-1]
    return VectorStats(
        **{name: row.reshape(lead) for name, row in zip(VECTOR_FLOATS, packed, strict=True)}
    )
