"""Statistics over rows, as users of llama.cpp's `--kl-divergence` know them."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels.metrics.fields import PairStats

_PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 75.0, 90.0, 95.0, 99.0, 99.9)


def summarize(stats: PairStats) -> dict[str, float]:
    """Reduce the rows of a `PairStats` to the numbers that reports quote.

    KL is KL(base‖other), base being the unpruned model, as in llama.cpp. Percentiles interpolate
    linearly between rows. Standard errors treat rows as independent: for tokens of a few prompts,
    bootstrap over prompts instead.

    Args:
        stats: any leading shape; rows with NaN are counted and left out. Of a choice of `fields`
            (`kl_base_other` must be one), what they allow is reported.

    Returns:
        `rows`, `rows_nan`, `kl_mean`, `kl_mean_stderr`, `kl_median`, `kl_max`, `kl_min`, `kl_p…`
        (0.1 to 99.9); `kl_reverse_mean`; `same_top`, the share of rows with the same likeliest
        token; `estimate_valid`, the share where the second-order estimates apply. With labels:
        `prob_delta_mean`, `prob_delta_rms`, `prob_delta_max`, `prob_delta_min`, `prob_delta_p…`
        (of q−p at the label), `ln_ppl_base`, `ln_ppl_other`, `ln_ppl_ratio` (their difference)
        and `ppl_ratio`. A key with `_stderr` is the standard error of the one without;
        of one row it is NaN.

    Raises:
        ValueError: if no row is left.
    """
    kl = stats.kl_base_other.reshape(-1).double()
    fine = ~kl.isnan()
    if not bool(fine.any()):
        raise ValueError(
            f"summarize: no rows to summarize ({kl.numel()} rows, {int((~fine).sum())} NaN)"
        )

    def rows(values: Tensor | None) -> Tensor:
        assert values is not None
        return values.reshape(-1)[fine].double()

    kl = kl[fine]
    result = {"rows": float(kl.numel()), "rows_nan": float((~fine).sum())}
    result |= _spread("kl", kl)
    result["kl_mean_stderr"] = _stderr(kl)
    held = stats.as_dict()
    if "kl_other_base" in held:
        result["kl_reverse_mean"] = float(rows(stats.kl_other_base).mean())
    if "flipped" in held:
        same = 1.0 - rows(stats.flipped)
        result["same_top"], result["same_top_stderr"] = float(same.mean()), _stderr(same)
    if "estimate_valid" in held:
        result["estimate_valid"] = float(rows(stats.estimate_valid).mean())
    if "prob_delta" in held:
        delta = rows(stats.prob_delta)
        result |= _spread("prob_delta", delta)
        result["prob_delta_mean_stderr"] = _stderr(delta)
        rms = float(delta.square().mean().sqrt())
        result["prob_delta_rms"] = rms
        # of √m, by the derivative: that of m over 2√m
        result["prob_delta_rms_stderr"] = 0.5 * _stderr(delta.square()) / rms if rms else 0.0
    if "nll_base" in held and "nll_other" in held:
        base, other = float(rows(stats.nll_base).mean()), float(rows(stats.nll_other).mean())
        result["ln_ppl_base"], result["ln_ppl_other"] = base, other
        result["ln_ppl_ratio"] = other - base
        result["ln_ppl_ratio_stderr"] = _stderr(rows(stats.nll_other) - rows(stats.nll_base))
        result["ppl_ratio"] = float(torch.exp(torch.tensor(other - base, dtype=torch.float64)))
    return result


def _stderr(values: Tensor) -> float:
    """Standard error of the mean; NaN for a single value, which says nothing of its spread."""
    return float(values.std(correction=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def _spread(name: str, values: Tensor) -> dict[str, float]:
    ordered = values.sort().values
    found = {
        f"{name}_mean": float(values.mean()),
        f"{name}_median": _quantile(ordered, 0.5),
        f"{name}_min": float(ordered[0]),
        f"{name}_max": float(ordered[-1]),
    }
    for percent in _PERCENTILES:
        found[f"{name}_p{percent:g}"] = _quantile(ordered, percent / 100)
    return found


def _quantile(ordered: Tensor, fraction: float) -> float:
    """Linear interpolation (torch.quantile refuses more than 16 million values)."""
    position = fraction * (ordered.numel() - 1)
    low = int(position)
    left, right = ordered[low], ordered[min(low + 1, ordered.numel() - 1)]
    return float(left if left == right else left + (right - left) * (position - low))
