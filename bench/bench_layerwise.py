"""Layerwise analysis of one prompt, against the research code's script if it is given.

    python -m bench.bench_layerwise [--research PATH]

One prompt, decoded to 60 tokens at temperature 0.5; every step × layer × sublayer is analysed over
the full vocabulary. "dropped" removes each sublayer of the dense model in turn, which is what the
research script's mode of that name measures; "pruned" replaces it by its magnitude 2:4 twin.
Loading is not timed, generation is. Writes results/<cpu or gpu name>/layerwise.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import research as research_code
from bench.harness import RESULTS
from bench.result_rows import provenance, write_csv
from prunekit import checkpoint
from prunekit.analysis.hierarchy import layerwise
from prunekit.models import generation
from prunekit.pruning import Magnitude, prune_

PROMPT = (
    "John has twice as many books as Mary. Together they have 18 books. "
    "How many books does John have?"
)  # the one prompt that is written into the research script
MODES = ("dropped", "pruned")
SCRIPT = "transition_layerwise_compare.py"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="what prunekit.load takes")
    parser.add_argument("--research", type=Path, help=f"a folder that holds {SCRIPT}")
    parser.add_argument("--mode", choices=MODES, nargs="*", default=list(MODES))
    parser.add_argument("--length", type=int, default=60, help="prompt and continuation, tokens")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument(
        "--level",
        choices=("core", "precise", "full"),
        default="core",
        help="core sums in float32, as the research script does",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours (research: one)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def ours(options: argparse.Namespace, dense: Any, pruned: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds of generation + analysis, per repeat, and what was analysed."""
    seconds, parts = [], []
    for _ in range(options.repeats):
        start = time.perf_counter()
        encoded = generation.encode(tokenizer, [PROMPT], chat="never")
        rollouts = generation.generate(
            dense,
            encoded,
            max_new_tokens=options.length - len(encoded[0]),
            temperature=options.temperature,
            ends=[],
        )
        generated = time.perf_counter()
        grid = layerwise(
            dense, pruned, rollouts, temperature=options.temperature, level=options.level
        )
        seconds.append(time.perf_counter() - start)
        parts.append(generated - start)
    print(f"generation {np.median(parts):.2f} s of {np.median(seconds):.2f} s", file=sys.stderr)
    shape = " x ".join(f"{n} {axis}" for axis, n in zip(grid.axes, grid.shape, strict=True))
    return {"seconds": seconds, "shape": shape, "metrics": len(grid.metrics)}


def research(options: argparse.Namespace, mode: str, folders: dict[str, Path]) -> dict[str, Any]:
    """The same from the research script, in a subprocess, where it writes its logs."""
    command = ["--analysis_mode", mode, "--model_name", str(folders["dense"])]
    if mode == "pruned":
        command += ["--pruned_model_name", str(folders["pruned"])]
    command += ["--max_length", str(options.length), "--temperature", str(options.temperature)]
    script = research_code.find(options.research, SCRIPT)
    seconds, log = research_code.run_script(script, command, "log-cosine.txt")
    pairs = log.count("REAL_KL")
    return {"seconds": [seconds], "shape": f"{pairs} pairs", "metrics": ""}


def main() -> None:
    """Time both, print the ratio, write the table."""
    options = arguments()
    dense, tokenizer = checkpoint.load(options.model, device=options.device)
    pruned = copy.deepcopy(dense)
    prune_(pruned, Magnitude(pattern="2:4"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folders = {"dense": Path(folder) / "dense", "pruned": Path(folder) / "pruned"}
        if options.research is not None:
            checkpoint.save(dense, tokenizer, folders["dense"])
            checkpoint.save(pruned, tokenizer, folders["pruned"])
        for mode in options.mode:
            twin = None if mode == "dropped" else pruned
            found = {"prunekit": ours(options, dense, twin, tokenizer)}
            if options.research is not None:
                found["research"] = research(options, mode, folders)
            else:
                print("research code: absent (give --research)", file=sys.stderr)
            for provider, result in found.items():
                rows.append(row(options, mode, provider, result, dense))
            medians = {name: np.median(result["seconds"]) for name, result in found.items()}
            ratio = medians.get("research", np.nan) / medians["prunekit"]
            times = ", ".join(f"{name} {value:.2f} s" for name, value in medians.items())
            print(f"{mode}: {times}" + ("" if np.isnan(ratio) else f", {ratio:.1f}x"))
    write_csv(options.output, "layerwise.csv", rows)


def row(
    options: argparse.Namespace, mode: str, provider: str, result: dict[str, Any], dense: Any
) -> dict[str, Any]:
    """One line of the table."""
    low, middle, high = np.percentile(result["seconds"], [20, 50, 80])
    return {
        "op": "layerwise",
        "provider": provider,
        "mode": mode,
        "model": options.model,
        "level": options.level if provider == "prunekit" else "",
        "dtype": str(dense.dtype).removeprefix("torch."),
        "shape": result["shape"],
        "metrics": result["metrics"],
        "p20_ms": f"{1000 * low:.0f}",
        "p50_ms": f"{1000 * middle:.0f}",
        "p80_ms": f"{1000 * high:.0f}",
        "runs": len(result["seconds"]),
        **provenance(dense.device),
    }


if __name__ == "__main__":
    main()
