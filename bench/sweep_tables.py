"""What bench.readme draws of `prunekit sweep`: a table of copies, and sentences."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable

from bench.bounds import RESULTS

CPU = RESULTS / "cpu"
HEAD = ["copy", "accuracy, %", "change", "exact match, %", "change", "same answer, %", "KL, nats"]
HEAD += ["same text, % predicted", "observed"]


def blocks(table: Callable[[list[str], list[list[str]]], str]) -> dict[str, Callable[[], str]]:
    """Blocks of Markdown pages by name, tables drawn by `table`."""
    return {"demo_sweep": demo_said, "sweep": lambda: table(*copies()), "sweep_said": said}


def demo_said() -> str:
    """The sentences of the demo's sweep."""
    found = json.loads((CPU / "demo.json").read_text(encoding="utf-8"))
    return _listed(found["sweep"]["sentences"])


def said() -> str:
    """The sentences of the sweep over public questions."""
    if not (CPU / "sweep.json").is_file():
        return "Not measured on this version yet."
    return _listed(json.loads((CPU / "sweep.json").read_text(encoding="utf-8"))["sentences"])


def copies() -> tuple[list[str], list[list[str]]]:
    """Head and rows of the copies' table; no rows where nothing is measured."""
    if not (CPU / "sweep.csv").is_file():
        return HEAD, []
    with (CPU / "sweep.csv").open(newline="", encoding="utf-8") as file:
        dense, *others = csv.DictReader(file)
    body = [[dense["point"], _ends(dense, "accuracy"), "–", _ends(dense, "exact_match")]]
    body[0] += ["–"] * (len(HEAD) - len(body[0]))
    for row in others:
        body.append(
            [
                row["point"],
                _ends(row, "accuracy"),
                _ends(row, "accuracy_difference", 100, "{:+.1f}"),
                _ends(row, "exact_match"),
                _ends(row, "exact_match_difference", 100, "{:+.1f}"),
                _ends(row, "same_answer"),
                _ends(row, "kl", 1, "{:.3f}"),
                *(f"{100 * float(row[name]):.0f}" for name in ("predicted_same", "observed_same")),
            ]
        )
    return HEAD, body


def _ends(row: dict[str, str], name: str, scale: float = 100, form: str = "{:.1f}") -> str:
    mean, low, high = (form.format(scale * float(row[name + end])) for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def _listed(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {one}" for one in sentences)
