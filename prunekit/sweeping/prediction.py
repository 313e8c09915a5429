"""Predict from single steps where a copy's text leaves the dense model's: no text is generated.

Greedy decoding leaves the dense text at the first step at which the copy's likeliest token is
another one. Over a text that both models read (`kld`'s), the share of such flips is counted by the
dense model's entropy: h(e), a hazard per step. Along its own answer the dense model's entropies
e₁, e₂, … are known, so the predicted probability that the answer is unchanged up to step t is
S(t) = Π_{s ≤ t} (1 − h(e_s)), as in a discrete-time survival model (Singer and Willett 1993,
"It's About Time", Journal of Educational Statistics 18). The copy itself writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunekit.analysis.grid import Array

#: Bounds of the bins of entropy, in nats.
BINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, np.inf)
#: Steps at which prediction and observation are compared.
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def flips_by_entropy(entropies: NDArray[Any], flipped: NDArray[Any]) -> dict[str, list[int]]:
    """Positions and flips in each bin of `BINS`, from rows of `kld`: (n,) nats and (n,) bools."""
    bins = _bin(np.asarray(entropies, np.float64))
    count = np.bincount(bins, minlength=len(BINS) - 1)
    flips = np.bincount(bins, np.asarray(flipped, np.float64), minlength=len(BINS) - 1)
    return {"positions": count.tolist(), "flips": flips.astype(int).tolist()}


def hazards(counted: Mapping[str, Sequence[int]]) -> Array:
    """h of each bin: (flips + ½) / (positions + 1), Jeffreys' estimate, so that no bin is empty."""
    positions = np.array(counted["positions"], np.float64)
    flips = np.array(counted["flips"], np.float64)
    found: Array = (flips + 0.5) / (positions + 1.0)
    return found


def survival(hazard: Array, paths: Sequence[Sequence[float]]) -> list[Array]:
    """Per answer S(t) after each of its steps.

    Args:
        hazard: h of each bin.
        paths: The dense model's entropy at each step of its answers, in nats.
    """
    binned = (_bin(np.array(path, np.float64)) for path in paths)
    return [np.asarray(np.cumprod(1.0 - hazard[bins]), np.float64) for bins in binned]


def predicted(
    counted: Mapping[str, Sequence[int]],
    paths: Sequence[Sequence[float]],
    first_divergence: Sequence[float | None],
) -> dict[str, Any]:
    """The prediction for one copy beside what happened.

    Args:
        counted: What `flips_by_entropy` returned.
        paths: The dense model's entropies along its answers.
        first_divergence: The step at which the copy's answer first differs; None if it does not.

    Returns:
        At each of `STEPS` that some answer reaches, the mean predicted and the observed share of
        the answers of at least that length that are unchanged so far, with their number; the same
        with one hazard for all entropies (`constant`); and the shares unchanged to the end.
    """
    whole = {name: [sum(values)] * len(BINS[1:]) for name, values in counted.items()}
    curves, flat = survival(hazards(counted), paths), survival(hazards(whole), paths)
    first = [np.inf if step is None else step for step in first_divergence]
    rows = []
    for step in STEPS:
        reach = [i for i, path in enumerate(paths) if len(path) >= step]
        if reach:
            rows.append(
                {
                    "step": step,
                    "n": len(reach),
                    "predicted": float(np.mean([curves[i][step - 1] for i in reach])),
                    "constant": float(np.mean([flat[i][step - 1] for i in reach])),
                    "observed": float(np.mean([first[i] >= step for i in reach])),
                }
            )
    ends = np.array([curve[-1] for curve in curves])
    return {
        "steps": rows,
        "predicted_same": float(ends.mean()),
        "observed_same": float(np.mean(np.isinf(first))),
    }


def calibration(found: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The errors of all points' predictions: mean absolute and signed, over points and steps.

    A step weighs by the answers that reach it, and points weigh alike; None without any.
    """
    if not found:
        return None

    def error(name: str, absolute: bool) -> float:
        means = []
        for one in found:
            gaps = np.array([row[name] - row["observed"] for row in one["steps"]])
            reach = [row["n"] for row in one["steps"]]
            means.append(float(np.average(np.abs(gaps) if absolute else gaps, weights=reach)))
        return float(np.mean(means))

    pairs = np.array(
        [(row["predicted"], row["observed"]) for one in found for row in one["steps"]], np.float64
    )
    varied = len(pairs) > 2 and bool(min(np.ptp(pairs[:, 0]), np.ptp(pairs[:, 1])) > 0)
    return {
        "points": len(found),
        "mean_absolute_error": error("predicted", True),
        "mean_error": error("predicted", False),
        "constant_mean_absolute_error": error("constant", True),
        "correlation": float(np.asarray(np.corrcoef(pairs.T))[0, 1]) if varied else float("nan"),
    }


def _bin(entropies: Array) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.clip(np.searchsorted(BINS, entropies, "right") - 1, 0, None)
    return np.minimum(found, len(BINS) - 2)
