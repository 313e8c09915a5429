"""Perplexity and KLD of a model pruned in several ways, on text that calibration did not see.

    python -m bench.bench_quality --calibration c4.json --text c4.json

Prints a table and writes results/<cpu or gpu name>/quality.csv: a row as soon as it is measured, in
the place of an earlier row of the same method, calibration and text. Without --calibration the
model writes its own calibration text; without --text the built-in held-out prose is scored.
`kld` is the mean KL(dense‖pruned) in nats over the text's first windows, `seconds` the time of
pruning by the clock, which others on the machine lengthen, `processor_s` that of its threads
together, and `added_mb` the memory that it took beyond what the process held before (Linux).
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.bench_prune import Peak, status
from bench.harness import RESULTS
from bench.research import pruning_functions
from bench.result_rows import device_name, provenance
from prunekit import checkpoint
from prunekit.data import calibration
from prunekit.data.text_files import read_file
from prunekit.divergence.two_models import kl_report
from prunekit.evaluation.items import load_heldout
from prunekit.evaluation.likelihood import perplexity
from prunekit.models.architectures import Architecture
from prunekit.pruning import ADMM, OWL, RIA, Magnitude, Method, Recipe, SparseGPT, Wanda, prune_

METHODS: dict[str, Method | Recipe | None] = {
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
    "sparsegpt, refitted": SparseGPT(update="admm"),
    "sparsegpt, refitted 4:8": SparseGPT(pattern="4:8", update="admm"),
    "sparsegpt, refitted 2:4": SparseGPT(pattern="2:4", update="admm"),
    "wanda, refitted 2:4": Wanda(pattern="2:4", update="admm"),
    "ria, refitted 2:4": RIA(pattern="2:4", update="admm"),
    "ria, permuted, refitted 2:4": RIA(pattern="2:4", permute=True, update="admm"),
    "admm": ADMM(),
    "admm 8:16": ADMM(pattern="8:16"),
    "admm 4:8": ADMM(pattern="4:8"),
    "admm 2:4": ADMM(pattern="2:4"),
    "admm, 8 bits 2:4": ADMM(pattern="2:4", bits=8),
    "admm, 4 bits 2:4": ADMM(pattern="2:4", bits=4),
    "wanda 70%": Wanda(0.7),
    "wanda, owl 70%": Recipe({"*": Wanda(0.7)}, budget=OWL()),
    "wanda, owl 10 0.2 70%": Recipe({"*": Wanda(0.7)}, budget=OWL(10.0, 0.2)),
    "admm 70%": ADMM(0.7),
    "admm, owl 70%": Recipe({"*": ADMM(0.7)}, budget=OWL()),
    "admm, owl 10 0.2 70%": Recipe({"*": ADMM(0.7)}, budget=OWL(10.0, 0.2)),
}
#: The research code's own functions, which need --research.
THEIRS = {
    f"{name}, research code{pattern}": f"{name}{pattern}"
    for pattern in ("", " 2:4")
    for name in ("wanda", "sparsegpt")
}
KEY = ("method", "pattern", "sparsity", "model", "calibration", "text", "context")


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
    parser.add_argument("--kld-windows", type=int, default=8, help="of the text; 0: no KLD")
    parser.add_argument("--device", default=None)
    parser.add_argument("--calibration-dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--research", type=Path, help="the research code's checkout, beside ours")
    every = {**METHODS, **THEIRS}
    parser.add_argument("--only", nargs="*", choices=every, help="some of the methods")
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
    dense, tokenizer = checkpoint.load(options.model, device=options.device)
    tokens = calibration_tokens(options, dense, tokenizer)
    if options.text is None:
        held_out = load_heldout()
    else:
        held_out = "\n\n".join(rows(options.text, options.text_rows))
    scored = tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"]
    for name in (*METHODS, *(THEIRS if options.research else ())):
        if not options.only or name in options.only:
            row = measured(name, dense, tokens, scored, options)
            write_row(
                options.output
                / device_name(torch.device(options.device or "cpu")).replace(" ", "_")
                / options.name,
                row,
            )


def measured(
    name: str, dense: Any, tokens: torch.Tensor, scored: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    """Prune a copy of the model and compare it with the model."""
    model = copy.deepcopy(dense)
    facts: dict[str, Any] = {"sparsity": "", "seconds": "", "processor_s": "", "added_mb": ""}
    pattern = ""
    if name != "dense":
        held, start, busy = status("RssAnon"), time.perf_counter(), time.process_time()
        with Peak() as peak:
            pattern, sparsity = pruned(model, name, tokens, options)
        facts = {
            "sparsity": f"{sparsity:.6f}",
            "seconds": f"{time.perf_counter() - start:.0f}",
            "processor_s": f"{time.process_time() - busy:.0f}",
            "added_mb": f"{(peak.bytes - held) / 1e6:.0f}",
        }
    found = perplexity(model, None, scored, context=options.context, progress=True)
    apart = {"kl_mean": math.nan, "rows": 0.0}
    if options.kld_windows:
        sizes = {"context": options.context, "limit": options.kld_windows}
        apart = kl_report(dense, model, None, scored, **sizes, progress=True)
    row = {
        "method": name.removesuffix(f" {pattern}").removesuffix(" 70%"),
        "pattern": pattern,
        "sparsity": facts["sparsity"],
        "perplexity": f"{found.value:.3f}",
        "kld": f"{apart['kl_mean']:.4f}" if options.kld_windows else "",
        "seconds": facts["seconds"],
        "processor_s": facts["processor_s"],
        "added_mb": facts["added_mb"],
        "kld_tokens": int(apart["rows"]),
        "scored_tokens": found.tokens,
        **context(name, options),
    }
    print(
        f"{name:28} perplexity {float(row['perplexity']):8.2f}  KLD {row['kld'] or '–'}  "
        f"{row['seconds'] or 0:>5} s  {row['added_mb'] or 0:>5} MB",
        flush=True,
    )
    return row


def pruned(
    model: Any, name: str, tokens: torch.Tensor, options: argparse.Namespace
) -> tuple[str, float]:
    """Prune the model; returns the pattern and the share of its weights that is zero."""
    if name in THEIRS:
        theirs = THEIRS[name]
        pruning_functions(model, tokens, options.research)[theirs]()
        arch = Architecture(model)
        weights = [ref.matrix for layer in range(len(arch.layers)) for ref in arch.weights(layer)]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        pattern = theirs.partition(" ")[2] or "unstructured"
        return pattern, zeros / sum(weight.numel() for weight in weights)
    method = METHODS[name]
    assert method is not None
    dtype = options.calibration_dtype and getattr(torch, options.calibration_dtype)
    needed = tokens if method.calibrated else None
    report = prune_(model, method, needed, calibration_dtype=dtype)
    return Recipe.of(method).rules["*"].pattern, report.sparsity


def context(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """How a row was measured."""
    source = "self" if options.calibration is None else Path(options.calibration).name
    passes = f" {options.calibration_dtype}" if options.calibration_dtype else ""
    if name in THEIRS:
        passes = ""  # the research code's passes have the model's type
    text = f"{Path(options.text).name} rows {options.text_rows}" if options.text else "built-in"
    return {
        "model": options.model,
        "calibration": f"{source} {options.samples}x{options.length} seed {options.seed}{passes}",
        "text": text,
        "context": options.context,
        **provenance(options.device),
    }


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Put a row where the file has one of the same KEY, or at the end; whole or not at all."""
    plain = {name: str(value) for name, value in row.items()}
    lines: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    same = [all(line[part] == plain[part] for part in KEY) for line in lines]
    if True in same:
        lines[same.index(True)] = plain
    else:
        lines.append(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(plain), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    part.replace(path)


if __name__ == "__main__":
    main()
