"""The table of `prunekit compare --kl-report`, in the order that llama.cpp prints it."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, isnan
from typing import Any

from prunekit.report import terminal

_HIGH = ("p99.9", "p99", "p95", "p90", "p75")
_LOW = ("p25", "p10", "p5", "p1", "p0.1")


def kl_table(found: Mapping[str, float], names: tuple[str, str]) -> Any:
    """Tables of perplexity, KL and Δp from the dictionary that `analysis.kl_report` returns."""
    from rich.console import Group
    from rich.text import Text

    dense, pruned = names

    def error(key: str, scale: float = 1.0, digits: int = 6) -> str:
        value, spread = scale * found[key], scale * found[f"{key}_stderr"]
        return f"{value:.{digits}f}" + ("" if isnan(spread) else f" ± {spread:.{digits}f}")

    perplexity = [
        (f"PPL of {dense}", f"{exp(found['ln_ppl_base']):.4f}"),
        (f"PPL of {pruned}", f"{exp(found['ln_ppl_other']):.4f}"),
        ("ln(PPL ratio)", error("ln_ppl_ratio")),
        ("PPL ratio", f"{found['ppl_ratio']:.6f}"),
    ]
    kl = [("mean", error("kl_mean")), *_spread(found, "kl", 1.0, "")]
    delta = [
        ("mean", error("prob_delta_mean", 100, 3) + " %"),
        *_spread(found, "prob_delta", 100.0, " %"),
        ("RMS", error("prob_delta_rms", 100, 3) + " %"),
    ]
    same = [("same top token", error("same_top", 100, 3) + " %")]
    blank = Text()
    return Group(
        terminal.facts(f"Perplexity, {found['rows']:.0f} tokens", perplexity),
        blank,
        terminal.facts(f"KL({dense} ‖ {pruned}), nats", kl),
        blank,
        terminal.facts("Δp of the actual token, percentage points", delta),
        blank,
        terminal.facts("Agreement", same),
    )


def _spread(found: Mapping[str, float], key: str, scale: float, unit: str) -> list[tuple[str, str]]:
    shown = [("maximum", "max"), *((f"{p[1:]} %", p) for p in _HIGH), ("median", "median")]
    shown += [*((f"{p[1:]} %", p) for p in _LOW), ("minimum", "min")]
    return [(label, f"{scale * found[f'{key}_{name}']:.6f}{unit}") for label, name in shown]
