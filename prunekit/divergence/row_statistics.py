"""What is reported of a comparison's rows: means with intervals, percentiles, by block and place.

Per scored position, with p the reference's and q the candidate's next-token distribution over the
whole (common) vocabulary at temperature 1, everything in nats:

| name                  | of                                                                    |
|-----------------------|-----------------------------------------------------------------------|
| `kl`                  | KL(p‖q) = Σ p ln(p/q)                                                 |
| `kl_reverse`          | KL(q‖p)                                                               |
| `js`                  | Jensen–Shannon divergence, ½KL(p‖m) + ½KL(q‖m), m = (p+q)/2           |
| `total_variation`     | ½ Σ |q−p|                                                             |
| `one_minus_cos_prob`  | 1 − cos(p, q)                                                         |
| `same_top`            | whether the likeliest token is the same                               |
| `overlap`             | share of the k likeliest tokens that both have                        |
| `prob_delta`          | Δp = q−p of the token that follows                                    |
| `nll_base/other`      | −ln p, −ln q of the token that follows                                |
| `entropy_base/other`  | H(p), H(q)                                                            |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prunekernels import PairStats, summarize

from prunekit.divergence.bootstrap import BlockBootstrap

# Field of PairStats -> name of the row's value.
FIELDS = {
    "kl_base_other": "kl",
    "kl_other_base": "kl_reverse",
    "js": "js",
    "total_variation": "total_variation",
    "one_minus_cos_prob": "one_minus_cos_prob",
    "nll_base": "nll_base",
    "nll_other": "nll_other",
    "prob_delta": "prob_delta",
    "entropy_base": "entropy_base",
    "entropy_other": "entropy_other",
    "flipped": "flipped",
}
ASKED = (*FIELDS, "argmax_base", "argmax_other")
MEANS = (
    "kl",
    "kl_reverse",
    "js",
    "total_variation",
    "one_minus_cos_prob",
    "same_top",
    "overlap",
    "prob_delta",
    "entropy_base",
    "entropy_other",
)
_PLACES = 32  # points of a per-position curve

Values = Mapping[str, NDArray[Any]]


def derived(values: Values) -> dict[str, NDArray[np.float64]]:
    """The columns that are averaged, float64."""
    found = {name: np.asarray(column, np.float64) for name, column in values.items()}
    found["same_top"] = 1.0 - found["flipped"]
    found["prob_delta_squared"] = np.square(found["prob_delta"])
    found["nll_delta"] = found["nll_other"] - found["nll_base"]
    return found


def described(values: Values, bootstrap: BlockBootstrap) -> dict[str, Any]:
    """The statistics of one candidate.

    Args:
        values: Per name of the table above an array (positions,).
        bootstrap: Resampling of the blocks of these positions.

    Returns:
        Every number of `prunekernels.summarize` (their standard errors take positions as
        independent); for each of `MEANS` {mean, low, high}; `prob_delta_rms`, `ppl_base`,
        `ppl_other`, `ppl_ratio` and `ln_ppl_ratio` with intervals too.
    """
    columns = derived(values)
    pairs = PairStats.of(
        {
            field: torch.from_numpy(np.asarray(values[name]))
            for field, name in FIELDS.items()
            if name in values
        }
    )
    told: dict[str, Any] = {"summary": summarize(pairs)}
    told["means"] = {name: bootstrap.interval(columns[name]) for name in MEANS if name in columns}
    rooted = bootstrap.interval(columns["prob_delta_squared"], np.sqrt)
    told["means"]["prob_delta_rms"] = rooted
    with np.errstate(over="ignore"):
        for name, column in (("base", "nll_base"), ("other", "nll_other"), ("ratio", "nll_delta")):
            told["means"][f"ppl_{name}"] = bootstrap.interval(columns[column], np.exp)
    told["means"]["ln_ppl_ratio"] = bootstrap.interval(columns["nll_delta"])
    return told


def percentiles(values: NDArray[Any], points: int = 200) -> list[tuple[float, float]]:
    """(share, value) of the sorted values: the curve of percentiles, dense at its upper end."""
    ordered = np.sort(np.asarray(values, np.float64))
    shares = 1.0 - np.logspace(0, -math.log10(max(len(ordered), 2)), points)
    found = np.quantile(ordered, shares)
    return [(float(share), float(value)) for share, value in zip(shares, found, strict=True)]


def by_place(
    kl: NDArray[Any], places: NDArray[np.int64], context: int
) -> list[tuple[float, float, int]]:
    """(index in the window, mean KL, positions) of runs of a window's scored tokens."""
    low = int(places.min())
    width = max(1, math.ceil((context - low) / _PLACES))
    slot = (places - low) // width
    counts = np.bincount(slot)
    sums = np.bincount(slot, np.asarray(kl, np.float64))
    return [
        (low + (index + 0.5) * width - 0.5, float(sums[index] / count), int(count))
        for index, count in enumerate(counts)
        if count
    ]
