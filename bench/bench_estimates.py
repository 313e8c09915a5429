"""Where the second-order estimate of KL may be used: rules for `estimate_valid`, tried on text.

    python -m bench.bench_estimates --text FILE --text-rows 200:206      minutes on two cores

Each pruning of the embedded model meets the dense model on the same positions, in float64. A rule
is judged by how many positions it calls valid, and how many of those have an estimate that is off
by more than a factor of 2. Results go to results/cpu/estimates.csv.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import prunekit as pk
from bench.bench_quality import rows as texts
from bench.harness import RESULTS, provenance
from bench.result_rows import write_csv

CALIBRATION = pk.Calibration(samples=8)
PRUNINGS: dict[str, Callable[[PreTrainedModel], object]] = {
    "4 attentions dropped": lambda model: pk.drop_(
        model, pk.Drop(unit="attn", count=4), CALIBRATION, progress=False
    ),
    "magnitude, 30 %": lambda model: pk.prune_(
        model, pk.Magnitude(sparsity=0.3), CALIBRATION, progress=False
    ),
    "wanda, 20 %": lambda model: pk.prune_(
        model, pk.Wanda(sparsity=0.2), CALIBRATION, progress=False
    ),
    "wanda, 50 %": lambda model: pk.prune_(
        model, pk.Wanda(sparsity=0.5), CALIBRATION, progress=False
    ),
    "wanda, 2:4": lambda model: pk.prune_(
        model, pk.Wanda(pattern="2:4"), CALIBRATION, progress=False
    ),
}
#: Rules by name, of Var under p, Var under q and J.
RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Var_p ≤ 1": lambda p, q, j: p <= 1,
    "Var_p, Var_q, J ≤ 1": lambda p, q, j: (p <= 1) & (q <= 1) & (j <= 1),
    "Var_p, J ≤ 1 and alike": lambda p, q, j: (
        (p <= 1) & (j <= 1) & (j <= 2 * p + 1e-5) & (p <= 2 * j + 1e-5)
    ),
}


@torch.no_grad()
def moments(dense: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor) -> Tensor:
    """(positions, 4) float64: KL(p‖q), KL(q‖p), Var of d under p and under q."""
    a, b = (model(ids).logits[0].double() for model in (dense, pruned))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    p, q, d = log_p.exp(), log_q.exp(), b - a

    def variance(weight: Tensor) -> Tensor:
        return (weight * d * d).sum(-1) - (weight * d).sum(-1) ** 2

    divergences = ((p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1))
    return torch.stack([*divergences, variance(p), variance(q)], -1)


def judged(pruning: str, found: Tensor) -> list[dict[str, Any]]:
    """A row per rule."""
    kl, reverse, var_p, var_q = found.unbind(-1)
    ratio = (var_p / 2 / kl).log().abs().exp()
    rows = []
    for rule, holds in RULES.items():
        valid = holds(var_p, var_q, kl + reverse)
        rows.append(
            {
                "pruning": pruning,
                "rule": rule,
                "positions": len(found),
                "kl_mean": f"{float(kl.mean()):.4g}",
                "valid": int(valid.sum()),
                "off_twofold": int((valid & (ratio > 2)).sum()),
                "worst_factor": f"{float(ratio[valid].max()):.3g}" if valid.any() else "",
            }
        )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", required=True, help=".json, .jsonl, .txt, .parquet")
    parser.add_argument("--text-rows", default="0:6", help="documents, as FIRST:END")
    parser.add_argument("--length", type=int, default=256, help="tokens per document")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    dense, tokenizer = pk.load("demo")
    ids = [
        tokenizer(text, return_tensors="pt").input_ids[:, : options.length]
        for text in texts(options.text, options.text_rows)
    ]
    rows = []
    for name, prune in PRUNINGS.items():
        pruned = copy.deepcopy(dense)
        prune(pruned)
        rows += judged(name, torch.cat([moments(dense, pruned, each) for each in ids]))
        print(f"{name}: {rows[-1]}", flush=True)
    write_csv(options.output, "estimates.csv", [row | provenance("cpu") for row in rows])


if __name__ == "__main__":
    main()
