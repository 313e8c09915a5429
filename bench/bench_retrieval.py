"""Retrieval with hidden states as attentions or MLPs are dropped, beside generation's perplexity.

    python -m bench.bench_retrieval

Drops the least important sublayers by the model's own calibration text, more and more of them,
and at each count searches the built-in collection (or --collection) with both poolings. Perplexity
of the built-in prose says what the same cuts do to generation. Writes
results/<cpu or gpu name>/retrieval.csv; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import csv
from pathlib import Path
from typing import Any

from bench.harness import RESULTS
from bench.result_rows import provenance, write_csv
from prunekit import checkpoint
from prunekit.data import calibration
from prunekit.data.calibration import Calibration
from prunekit.evaluation.items import load_heldout
from prunekit.evaluation.likelihood import perplexity
from prunekit.evaluation.retrieval.collection import load_collection
from prunekit.evaluation.retrieval.searching import Retrieval, retrieve_by
from prunekit.models.dropped import drop_sublayers_
from prunekit.pruning import Drop, drop_

NAME = "retrieval.csv"
MEASURES = ("ndcg@10", "recall@10", "mrr")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="what prunekit.load takes")
    parser.add_argument("--collection", help="a folder as BEIR has it (the built-in one)")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--samples", type=int, default=4, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--context", type=int, default=256, help="tokens per scored window")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and write all of it."""
    options = arguments()
    dense, tokenizer = checkpoint.load(options.model, device=options.device)
    collection = load_collection(options.collection)
    folder = options.output / ("cpu" if options.device is None else options.device)
    done = _done(folder / NAME)
    wanted = Calibration(samples=options.samples, length=options.length, seed=options.seed)
    tokens = calibration.tokens(wanted, dense)
    context = {
        "model": options.model,
        "collection": collection.name,
        "queries": len(collection.queries),
        "documents": len(collection.documents),
        "calibration": f"self {options.samples}x{options.length} seed {options.seed}",
        "context": options.context,
        **provenance(options.device),
    }
    before: dict[str, Retrieval] = {}

    def measured(unit: str, count: int, model: Any) -> list[dict[str, Any]]:
        prose = perplexity(model, tokenizer, load_heldout(), context=options.context)
        rows = []
        for pooling, found in retrieve_by(model, tokenizer, collection).items():
            before.setdefault(pooling, found)
            row = {"unit": unit, "dropped": count, "pooling": pooling, "perplexity": prose.value}
            for measure in MEASURES:
                level = found.interval(measure, seed=options.seed)
                change = before[pooling].change(found, measure, seed=options.seed)
                row |= {measure: level.mean, f"{measure}_low": level.low}
                row |= {f"{measure}_high": level.high, f"{measure}_change": change.mean}
                row |= {f"{measure}_change_low": change.low, f"{measure}_change_high": change.high}
            rows.append({**row, **context})
            print(unit, count, pooling, f"{row['ndcg@10']:.3f}", f"{prose.value:.1f}", flush=True)
        return rows

    rows = measured("dense", 0, dense)
    rankings: dict[str, list[int]] = {}
    for count in options.counts:
        for unit in ("attn", "mlp"):
            if (unit, str(count)) in done:
                rows += done[unit, str(count)]
                continue
            if unit not in rankings:
                rankings[unit] = _ranking(dense, unit, tokens)
            model = copy.deepcopy(dense)
            drop_sublayers_(model, **{unit: sorted(rankings[unit][:count])})
            rows += measured(unit, count, model)
            write_csv(options.output, NAME, rows)
    write_csv(options.output, NAME, rows)


def _done(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of an earlier run, by unit and count."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault((row["unit"], row["dropped"]), []).append(row)
    return found


def _ranking(dense: Any, unit: str, tokens: Any) -> list[int]:
    """Layers of the dense model, the least important sublayer first."""
    report = drop_(copy.deepcopy(dense), Drop(unit=unit, count=1), tokens)
    scores = {layer: s for layer, s in enumerate(report.scores[unit]) if s is not None}
    return sorted(scores, key=lambda layer: -scores[layer])


if __name__ == "__main__":
    main()
