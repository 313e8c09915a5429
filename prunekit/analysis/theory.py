"""Compares the predictions of second-order theory with the measured divergences.

With Δ the perturbation of a hidden state h and d that of its logits, to second order

    1 − cos(h, h+Δ) ≈ ‖Δ⊥‖²/2‖h‖²,   KL ≈ Var_p(d)/2T²,   1 − cos(p, q) ≈ Var_r(d)/2T², r ∝ p².

The logits' estimates hold while the standard deviation of d/T is small; `estimate_valid` says
where. The estimate of h has no such flag: it needs ‖Δ‖ ≪ ‖h‖.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.spaces import Weights


def theory(grid: MetricGrid, *, weights: Weights = "base", seed: int = 0) -> list[dict[str, Any]]:
    """Exact values beside their estimates, per layer and sublayer.

    Args:
        grid: A grid of the analysis; its axes "layer" and "sublayer", if it has them, are kept,
            and each prompt is averaged over the others.
        weights: The distribution that weighs the grid's estimates: with "base" the KL estimate
            belongs to KL(dense ‖ pruned), with "other" to KL(pruned ‖ dense).
        seed: Seed of the intervals' resampling.

    Returns:
        One row per space ("h", "p", "kl"), layer and sublayer with `exact` and `estimate` (each
        with `_low` and `_high`), `ratio` = mean estimate / mean exact (None where the exact value
        is 0), and `valid`, the share of states where the estimate is trusted (None for "h").
    """
    keep = tuple(axis for axis in ("layer", "sublayer") if axis in grid.axes)
    shape = tuple(len(grid.labels[axis]) for axis in keep)
    kl = "kl_dense_pruned" if weights == "base" else "kl_pruned_dense"
    rows: list[dict[str, Any]] = []
    for space, exact, estimate in (
        ("h", "h_one_minus_cosine", "h_one_minus_cosine_estimate"),
        ("p", "p_one_minus_cosine", "p_one_minus_cosine_estimate"),
        ("kl", kl, "kl_estimate"),
    ):
        columns: dict[str, Any] = {}
        for name, metric in (("exact", exact), ("estimate", estimate)):
            interval = grid.interval(metric, keep, seed=seed)
            columns |= {name: interval.mean, f"{name}_low": interval.low}
            columns |= {f"{name}_high": interval.high}
        with np.errstate(divide="ignore", invalid="ignore"):
            columns["ratio"] = np.asarray(columns["estimate"]) / np.asarray(columns["exact"])
        columns["valid"] = (
            grid.mean("estimate_valid", keep) if space != "h" else np.full(shape, np.nan)
        )
        for index in np.ndindex(*shape):
            place: dict[str, Any] = {
                axis: grid.labels[axis][i] for axis, i in zip(keep, index, strict=True)
            }
            numbers = {name: _finite(np.asarray(c)[index]) for name, c in columns.items()}
            rows.append({"space": space} | place | numbers)
    return rows


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
