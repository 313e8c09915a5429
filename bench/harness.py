"""What the benchmarks share: where results go, and what they were made with."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def provenance(device: torch.device | str | None = None) -> dict[str, Any]:
    """Columns that say where a row comes from."""
    device = torch.device(device or "cpu")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """The checked-out commit, or "" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def write_csv(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `rows` to folder/<device>/name, with a column per key of the first row."""
    path = folder / str(rows[0]["device"]).replace(" ", "_") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}", file=sys.stderr)
    return path
