"""Draw the measured tables of README.md and of docs/ from the files under results/.

    python -m bench.readme            rewrite them between their markers
    python -m bench.readme --check    exit with 1 if one of them says something else

A block stands between `<!-- measured: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import quality_tables, summary, sweep_tables
from bench.bounds import RESULTS

ROOT = Path(__file__).parent.parent
DOCS = ("benchmarks", "pruning", "metrics", "kld", "sweep", "search", "retrieval", "sparse")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS))
CPU = RESULTS / "cpu"
H200 = RESULTS / "NVIDIA_H200"


def rows(name: str, folder: Path = CPU) -> list[dict[str, str]]:
    """The rows of a CSV of results."""
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duration(ms: float) -> str:
    """Milliseconds, or seconds from one on."""
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def retrieval() -> str:
    """nDCG@10 with both poolings as sublayers are dropped, beside the perplexity of prose."""
    if not (CPU / "retrieval.csv").is_file():
        return "Not measured on this version yet."
    names = {"dense": "nothing", "attn": "attentions", "mlp": "MLPs"}
    body = []
    order = {"dense": 0, "attn": 1, "mlp": 2}
    found = sorted(rows("retrieval.csv"), key=lambda r: (order[r["unit"]], int(r["dropped"])))
    for last in (row for row in found if row["pooling"] == "last"):
        mean = next(
            row
            for row in found
            if row["pooling"] == "mean"
            and (row["unit"], row["dropped"]) == (last["unit"], last["dropped"])
        )
        line = [f"{last['dropped']} {names[last['unit']]}" if last["dropped"] != "0" else "nothing"]
        for row in (last, mean):
            level, change = float(row["ndcg@10"]), float(row["ndcg@10_change"])
            ends = (float(row[f"ndcg@10_change_{end}"]) for end in ("low", "high"))
            low, high = ends
            moved = f" ({change:+.3f} [{low:+.3f}, {high:+.3f}])" if last["dropped"] != "0" else ""
            line.append(f"{level:.3f}{moved}")
        body.append([*line, f"{float(last['perplexity']):.1f}"])
    head = ["dropped", "nDCG@10, last token (change)", "nDCG@10, mean (change)", "perplexity"]
    return table(head, body)


def kld() -> str:
    """Copies of the embedded model ranked by their KL divergence from it."""
    if not (CPU / "kld.csv").is_file():
        return "Not measured on this version yet."

    def ends(row: dict[str, str], name: str, form: str) -> str:
        mean, low, high = (form.format(float(row[f"{name}_{end}"])) for end in ENDS)
        return f"{mean} [{low}, {high}]"

    body = [
        [
            row["candidate"],
            f"{int(row['size']) / 1e6:.0f} MB",
            f"{float(row['bits_per_weight']):.2f}",
            ends(row, "kl", "{:.3g}"),
            f"{float(row['kl_p99.9']):.3g}",
            f"{float(row['same_top_mean']):.1%}",
            ends(row, "ppl_ratio", "{:.3f}"),
        ]
        for row in rows("kld.csv")
    ]
    head = ["candidate", "size", "bits/weight", "mean KLD", "99.9 %", "same top", "PPL ratio"]
    return table(head, body)


def kld_cost() -> str:
    """What `prunekit kld` takes beyond the forward passes, and its memory."""
    body = []
    if (CPU / "kld_cost.csv").is_file():
        row = rows("kld_cost.csv")[0]
        body += [
            [
                f"forward passes of both models, {row['positions']} positions",
                f"{row['passes_cpu_s']} s",
            ],
            ["the whole command", f"{row['command_cpu_s']} s"],
            ["beyond the passes", f"{float(row['beyond_share']):.0%}"],
            ["of it, digests of both models' weights", f"{row['hashing_cpu_s']} s"],
            ["the command in strided windows, as many positions", f"{row['strided_cpu_s']} s"],
            ["`compare --kl-report` of the same windows", f"{row['report_cpu_s']} s"],
        ]
    if (CPU / "kld_memory.csv").is_file():
        held = rows("kld_memory.csv")[0]
        names = ("peak_bytes", "peak_resident_bytes", "gguf_loading_peak_bytes", "model_bytes")
        peak, resident, gguf, model = (int(held[name]) / 1e6 for name in names)
        body += [
            [f"peak of its own memory, {held['positions']} positions", f"{peak:.0f} MB"],
            [f"… of the model ({model:.0f} MB) and 64 MB", f"{held['peak_of_model_and_64mb']}×"],
            ["peak with the pages of mapped weights", f"{resident:.0f} MB"],
            ["… of the model and 64 MB", f"{held['resident_of_model_and_64mb']}×"],
            ["peak of loading the embedded GGUF file, alone", f"{gguf:.0f} MB"],
            ["cache, of positions × width × 4 bytes", f"{held['cache_of_states']}×"],
        ]
    if not body:
        return "Not measured on this version yet."
    return table(["processor time, one core; memory", ""], body)


def layerwise() -> str:
    """Seconds of the layerwise analysis beside the research script's."""
    found = {(row["mode"], row["provider"]): row for row in rows("layerwise.csv")}
    body = []
    for mode in ("dropped", "pruned"):
        ours, theirs = (float(found[mode, p]["p50_ms"]) / 1000 for p in ("prunekit", "research"))
        body.append([mode, f"{ours:.1f} s", f"{theirs:.0f} s", f"{theirs / ours:.1f}×"])
    return table(["mode", "prunekit", "research script", "ratio"], body)


def against_research() -> str:
    """Everything that the research code does too, beside it."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for file in ("research.csv", "metrics.csv"):
        for row in rows(file) if (CPU / file).is_file() else []:
            mode = "" if row["mode"] == "statistics" else f" ({row['mode']})"
            name = f"`{row['op']}`{mode}, {row['shape']}"
            if row.get("status", "ok") == "ok":
                found.setdefault(name, {})[row["provider"]] = row
    body = []
    for name, providers in found.items():
        theirs = providers.get("research code")
        ours = [row for key, row in providers.items() if key.startswith("prunek")]
        if theirs is not None and ours:
            fast, slow = (float(row["p50_ms"]) for row in (ours[0], theirs))
            body.append([name, duration(fast), duration(slow), f"{slow / fast:.1f}×"])
    head = ["what", "prunekit", "research code", "ratio"]
    return table(head, body) if body else "Not measured on this version yet."


def pruning() -> str:
    """Seconds of pruning a whole model, beside the calibration passes that it needs."""
    found = rows("prune.csv")
    body = [
        [
            row["method"],
            row["provider"],
            f"{float(row['seconds']):.1f} s",
            row["passes_needed"],
            row["of_passes"] and f"{float(row['of_passes']):.2f}",
            f"{float(row['beyond_seconds']):.1f} s",
            row["perplexity"] and f"{float(row['perplexity']):.1f}",
        ]
        for row in found
    ]
    head = ["method", "provider", "in all", "passes", "of the passes", "beyond them", "leaves"]
    beyond = {(r["method"], r["provider"]): float(r["beyond_seconds"]) for r in found}
    ratio = beyond["sparsegpt", "research"] / beyond["sparsegpt", "prunekit"]
    drop = next(float(r["of_passes"]) for r in found if r["method"] == "drop scores, attn and mlp")
    said = (
        f"SparseGPT's time beyond the passes is {ratio:.1f} times less than the research code's "
        f"(aim: 4), and scores for dropping sublayers take {drop:.2f} of their pass (aim: 1.1)."
    )
    return f"{table(head, body)}\n\n{said}"


def prunings() -> str:
    """Pruning beside the research code's: seconds, and the perplexity that is left."""
    found = {(row["method"], row["provider"]): row for row in rows("prune.csv")}
    body = []
    for method in (method for method, provider in found if provider == "research"):
        ours, theirs = found[method, "prunekit"], found[method, "research"]
        cells = [method]
        for row in (ours, theirs):
            seconds, beyond = float(row["seconds"]), float(row["beyond_seconds"])
            cells += [f"{seconds:.0f} s", f"{beyond:.1f} s", f"{float(row['perplexity']):.1f}"]
        body.append(cells)
    head = [f"{whose}: {what}" for whose in ("prunekit", "research") for what in PRUNINGS]
    return table(["method", *head], body)


def memory() -> str:
    """Peak memory of pruning."""
    if not (CPU / "prune_memory.csv").is_file():
        return "Not measured on this version yet."
    body = [
        [
            row["method"],
            *(f"{int(row[name]) / 1e6:.0f} MB" for name in MEMORY),
            row["peak_of_model_and_statistics"] + "×",
        ]
        for row in rows("prune_memory.csv")
    ]
    return table(["method", "model", "a block's statistics", "added at the peak", "peak"], body)


def draws() -> str:
    """Perplexities that SparseGPT leaves after several draws of calibration text, in pairs."""
    if not (CPU / "prune_draws.csv").is_file():
        return "Not measured on this version yet."
    found: dict[str, dict[str, float]] = {}
    for row in rows("prune_draws.csv"):
        found.setdefault(row["provider"], {})[row["draw"]] = float(row["perplexity"])
    ours, others = found.pop("prunekit"), found
    body = [[draw, *(f"{each[draw]:.2f}" for each in (ours, *others.values()))] for draw in ours]
    said = []
    for name, other in others.items():
        apart = [math.log(ours[draw] / other[draw]) for draw in ours]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        largest = max(map(abs, apart))
        said.append(
            f"- prunekit − {name}: {statistics.mean(apart):+.4f} ± {error:.4f} of the logarithm "
            f"(mean of {len(apart)} draws and its standard error), at most {largest:.4f} apart."
        )
    return "\n\n".join([table(["draw", "prunekit", *others], body), "\n".join(said)])


ENDS = ("mean", "low", "high")
PRUNINGS = ("in all", "beyond the passes", "perplexity")
MEMORY = ("model_bytes", "block_statistics_bytes", "added_bytes")


def models() -> str:
    """Whole models on a CPU: speed and weights."""
    if not (CPU / "model.csv").is_file():
        return "Not measured on this version yet."
    body = [
        [
            *(row[name] for name in ("op", "mode", "shape", "provider")),
            f"{float(row['items_s']):.3g}",
            f"{float(row['held_mb']):.0f} MB",
        ]
        for row in rows("model.csv")
        if row["status"] == "ok"
    ]
    return table(["op", "model, cache", "shape", "variant", "tokens/s", "weights"], body)


def headlines() -> str:
    """The ratios that summary.py prints for the CPU's files, as a table."""
    body = [
        [
            *(f"`{found.op}`", found.ours, found.other, f"{found.median:.2f}×"),
            f"{found.least:.2f}–{found.most:.2f}×",
            f"{found.faster} of {found.cases}",
        ]
        for found in summary.headlines(CPU)
    ]
    head = ["op", "ours", "against", "median ratio", "range", "faster in"]
    return table(head, body) if body else "Not measured on this version yet."


def estimates() -> str:
    """Rules for where the second-order estimate of KL may be used."""
    body: dict[str, list[str]] = {}
    rules = dict.fromkeys(row["rule"] for row in rows("estimates.csv"))
    for row in rows("estimates.csv"):
        valid, off = int(row["valid"]), int(row["off_twofold"])
        cells = body.setdefault(row["pruning"], [row["kl_mean"]])
        cells.append(f"{valid / int(row['positions']):.1%}, {off / max(1, valid):.1%} off")
    lines = [[name, *cells] for name, cells in body.items()]
    return table(["pruning", "mean KL", *rules], lines)


Case = tuple[str, ...]


def cases(name: str, op: str, mode: str = "") -> dict[Case, dict[str, float]]:
    """Microseconds of an op on the H200 by case (type, shape) and provider."""
    found: dict[Case, dict[str, float]] = {}
    for row in rows(name, H200):
        if row["op"] == op and row["mode"].startswith(mode) and row["status"] == "ok":
            case = (row["dtype"], *(part.split("=")[1] for part in row["shape"].split()))
            found.setdefault(case, {})[row["provider"]] = 1000 * float(row["p50_ms"])
    return found


def speedups(times: dict[str, float], providers: list[str], base: str) -> list[str]:
    """Each provider's time as a factor of `base`'s, "–" where it was not measured."""
    return [f"{times[base] / times[p]:.2f}×" if p in times else "–" for p in providers]


def h200_two_four() -> str:
    """2:4 layers on the H200: speed-up over dense by tokens."""
    providers = ["2:4 mma_sp", "2:4 wgmma_sp", "2:4 expand", "2:4 triton", "cuSPARSELt best"]
    body = []
    for (_, tokens, n, k, _), times in sorted(
        cases("sparse.csv", "linear", "2:4").items(),
        key=lambda item: (item[0][2:4], int(item[0][1])),
    ):
        dense = f"{times['dense']:.1f} µs"
        body.append([f"{n} × {k}", tokens, dense, *speedups(times, providers, "dense")])
    heads = [name.removeprefix("2:4 ").removesuffix(" best") for name in providers]
    return table(["N × K", "tokens", "dense", *heads], body)


def h200_bitmap() -> str:
    """Bitmap layers on the H200: speed-up over dense by sparsity and tokens."""
    providers = ["bitmap mma", "bitmap mma adding bytes", "bitmap triton", "bitmap expand"]
    body = []
    for (_, tokens, n, k, sparsity), times in sorted(
        cases("sparse.csv", "linear", "unstructured").items(),
        key=lambda item: (item[0][2:4], int(item[0][1]), item[0][4]),
    ):
        zeros, dense = f"{float(sparsity):.0%}", f"{times['dense']:.1f} µs"
        body.append([f"{n} × {k}", tokens, zeros, dense, *speedups(times, providers, "dense")])
    heads = [name.removeprefix("bitmap ") for name in providers]
    return table(["N × K", "tokens", "zeros", "dense", *heads], body)


def h200_statistics() -> str:
    """Statistics on the H200: microseconds beside torch's and Liger's."""
    providers = [
        *(f"prunekernels {level}" for level in ("core", "KL", "precise", "full")),
        *("torch eager", "torch eager KL", "Liger kl_div", "copy"),
    ]
    body = [
        [f"{n} × {v}", dtype, *(f"{times[p]:.0f}" if p in times else "–" for p in providers)]
        for (dtype, n, v), times in cases("metrics.csv", "pair_stats").items()
    ]
    heads = [name.removeprefix("prunekernels ") for name in providers]
    return table(["rows × vocabulary", "type", *heads], body)


def h200_heads() -> str:
    """Statistics through the output head on the H200: microseconds."""
    providers = [
        *("prunekernels fused", "prunekernels chunked", "products alone"),
        *("torch eager", "Liger fused jsd", "cut-cross-entropy x2"),
    ]
    body = [
        [f"{n} × {d} × {v}", *(f"{times[p]:.0f}" if p in times else "–" for p in providers)]
        for (_, n, d, v), times in cases("metrics.csv", "head_pair_stats").items()
    ]
    heads = [name.removeprefix("prunekernels ") for name in providers]
    return table(["rows × width × vocabulary", *heads], body)


def h200() -> str:
    """The README's few lines of the H200's files."""
    body = []
    for case, what in (
        (("bfloat16", "1", "14336", "4096", "0.5"), "1 token"),
        (("bfloat16", "16", "14336", "4096", "0.5"), "16 tokens"),
        (("bfloat16", "1024", "14336", "4096", "0.5"), "1024 tokens"),
    ):
        times = cases("sparse.csv", "linear", "2:4")[case]
        best = "2:4 mma_sp" if "2:4 mma_sp" in times else "2:4 wgmma_sp"
        body.append(
            [
                f"2:4 layer 14336 × 4096, {what}",
                f"{times[best]:.1f} µs",
                f"cuBLAS {times['dense']:.1f} µs",
                f"{times['dense'] / times[best]:.2f}×",
                f"cuSPARSELt {times['dense'] / times['cuSPARSELt best']:.2f}×",
            ]
        )
    for sparsity in ("0.5", "0.7"):
        case = ("bfloat16", "1", "14336", "4096", sparsity)
        times = cases("sparse.csv", "linear", "unstructured")[case]
        ours = times["bitmap mma"]
        body.append(
            [
                f"bitmap layer 14336 × 4096, {float(sparsity):.0%} zeros, 1 token",
                f"{ours:.1f} µs",
                f"cuBLAS {times['dense']:.1f} µs",
                f"{times['dense'] / ours:.2f}×",
                "",
            ]
        )
    times = cases("metrics.csv", "pair_stats")["bfloat16", "2048", "152064"]
    for ours, peer, also in (
        ("prunekernels core", "torch eager", ""),
        ("prunekernels KL", "torch eager KL", "Liger kl_div"),
    ):
        further = f"Liger {times[peer] / times[also]:.2f}×" if also else ""
        body.append(
            [
                f"`pair_stats` {ours.split()[1]}, 2048 rows of 152064, bfloat16",
                f"{times[ours]:.0f} µs",
                f"torch {times[peer]:.0f} µs",
                f"{times[peer] / times[ours]:.1f}×",
                further,
            ]
        )
    return table(["what", "prunekernels", "against", "ratio", "another, by the same"], body)


def demo() -> str:
    """The demo's headline, for both prunings."""
    found = json.loads((CPU / "demo.json").read_text(encoding="utf-8"))
    dropped, wanda = found["summary"].values()

    def cell(summary: dict[str, Any], name: str, form: str) -> str:
        return form.format(summary[name]["mean"])

    body = [
        [
            label,
            *(cell(summary, name, form) for summary in (dropped, wanda)),
            f"{dropped[name]['n']} {'questions' if 'accuracy' in name else 'prompts'}",
        ]
        for label, name, form in DEMO
        if name in dropped  # results of a former version lack what was added since
    ]
    return table(["", *found["summary"], "n"], body)


DEMO = (
    ("hidden states: cosine", "h_cosine", "{:.3f}"),
    ("logits: cosine", "z_cosine", "{:.3f}"),
    ("probabilities: cosine", "p_cosine", "{:.3f}"),
    ("KL(dense‖pruned), nats per token", "kl_dense_pruned", "{:.3f}"),
    ("its second-order estimate", "kl_estimate", "{:.3f}"),
    ("positions where the estimate is valid", "estimate_valid", "{:.0%}"),
    ("single-step: multiple-choice accuracy, dense", "dense_accuracy", "{:.1%}"),
    ("single-step: multiple-choice accuracy, pruned", "pruned_accuracy", "{:.1%}"),
    ("single-step: pruned − dense on the same questions", "accuracy_difference", "{:+.1%}"),
    ("generated texts identical to the dense model's", "pruned_identical", "{:.0%}"),
    ("generated texts: chrF to the dense model's", "pruned_chrf", "{:.1f}"),
)
BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    **sweep_tables.blocks(table),
    **quality_tables.blocks(rows, table),
    "kld": kld,
    "kld_cost": kld_cost,
    "layerwise": layerwise,
    "research": against_research,
    "models": models,
    "headlines": headlines,
    "pruning": pruning,
    "prunings": prunings,
    "memory": memory,
    "draws": draws,
    "estimates": estimates,
    "h200": h200,
    "retrieval": retrieval,
    "h200-2:4": h200_two_four,
    "h200-bitmap": h200_bitmap,
    "h200-statistics": h200_statistics,
    "h200-heads": h200_heads,
}


def drawn(text: str) -> str:
    """`text` with every measured block redrawn."""
    for name, draw in BLOCKS.items():
        block = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda m, draw=draw: f"{m[1]}{draw()}\n{m[2]}", text)
    return text


def main() -> None:
    """Rewrite, or check."""
    for page in PAGES:
        if not page.is_file():
            continue
        before = page.read_text(encoding="utf-8")
        after = drawn(before)
        if "--check" not in sys.argv:
            page.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"{page.name} differs from bench/results: run python -m bench.readme")


if __name__ == "__main__":
    main()
