"""Times pruning beyond the passes that calibration needs, beside the research code.

    python -m bench.bench_prune --text c4.json --research DIR --rounds 3 --quality
    python -m bench.bench_prune --text c4.json --memory
    python -m bench.bench_prune --text c4.json --research DIR --draws 4
    python -m bench.bench_prune --layer 8B [--research DIR]     one layer's shape, on a GPU

DIR is a checkout of CASE-Lab-UMD/Pruning-on-Representations; its own functions are called, on the
same model and tokens, in turns with prunekit's. Prints a table and writes prune.csv (or
prune_memory.csv, prune_draws.csv, or prune_layer.csv with the columns of the other benchmarks)
below results/. One pass is every layer run once over all samples; Wanda and SparseGPT need two,
drop scores one, magnitude none.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import prune_layer
from bench.harness import Session, add_options, say
from bench.research import pruning_functions
from bench.result_rows import provenance, write_csv
from prunekit import checkpoint
from prunekit.data import calibration
from prunekit.data.text_files import read_file
from prunekit.evaluation.likelihood import perplexity
from prunekit.models.architectures import Architecture
from prunekit.models.layouts import SUBLAYERS
from prunekit.pruning import Magnitude, Method, SparseGPT, Wanda, prune_
from prunekit.pruning.cosines import BLOCK, mean_cosines
from prunekit.pruning.stream import Stream
from prunekit.speed import timing

MEMORY = {
    "wanda": (Wanda(), {}),
    "sparsegpt": (SparseGPT(), {}),
    "sparsegpt, activations on disk": (SparseGPT(), {"offload": "disk"}),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--model", default="demo", help="what prunekit.load takes")
    parser.add_argument("--text", help="a .txt, .jsonl, .json or .parquet file to calibrate on")
    parser.add_argument(
        "--layer",
        choices=prune_layer.SHAPES,
        help="instead of a whole model: one layer of this shape, random 16-bit weights",
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, help="of prunekit (its default)")
    parser.add_argument(
        "--layers", type=int, help="only the model's first layers, for a quick look"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count this process's time, not the clock's: on a busy machine, with one thread",
    )
    parser.add_argument("--only", nargs="*", help="some of the methods, beside the pass")
    parser.add_argument("--quality", action="store_true", help="also the perplexity it leaves")
    parser.add_argument("--scored", type=int, default=16384, help="tokens that are scored")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    parser.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="measure instead what SparseGPT leaves after N disjoint draws of calibration text",
    )
    parser.add_argument("--measured", help=argparse.SUPPRESS)  # one process of --memory
    options = parser.parse_args()
    if options.text is None and options.layer is None:
        parser.error("give --text FILE to calibrate on, or --layer for a layer's shape alone")
    if options.quick:
        options.layers, options.samples, options.length = options.layers or 2, 2, 64
        options.scored = 1024
    return options


class Bench:
    """The model, its dense weights, and the tokens that everything is run on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device = options.device
        self.model, tokenizer = checkpoint.load(options.model, dtype="float32", device=device)
        if options.layers:
            self.model.model.layers = self.model.model.layers[: options.layers]
        self.arch = Architecture(self.model)
        texts = read_file(options.text)
        split = 2 * len(texts) // 3  # scored on text that calibration does not see
        ids = [
            tokenizer("\n\n".join(part), add_special_tokens=False, verbose=False)["input_ids"]
            for part in (texts[:split], texts[split:])
        ]
        wanted = options.samples * options.length
        if len(ids[0]) < (options.draws or 1) * wanted:
            raise SystemExit(f"{options.text} calibrates with {len(ids[0])} tokens at most")
        self.pool = torch.tensor(ids[0]).to(device)
        self.draw(0)
        self.scored = ids[1][: options.scored]

    def draw(self, number: int) -> None:
        """Calibrate on the text's draw `number`."""
        wanted = self.options.samples * self.options.length
        drawn = self.pool[number * wanted : (number + 1) * wanted]
        self.tokens = drawn.view(self.options.samples, self.options.length)

    def batches(self) -> list[torch.Tensor]:
        """The calibration tokens as they run together."""
        return calibration.batches(self.tokens, self.options.batch_size, self.tokens.device)

    @torch.inference_mode()
    def passed(self) -> None:
        """One pass: every layer over all samples."""
        stream = Stream(self.arch, self.batches())
        for layer in range(len(self.arch.layers)):
            stream.advance(layer)

    def pruned(self, method: Method, **settings: Any) -> None:
        """Prune by prunekit."""
        tokens = self.tokens if method.calibrated else None
        settings = {"batch_size": self.options.batch_size, **settings}
        prune_(self.model, method, tokens, progress=False, **settings)

    def scored_parts(self, *units: str) -> None:
        """Drop scores by prunekit."""
        mean_cosines(self.arch, self.batches(), units, progress=False)

    def perplexity(self) -> float:
        """Of the model as it is, on held-out text."""
        found = perplexity(self.model, None, self.scored, context=self.options.length)
        return float(found.value)


def contenders(bench: Bench) -> dict[tuple[str, str], tuple[int, Callable[[], None]]]:
    """(method, provider): how many passes it needs, and what runs it."""
    bf16 = {"calibration_dtype": torch.bfloat16}
    found: dict[tuple[str, str], tuple[int, Callable[[], None]]] = {
        ("pass", "prunekit"): (1, bench.passed),
        ("magnitude", "prunekit"): (0, lambda: bench.pruned(Magnitude())),
        ("drop scores, block", "prunekit"): (1, lambda: bench.scored_parts(BLOCK)),
        ("drop scores, attn and mlp", "prunekit"): (1, lambda: bench.scored_parts(*SUBLAYERS)),
        ("wanda", "prunekit"): (2, lambda: bench.pruned(Wanda())),
        ("wanda, bfloat16", "prunekit"): (2, lambda: bench.pruned(Wanda(), **bf16)),
        ("wanda 2:4", "prunekit"): (2, lambda: bench.pruned(Wanda(pattern="2:4"))),
        ("sparsegpt", "prunekit"): (2, lambda: bench.pruned(SparseGPT())),
        ("sparsegpt, bfloat16", "prunekit"): (2, lambda: bench.pruned(SparseGPT(), **bf16)),
        ("sparsegpt 2:4", "prunekit"): (2, lambda: bench.pruned(SparseGPT(pattern="2:4"))),
    }
    if bench.options.research:
        for name, function in pruning_functions(
            bench.model, bench.tokens, bench.options.research
        ).items():
            found[name, "research"] = (2, function)
    if bench.options.only is None:
        return found
    wanted = {"pass", *bench.options.only}
    return {key: value for key, value in found.items() if key[0] in wanted}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every contender in turns; a row each."""
    bench = Bench(options)
    dense = {name: value.clone() for name, value in bench.model.state_dict().items()}
    every = contenders(bench)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in every}
    processor: dict[tuple[str, str], list[float]] = {key: [] for key in every}
    left: dict[tuple[str, str], float] = {}
    began, device = time.monotonic(), torch.device(options.device)
    for turn in range(options.rounds or (1 if options.quick else 3)):
        if turn and options.minutes and time.monotonic() - began > 60 * options.minutes:
            say(f"time is up after {turn} rounds")
            break
        for key, (_, function) in every.items():
            bench.model.load_state_dict(dense)
            start, busy = time.perf_counter(), time.process_time()
            function()
            timing.synchronize(device)
            seconds[key].append(time.perf_counter() - start)
            processor[key].append(time.process_time() - busy)
            took, worked = seconds[key][-1], processor[key][-1]
            passed = time.monotonic() - began
            say(f"[round {turn + 1}, {passed:.0f} s] {key}: {took:.2f} s, {worked:.2f} s busy")
            if options.quality and turn == 0:
                left[key] = bench.perplexity()
    clock = processor if options.processor_time else seconds
    one_pass = statistics.median(clock["pass", "prunekit"])
    rows = []
    for (method, provider), (passes, _) in every.items():
        median = statistics.median(clock[method, provider])
        needed = passes * one_pass
        rows.append(
            {
                "method": method,
                "provider": provider,
                "seconds": f"{median:.3f}",
                "least_seconds": f"{min(clock[method, provider]):.3f}",
                "clock": "processor" if options.processor_time else "wall",
                "passes_needed": passes,
                "of_passes": f"{median / needed:.3f}" if passes else "",
                "beyond_seconds": f"{median - needed:.3f}",
                "perplexity": f"{left[method, provider]:.3f}" if options.quality else "",
                "rounds": len(seconds[method, provider]),
            }
        )
    return rows


def measure_draws(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The perplexity that SparseGPT leaves on each draw, in turns; a row per draw and provider.

    Two batch sizes of prunekit differ by the order of float32 sums and nothing else: what lies
    between them is rounding.
    """
    bench = Bench(options)
    dense = {name: value.clone() for name, value in bench.model.state_dict().items()}
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for number in range(options.draws):
        if rows and options.minutes and time.monotonic() - began > 60 * options.minutes:
            say(f"time is up after {number} draws")
            break
        bench.draw(number)
        every: dict[str, Callable[[], None]] = {
            "prunekit": lambda: bench.pruned(SparseGPT()),
            "prunekit, 8 together": lambda: bench.pruned(SparseGPT(), batch_size=8),
        }
        if options.research:
            functions = pruning_functions(bench.model, bench.tokens, options.research)
            every["research"] = functions["sparsegpt"]
        for provider, function in every.items():
            bench.model.load_state_dict(dense)
            function()
            left = bench.perplexity()
            say(f"draw {number}, {provider}: {left:.3f}")
            rows.append({"draw": number, "provider": provider, "perplexity": f"{left:.4f}"})
    return rows


def status(field: str) -> int:
    """A memory field of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("--memory needs Linux's /proc")


def measure_one_memory(options: argparse.Namespace) -> None:
    """In a process of its own: print bytes of the model, of a block's sums, and of the peak."""
    bench = Bench(options)
    with torch.inference_mode():
        bench.model(bench.tokens[:1, :2])  # what libraries allocate on first use
    gc.collect()
    model = sum(parameter.nbytes for parameter in bench.model.parameters())
    refs = list(bench.arch.weights(0))
    method, settings = MEMORY[options.measured]
    widths = {ref.input_group: ref.matrix.shape[1] for ref in refs}
    hessian = isinstance(method, SparseGPT)
    sums = sum(4 * width * width if hessian else 8 * width for width in widths.values())
    # what loading has freed but glibc still holds would hide as much of what pruning takes
    ctypes.CDLL(None).malloc_trim(0)
    before = status("RssAnon")
    with Peak() as peak:
        bench.pruned(method, **settings)
    print(model, sums, peak.bytes - before)


class Peak(threading.Thread):
    """The most memory that this process allocated while it ran, looked at every millisecond.

    Linux's own high-water mark also counts pages of libraries, which come into memory with the
    first call of a function, and which an idle machine takes out again.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._stop_it = threading.Event()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_it.set()
        self.join()

    def run(self) -> None:
        """Look until it is over."""
        while not self._stop_it.wait(0.001):
            self.bytes = max(self.bytes, status("RssAnon"))


def measure_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per method, each measured in a fresh process."""
    rows = []
    for name in MEMORY:
        command = [sys.executable, "-m", "bench.bench_prune", *sys.argv[1:], "--measured", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        model, sums, added = map(int, done.stdout.split())
        rows.append(
            {
                "method": name,
                "model_bytes": model,
                "block_statistics_bytes": sums,
                "added_bytes": added,
                "peak_of_model_and_statistics": f"{(model + added) / (model + sums):.3f}",
            }
        )
    return rows


def main() -> int:
    """Measure, print, write; returns the process's exit status."""
    options = arguments()
    if options.layer is not None:
        session = Session.begin(options, "prune_layer.csv")
        if options.rounds is None:
            session.rounds = 2 if session.quick else 5
        shape = "tiny" if session.quick else options.layer
        return prune_layer.run(session, shape, options.research)
    if options.measured:
        measure_one_memory(options)
        return 0
    measurement, name = measure, "prune.csv"
    if options.memory:
        measurement, name = measure_memory, "prune_memory.csv"
    elif options.draws:
        measurement, name = measure_draws, "prune_draws.csv"
    rows = measurement(options)
    context = {
        "model": options.model,
        "layers": options.layers or "all",
        "text": Path(options.text).name,
        "samples": options.samples,
        "length": options.length,
        "batch_size": options.batch_size or "default",
        **provenance(options.device),
    }
    for row in rows:
        print("  ".join(f"{value!s:>10}" for value in row.values()))
    write_csv(options.output, name, [{**row, **context} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
