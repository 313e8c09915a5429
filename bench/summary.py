"""The end of a run: which result files there are, what is in them, and the ratios people ask for.

    python -m bench.summary FOLDER      an OUT of gpu.sh or of make bench, or results/

A ratio is the other's median over ours within one case, so above 1 ours is faster. Absent peers
are listed with what would install them; what was wrong, failed or broke is listed too.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bench.bounds import RESULTS

Row = dict[str, str]

#: (op, mode's beginning, ours, the other) of each headline.
HEADLINES = (
    ("linear", "2:4", "2:4 auto", "dense"),
    ("linear", "2:4", "2:4 auto", "cuSPARSELt"),
    ("linear", "unstructured", "bitmap auto", "dense"),
    ("pair_stats", "", "prunekernels core", "torch eager"),
    ("pair_stats", "", "prunekernels core", "torch.compile"),
    ("pair_stats", "", "prunekernels KL", "torch eager KL"),
    ("head_pair_stats", "", "prunekernels fused", "torch eager"),
    ("head_pair_stats", "", "prunekernels fused", "research code"),
    ("head_pair_loss", "", "prunekernels", "torch"),
    ("vector_stats", "", "prunekernels", "torch cosine"),
    ("vector_stats", "", "prunekernels", "torch cosine fp32"),
    ("nm_mask", "", "prunekernels", "torch topk"),
    ("rowwise_mask", "", "prunekernels", "torch kthvalue"),
    ("sparsegpt_update", "", "prunekernels", "torch columns"),
    ("decode", "", "dropped", "dense"),
    ("decode", "", "2:4", "dense"),
    ("decode", "", "bitmap", "dense"),
    ("drop_scores", "", "prunekit", "research code"),
    ("generation", "", "prunekit", "research code"),
    ("layerwise", "", "prunekit", "research"),
    ("wanda", "", "prunekit", "research code"),
    ("sparsegpt", "", "prunekit", "research code"),
)


def read(path: Path) -> list[Row]:
    """The rows of a file of ops; none of a file with other columns."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if {"op", "mode", "provider", "shape", "p50_ms"} <= row.keys()]


def ratios(rows: list[Row], op: str, mode: str, ours: str, other: str) -> list[float]:
    """other / ours of every case that has both."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["op"] == op and row["mode"].startswith(mode) and row["p50_ms"]:
            # the layerwise analysis describes its shape in words, each provider in its own
            shape = row["shape"] if "=" in row["shape"] else ""
            case = (row["mode"], row["dtype"], shape)
            times.setdefault(case, {})[row["provider"]] = float(row["p50_ms"])
    both = [found for found in times.values() if ours in found and other in found]
    return [found[other] / found[ours] for found in both]


class Headline(NamedTuple):
    """Ratios other / ours over the cases that have both."""

    op: str
    ours: str
    other: str
    median: float
    least: float
    most: float
    faster: int
    cases: int


def headlines(folder: Path) -> list[Headline]:
    """The ratios of a folder's files, as far as they were measured."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path)]
    made = []
    for op, mode, ours, other in HEADLINES:
        found = ratios(rows, op, mode, ours, other)
        if found:
            faster = sum(ratio > 1 for ratio in found)
            spread = (statistics.median(found), min(found), max(found))
            made.append(Headline(op, ours, other, *spread, faster, len(found)))
    return made


def lines(folder: Path) -> list[str]:
    """The summary of one folder of result files, line by line."""
    said, every = [f"{folder}"], []
    for path in sorted(folder.glob("*.csv")):
        rows = read(path)
        counts = Counter(row.get("status") or "ok" for row in rows)
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        said.append(f"  {path.name:20} {told or 'columns of its own'}")
        every += rows
    said += [f"  {path.name}" for path in sorted(folder.glob("*.png"))]
    head = f"  {'op':18} {'ours':20} {'against':16} {'median':>8} {'range':>15} {'faster in':>11}"
    table = [
        f"  {found.op:18} {found.ours:20} {found.other:16} {found.median:7.2f}× "
        f"{f'{found.least:.2f}–{found.most:.2f}×':>15} {f'{found.faster} of {found.cases}':>11}"
        for found in headlines(folder)
    ]
    said += [head, *table] if table else []
    absent: dict[str, dict[str, None]] = {}  # names by reason, each once
    for row in every:
        if row.get("status") == "absent":
            absent.setdefault(row["note"], {})[row["provider"]] = None
    said += [f"  absent: {', '.join(names)}: {note}" for note, names in absent.items()]
    bad = [row for row in every if row.get("status") in ("wrong", "failed", "broken")]
    kinds = {(row["status"], row["op"], row["provider"], row["note"]): row for row in bad}
    said += [f"  {' '.join(kind)} ({row['shape']})" for kind, row in kinds.items()]
    return said


def main() -> None:
    """The command line."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    folders = sorted({path.parent for path in root.rglob("*.csv")})
    if not folders:
        sys.exit(f"{root} holds no results: run a benchmark first")
    for folder in folders:
        print("\n".join(lines(folder)))


if __name__ == "__main__":
    main()
