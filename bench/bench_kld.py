"""`prunekit kld`: the README's example, and what the command costs beyond the forward passes.

    python -m bench.bench_kld example --copies out/copies     kld.csv and its plot
    python -m bench.bench_kld cost                            kld_cost.csv
    python -m bench.bench_kld memory                          kld_memory.csv

`example` ranks copies of the embedded model (made by bench/kld_copies.py where they are missing) on
the built-in text. `cost` compares the model with its bfloat16 copy, both in memory, on `--timed`
scored positions: processor seconds of the whole command, of the passes alone (both models, whole
logits in float32, dropped at once), and of the command and `compare --kl-report` on one text in
strided windows, of as many positions. `memory` is that of the command line's process on
`--positions` positions, beyond what importing takes, with the model in a folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import prunekit as pk
from bench import kld_copies
from bench.bounds import RESULTS
from bench.result_rows import provenance, write_csv
from prunekit.divergence.loading import bytes_in_memory, fingerprint_of
from prunekit.divergence.two_models import kl_report
from prunekit.evaluation.items import load_heldout

ROOT = Path(__file__).parent.parent
COPIES = ("Q8_0", "Q4_0", "int8", "int4", "drop4")
IMAGE = ROOT / "docs" / "images" / "kld_against_size.png"
# What the memory probe runs, a command or "load" and a source: peaks of the process's own
# (anonymous) memory, and of that with the pages of files that it has mapped (weights, libraries),
# sampled.
PROBE = """
import json, sys, threading, time
import torch, transformers, prunekit.checkpoint, prunekit.divergence.run
from prunekit.cli import main
def run(arguments):
    if arguments[0] == "load":
        prunekit.checkpoint.load(arguments[1])
        return 0
    return main(arguments)
def held():
    with open("/proc/self/status") as file:
        found = {l.split(":")[0]: 1024 * int(l.split()[1]) for l in file if l.startswith("Rss")}
    return found["RssAnon"], found["RssAnon"] + found["RssFile"]
before, peak, done = held(), [0, 0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[:] = map(max, peak, held())
threading.Thread(target=watch, daemon=True).start()
status = run(sys.argv[1:])
done.set()
print(json.dumps({"status": status, "peaks": [p - b for p, b in zip(peak, before)]}))
"""


def example(options: argparse.Namespace) -> None:
    """Rank the copies; write the table's file and the plot."""
    paths = kld_copies.make(options.copies, list(COPIES))
    result = pk.kld("demo", [str(path) for path in paths], context=256, output=options.kept)
    told = result.to_dict()
    rows = []
    for row in told["candidates"]:
        if row["error"]:
            raise SystemExit(f"{row['name']} failed: {row['error']}")
        means = row["means"]
        rows.append(
            {
                "candidate": row["name"],
                **{name: row[name] for name in ("bytes_on_disk", "bytes_in_memory", "size")},
                "bits_per_weight": f"{row['bits_per_weight']:.4f}",
                **{
                    f"{name}_{end}": f"{means[name][end]:.8g}"
                    for name in ("kl", "same_top", "ppl_ratio")
                    for end in ("mean", "low", "high")
                },
                "kl_p99.9": f"{row['summary']['kl_p99.9']:.6g}",
                "positions": told["plan"]["positions"],
                "blocks": told["plan"]["blocks"],
                "context": told["plan"]["context"],
                "reference": told["reference"]["name"],
                **provenance(),
            }
        )
    write_csv(options.output, "kld.csv", rows)
    draw(rows, IMAGE)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL divergence against size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for row in rows:
        x, y = int(row["size"]) / 1e6, float(row["kl_mean"])
        ends = [[y - float(row["kl_low"])], [float(row["kl_high"]) - y]]
        axis.errorbar(x, y, yerr=ends, fmt="o", capsize=3)
        axis.annotate(row["candidate"], (x, y), xytext=(7, 4), textcoords="offset points")
    axis.set_yscale("log")
    axis.margins(x=0.16, y=0.12)
    axis.set_xlabel("size in MB (on disk; of a type: in memory)")
    axis.set_ylabel("mean KL from the original, nats")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    print(f"drawn: {path}", file=sys.stderr)


@torch.inference_mode()
def cost(options: argparse.Namespace) -> None:
    """Time against the passes alone and against `--kl-report`."""
    model, tokenizer = pk.load("demo")
    other, _ = pk.load("demo", dtype="bfloat16")
    other = other.float()  # the same speed, other numbers
    ids = tokenizer("\n\n".join([load_heldout()] * 30))["input_ids"]
    windows = -(-options.timed // 255)
    text = [tokenizer.decode(ids[: 512 * windows + 64])]
    read = tokenizer(text[0])["input_ids"]
    batches = [
        torch.tensor(
            [read[at : at + 512] for at in range(start, min(start + 1024, 512 * windows), 512)]
        )
        for start in range(0, 512 * windows, 1024)
    ]

    def passes() -> None:
        for each in (model, other):
            for batch in batches:
                each(input_ids=batch, use_cache=False).logits.float()

    def command(text: list[str] = text, kind: str = "llama.cpp") -> None:
        pk.kld(
            model,
            {"other": other},
            text,
            windows=kind,
            limit=windows,
            tokenizer=tokenizer,
            floor="none",
            progress=False,
        )

    def report() -> None:
        kl_report(model, other, tokenizer, read[: 255 * windows], batch_size=2, progress=False)

    def strided() -> None:
        command([tokenizer.decode(read[: 255 * windows])], "strided")

    def hashing() -> None:
        for each in (model, other):
            fingerprint_of(each)

    batch = batches[0][:, :64]
    model(input_ids=batch, use_cache=False)
    spent = {
        name: seconds(run)
        for name, run in (
            ("passes", passes),
            ("command", command),
            ("hashing", hashing),
            ("strided", strided),
            ("report", report),
        )
    }
    scored = 255 * windows
    beyond = spent["command"] / spent["passes"] - 1
    facts: dict[str, Any] = {
        "positions": scored,
        **{f"{name}_cpu_s": f"{value:.2f}" for name, value in spent.items()},
        "beyond_share": f"{beyond:.3f}",
    }
    write_csv(options.output, "kld_cost.csv", [{**facts, **provenance()}])
    print(json.dumps(facts, indent=1))


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of a call: other work on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def memory(options: argparse.Namespace) -> None:
    """Peaks of the command line's process on a long text, and the size of its cache.

    The model is a folder, which is read by mapping it, and so is a candidate of its size with
    other weights, beside the row of its bfloat16 copy. Loading the embedded GGUF file, which has to
    be unpacked, is measured beside it.
    """
    model, tokenizer = pk.load("demo")
    size = bytes_in_memory(model)
    with tempfile.TemporaryDirectory() as folder:
        file, source = Path(folder) / "text.txt", str(Path(folder) / "model")
        pk.save(model, tokenizer, source)
        with torch.no_grad():
            model.get_submodule("model.layers.0.mlp.down_proj").weight *= 1.1
        pk.save(model, tokenizer, f"{folder}/copy")
        del model
        limit = -(-options.positions // 255)
        file.write_text("\n\n".join([load_heldout()] * limit), encoding="utf-8")
        arguments = ["kld", source, f"{folder}/copy", "--text", str(file), "--limit", str(limit)]
        arguments.append("--quiet")
        own, resident = probed([*arguments, "--output", f"{folder}/out"])
        plan = json.loads((Path(folder) / "out" / "kld.json").read_text())["plan"]
        cache = sum(p.stat().st_size for p in Path(folder).glob("out/reference/rows-*"))
        gguf = probed(["load", "demo"])[0]
    allowed = size + 64e6
    facts = {
        "positions": plan["positions"],
        "model_bytes": size,
        "peak_bytes": own,
        "peak_resident_bytes": resident,
        "gguf_loading_peak_bytes": gguf,
        "peak_of_model_and_64mb": f"{own / allowed:.3f}",
        "resident_of_model_and_64mb": f"{resident / allowed:.3f}",
        "cache_of_states": f"{cache / (plan['positions'] * 576 * 4):.4f}",
    }
    write_csv(options.output, "kld_memory.csv", [{**facts, **provenance()}])
    print(json.dumps(facts, indent=1))


def probed(arguments: list[str]) -> tuple[int, int]:
    """Own and resident peak, in bytes beyond what importing takes, of one command."""
    found = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True
    )
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["status"] == 0, found.stderr
    own, resident = told["peaks"]
    return own, resident


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("example", "cost", "memory"))
    parser.add_argument("--copies", type=Path, default=Path("out/copies"))
    parser.add_argument("--kept", type=Path, default=Path("out/kld"), help="the example's result")
    parser.add_argument("--timed", type=int, default=4096, help="positions of the times")
    parser.add_argument("--positions", type=int, default=20000, help="of the memory's text")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    {"example": example, "cost": cost, "memory": memory}[options.what](options)


if __name__ == "__main__":
    main()
