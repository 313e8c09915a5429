"""What gradients give back to a pruned model: local reconstruction, and recovery after it.

    python -m bench.bench_recovery --text c4.json --work out/recovery

Runs the cases that results/cpu/recovery.csv lacks, in order; each keeps its checkpoint in the work
folder, from where the cases that continue it start, and a journal, from which a killed run goes on.
Calibration is tokens of rows 0:200 of the text. Perplexity and KL(dense‖pruned) are measured on
rows 200:230, and on the built-in prose, which is another source.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.harness import RESULTS
from bench.result_rows import append_rows, device_name, provenance
from prunekit import checkpoint
from prunekit.data import calibration
from prunekit.data.text_files import read_file
from prunekit.divergence.recovery import Recovery, recover_
from prunekit.divergence.two_models import kl_report
from prunekit.evaluation.items import load_heldout
from prunekit.pruning import ADMM, Drop, Method, Reconstruction, drop_, journal, prune_

LENGTH = CONTEXT = 512  # tokens
SCORED = 16  # sequences that choose what is dropped


@dataclass(frozen=True)
class Run:
    """What a case works with.

    Attributes:
        model: Changed in place.
        tokenizer: Its tokenizer.
        tokens: (samples, length) of calibration.
        dense: What `prunekit.load` takes.
        dtype: Of the passes.
        journal: Of this case.
    """

    model: PreTrainedModel
    tokenizer: Any
    tokens: torch.Tensor
    dense: str
    dtype: torch.dtype | None
    journal: Path


def pruned(method: Method, reconstruct: Reconstruction | None = None) -> Callable[[Run], Any]:
    """Prune, and reconstruct if told."""

    def run(with_: Run) -> Any:
        report = prune_(
            with_.model,
            method,
            with_.tokens,
            calibration_dtype=with_.dtype,
            reconstruct=reconstruct,
            journal=with_.journal,
        )
        return report.to_dict()

    return run


def dropped(count: int) -> Callable[[Run], Any]:
    """Drop attentions."""

    def run(with_: Run) -> Any:
        drop = Drop("attn", count)
        tokens = with_.tokens[:SCORED]
        return drop_(with_.model, drop, tokens, calibration_dtype=with_.dtype).to_dict()

    return run


def recovered(recovery: Recovery) -> Callable[[Run], Any]:
    """Recover."""

    def run(with_: Run) -> Any:
        report = recover_(
            with_.model,
            with_.dense,
            with_.tokens,
            recovery=recovery,
            tokenizer=with_.tokenizer,
            calibration_dtype=with_.dtype,
            journal=with_.journal,
        )
        return report.to_dict()

    return run


def cases(
    local: Reconstruction, recovery: Recovery
) -> dict[str, tuple[Callable[[Run], Any], str | None]]:
    """By name: what is done, and the case that it continues."""
    fitted = "admm 2:4, reconstructed"
    return {
        "admm 2:4": (pruned(ADMM(pattern="2:4")), None),
        fitted: (pruned(ADMM(pattern="2:4"), local), None),
        f"{fitted}, recovered": (recovered(recovery), fitted),
        "admm 4:8, reconstructed": (pruned(ADMM(pattern="4:8"), local), None),
        "admm 50 %": (pruned(ADMM()), None),
        "admm 50 %, reconstructed": (pruned(ADMM(), local), None),
        "8 attentions dropped": (dropped(8), None),
        "8 attentions dropped, recovered": (recovered(recovery), "8 attentions dropped"),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="what prunekit.load takes")
    parser.add_argument("--text", required=True, help="a .txt, .jsonl, .json or .parquet file")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument(
        "--only", nargs="*", choices=cases(Reconstruction(), Recovery()), help="some of the cases"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--block-steps", type=int, default=Reconstruction.steps)
    parser.add_argument("--steps", type=int, default=Recovery.steps, help="of recovery")
    parser.add_argument("--tokens", type=int, default=Recovery.tokens, help="of recovery's updates")
    parser.add_argument("--lr", type=float, default=Recovery.lr, help="of recovery")
    parser.add_argument("--patience", type=int, default=Recovery.patience, help="of recovery")
    parser.add_argument("--dtype", default="bfloat16", help="of the calibration passes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="recovery.csv", help="of the file to write")
    return parser.parse_args()


def first_rows(texts: list[str], work: Path) -> str:
    """A file in the work folder of the texts that calibrate, the first 200."""
    path = work / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, texts[:200])), encoding="utf-8")
    return str(path)


def tokens_of(options: argparse.Namespace, model: Any, tokenizer: Any) -> torch.Tensor:
    """(samples, length) token ids of the first 200 rows."""
    source = first_rows(read_file(options.text), options.work)
    chosen = calibration.Calibration(source, options.samples, LENGTH)
    return calibration.tokens(chosen, model, tokenizer)


def measured(dense: Any, model: Any, tokenizer: Any, text: str) -> dict[str, float]:
    """Perplexity and mean KL on one text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = kl_report(dense, model, None, ids, context=CONTEXT, batch_size=2)
    return {
        "base": math.exp(found["ln_ppl_base"]),
        "perplexity": math.exp(found["ln_ppl_other"]),
        "kl": found["kl_mean"],
        "kl_stderr": found["kl_mean_stderr"],
    }


def folder_of(options: argparse.Namespace, name: str) -> Path:
    """Where a case's checkpoint is."""
    return Path(options.work / name.replace(" ", "_").replace("%", "pct").replace(",", ""))


def one(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The row of one case, whose checkpoint is then in the work folder."""
    recovery = Recovery(
        steps=options.steps, tokens=options.tokens, lr=options.lr, patience=options.patience
    )
    work, before = cases(Reconstruction(steps=options.block_steps), recovery)[name]
    folder = folder_of(options, name)
    source = options.model if before is None else str(folder_of(options, before))
    model, tokenizer = checkpoint.load(source)
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    tokens = tokens_of(options, model, tokenizer)
    record = journal.beside(folder)
    started, clock = time.monotonic(), time.process_time()
    report = work(Run(model, tokenizer, tokens, options.model, dtype, record))
    seconds, processor = time.monotonic() - started, time.process_time() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    checkpoint.save(model, tokenizer, folder, overwrite=True, report=report)
    dense, _ = checkpoint.load(options.model)
    c4 = measured(dense, model, tokenizer, "\n\n".join(read_file(options.text)[200:230]))
    prose = measured(dense, model, tokenizer, load_heldout())
    return {
        "case": name,
        "perplexity": f"{c4['perplexity']:.3f}",
        "kl": f"{c4['kl']:.5f}",
        "kl_stderr": f"{c4['kl_stderr']:.5f}",
        "prose_perplexity": f"{prose['perplexity']:.3f}",
        "prose_kl": f"{prose['kl']:.5f}",
        "prose_kl_stderr": f"{prose['kl_stderr']:.5f}",
        "dense_perplexity": f"{c4['base']:.3f}",
        "dense_prose_perplexity": f"{prose['base']:.3f}",
        "processor_s": f"{processor:.0f}",
        "elapsed_s": f"{seconds:.0f}",
        "peak_mb": f"{peak / 1e6:.0f}",
        "calibration": f"{Path(options.text).name} rows 0:200, {options.samples}x{LENGTH}",
        "passes": options.dtype,
        "settings": json.dumps(report.get("reconstruct") or report.get("recovery") or {}),
        "curve": json.dumps(report.get("curve") or []),
        "model": options.model,
        **provenance(),
    }


def main() -> None:
    """Run what is missing, a row at a time."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.output / device_name(torch.device("cpu")) / options.name
    for name in options.only or cases(Reconstruction(), Recovery()):
        row = one(options, name)
        append_rows(path, [row])
        journal.remove(journal.beside(folder_of(options, name)))
        print({key: row[key] for key in list(row)[:12]}, file=sys.stderr)


if __name__ == "__main__":
    main()
