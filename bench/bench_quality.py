"""Perplexity of a model pruned in several ways, on text that calibration did not see.

    python -m bench.bench_quality --calibration c4.json --text c4.json

Prints a table and writes results/<cpu or gpu name>/quality.csv. Without --calibration the
model writes its own calibration text; without --text the built-in held-out prose is scored.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS
from bench.result_rows import provenance, write_csv
from prunekit import checkpoint
from prunekit.data import calibration
from prunekit.data.text_files import read_file
from prunekit.evaluation.items import load_heldout
from prunekit.evaluation.likelihood import perplexity
from prunekit.pruning import Magnitude, Method, SparseGPT, Wanda, prune_

METHODS: dict[str, Method | None] = {
    "dense": None,
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "wanda variant": Wanda(variant=True),
    "sparsegpt": SparseGPT(),
    "magnitude 4:8": Magnitude(pattern="4:8"),
    "wanda 4:8": Wanda(pattern="4:8"),
    "sparsegpt 4:8": SparseGPT(pattern="4:8"),
    "magnitude 2:4": Magnitude(pattern="2:4"),
    "wanda 2:4": Wanda(pattern="2:4"),
    "sparsegpt 2:4": SparseGPT(pattern="2:4"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="what prunekit.load takes")
    parser.add_argument("--calibration", help="a .txt, .jsonl, .json or .parquet file")
    parser.add_argument("--text", help="held-out text: a file of the same kinds")
    parser.add_argument("--calibration-rows", default="0:200", help="rows of the file, from:to")
    parser.add_argument("--text-rows", default="200:300", help="rows of the file, from:to")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=512, help="tokens per scored window")
    parser.add_argument("--device", default=None)
    parser.add_argument("--only", nargs="*", choices=METHODS, help="some of the methods")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="quality.csv", help="of the file to write")
    return parser.parse_args()


def rows(path: str, span: str) -> list[str]:
    """The texts of rows from:to of a file."""
    first, _, last = span.partition(":")
    return read_file(path)[int(first) : int(last) if last else None]


def calibration_tokens(options: argparse.Namespace, model: Any, tokenizer: Any) -> torch.Tensor:
    """(samples, length) token ids."""
    sizes = {"samples": options.samples, "length": options.length, "seed": options.seed}
    if options.calibration is None:
        return calibration.tokens(calibration.Calibration(**sizes), model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        texts = rows(options.calibration, options.calibration_rows)
        path.write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
        chosen = calibration.Calibration(source=str(path), **sizes)
        return calibration.tokens(chosen, model, tokenizer)


def main() -> None:
    """Prune, score, print, write."""
    options = arguments()
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = calibration_tokens(options, model, tokenizer)
    if options.text is None:
        held_out = load_heldout()
    else:
        held_out = "\n\n".join(rows(options.text, options.text_rows))
    scored = tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"]
    found = []
    for name, method in METHODS.items():
        if options.only and name not in options.only:
            continue
        model.load_state_dict(dense)
        needed = tokens if method is not None and method.calibrated else None
        report = None if method is None else prune_(model, method, needed)
        result = perplexity(model, None, scored, context=options.context, progress=True)
        found.append(
            {
                "method": name.split()[0] + (" variant" if "variant" in name else ""),
                "pattern": "" if method is None else method.pattern,
                "sparsity": "" if report is None else f"{report.sparsity:.6f}",
                "perplexity": f"{result.value:.3f}",
                "scored_tokens": result.tokens,
            }
        )
        print(f"{name}: {result.value:.2f}", file=sys.stderr)
    write(options, found)


def write(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Print the table and write the CSV."""
    source = "self" if options.calibration is None else Path(options.calibration).name
    context = {
        "model": options.model,
        "calibration": f"{source} {options.samples}x{options.length} seed {options.seed}",
        "text": "built-in"
        if options.text is None
        else f"{Path(options.text).name} rows {options.text_rows}",
        "context": options.context,
        **provenance(options.device),
    }
    for row in found:
        print(f"{row['method']:14} {row['pattern']:13} {float(row['perplexity']):9.2f}")
    write_csv(options.output, options.name, [{**row, **context} for row in found])


if __name__ == "__main__":
    main()
