"""Rows of the benchmarks' result files: their columns, where they come from, how they are written.

A file holds one row per case and contender. Rows are added all at once or, if the process is
killed, not at all.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

#: Every row of every result file of ops has these columns, in this order.
COLUMNS = [
    "op",
    "provider",
    "mode",
    "dtype",
    "shape",
    "status",
    "note",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "rounds",
    "timer",
    "bound_ms",
    "limit",
    "roof_pct",
    "gb_s",
    "tflop_s",
    "items_s",
    "held_mb",
    "peak_mb",
    "roof_gb_s",
    "roof_tflop_s",
    "device",
    "cpu",
    "threads",
    "torch",
    "triton",
    "transformers",
    "commit",
]


def line(row: Mapping[str, Any]) -> str:
    """A row for the terminal, below its case."""
    head = f"    {row['provider']:22}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['note']}"
    spread = f"({float(row['p20_ms']):.4f}–{float(row['p80_ms']):.4f})"
    share = f"{row['roof_pct']:>6} % of bound" if row["roof_pct"] else ""
    if share and float(row["roof_pct"]) > 100:
        share += " (in a cache)"
    return f"{head} {float(row['p50_ms']):10.4f} ms {spread:22} {share}".rstrip()


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def provenance(device: torch.device | str | None = None) -> dict[str, Any]:
    """Columns that say where a row comes from."""
    device = torch.device(device or "cpu")
    return {
        "device": device_name(device),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": installed("triton") or "",
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return "unknown" if importlib.util.find_spec(package) else None


def _commit() -> str:
    """The checked-out commit; outside a repository, what BENCH_COMMIT says it is."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(FileNotFoundError):
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found:
            return found
    return os.environ.get("BENCH_COMMIT", "")


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV that has the columns of the first; all of them or, if killed, none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        file.write(before.decode("utf-8"))
        writer = csv.DictWriter(file, list(rows[0]))
        if not before:
            writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def write_csv(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `rows` to folder/<device>/name, with a column per key of the first row."""
    path = folder / str(rows[0]["device"]).replace(" ", "_") / name
    path.unlink(missing_ok=True)
    append_rows(path, rows)
    print(f"written: {path}", file=sys.stderr)
    return path
