"""Mixes of compressed sublayers beside one choice for all of them, at equal bytes.

    python -m bench.bench_search --text c4.json --work out/search

Searches, with `prunekit search`'s means, within a share of the bytes. Calibration is tokens of rows
0:200 of the text; KL(dense‖mix) is searched on windows of the rows from 200 on, of which every
fourth is held out. Writes every named mix and the front to results/cpu/search.csv. A killed run
goes on from the work folder, and its time is then that of the last part.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from bench.bench_recovery import first_rows
from bench.harness import RESULTS
from bench.result_rows import provenance, write_csv
from prunekit import checkpoint
from prunekit.commands.search import made
from prunekit.data.calibration import Calibration
from prunekit.data.text_files import read_file
from prunekit.mixing.result import SearchResult
from prunekit.mixing.run import search


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo", help="what prunekit.load takes")
    parser.add_argument("--text", required=True, help="a .txt, .jsonl, .json or .parquet file")
    parser.add_argument("--work", type=Path, required=True, help="folder of the search")
    parser.add_argument("--choices", default="2:4,50%,2:4-int8,drop")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--bytes", type=float, default=0.75, help="of the dense model's")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--context", type=int, default=128, help="tokens of a window")
    parser.add_argument("--limit", type=int, default=24, help="windows")
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--offspring", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def found(options: argparse.Namespace) -> SearchResult:
    """What the search finds."""
    options.work.mkdir(parents=True, exist_ok=True)
    texts = read_file(options.text)
    calibrated = first_rows(texts, options.work)
    model, tokenizer = checkpoint.load(options.model, dtype=options.dtype)
    return search(
        model,
        tokenizer,
        made(options.choices, options.method),
        options.work / "search",
        bytes=options.bytes,
        text=texts[200:],
        context=options.context,
        limit=options.limit,
        generations=options.generations,
        offspring=options.offspring,
        calibration=Calibration(calibrated, options.samples, options.length),
    )


def main() -> None:
    """Search, and write what was found."""
    options = arguments()
    started, clock = time.monotonic(), time.process_time()
    result = found(options)
    facts = {
        "choices": options.choices,
        "method": options.method,
        "budget": result.budget,
        "calibration": f"{options.samples}x{options.length}",
        "windows": f"{options.limit}x{options.context}",
        "searched_windows": result.facts["searched_windows"],
        "generations": f"{options.generations}x{options.offspring}",
        "dtype": options.dtype,
        "processor_s": f"{time.process_time() - clock:.0f}",
        "elapsed_s": f"{time.monotonic() - started:.0f}",
        "model": options.model,
        **provenance(torch.device("cpu")),
    }
    front = set(result.front)
    rows = [
        {
            "name": point.name,
            "on_front": int(point in front),
            "bytes": point.bytes,
            "kl": f"{point.kl:.5f}",
            "kl_held_out": f"{point.held_out:.5f}",
            "mix": result.word(point),
            **facts,
        }
        for point in sorted(result.points, key=lambda point: point.bytes)
        if point.held_out is not None
    ]
    write_csv(options.output, "search.csv", rows)
    print(result.verdict())


if __name__ == "__main__":
    main()
