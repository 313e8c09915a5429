"""What bench.readme draws of `prunekit sweep`: a table of copies, and sentences."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from typing import Any

from bench.bounds import RESULTS

CPU = RESULTS / "cpu"
HEAD = ["copy", "accuracy, %", "change", "exact match, %", "change", "same answer, %", "KL, nats"]
HEAD += ["same text, % predicted", "observed", "exact match, % predicted floor"]


def blocks(table: Callable[[list[str], list[list[str]]], str]) -> dict[str, Callable[[], str]]:
    """Blocks of Markdown pages by name, tables drawn by `table`."""
    return {
        "demo_sweep": demo_said,
        "sweep": lambda: table(*copies()),
        "sweep_said": said,
        "sweep_floors": lambda: table(*floors()),
        "sweep_floors_said": floors_said,
    }


def demo_said() -> str:
    """The sentences of the demo's sweep."""
    found = json.loads((CPU / "demo.json").read_text(encoding="utf-8"))
    return _listed(found["sweep"]["sentences"])


def said() -> str:
    """The sentences of the sweep over public questions."""
    if not (CPU / "sweep.json").is_file():
        return "Not measured on this version yet."
    return _listed(json.loads((CPU / "sweep.json").read_text(encoding="utf-8"))["sentences"])


def floors() -> tuple[list[str], list[list[str]]]:
    """Head and rows of the predicted floors over the built-in questions."""
    head = ["copy", "exact match, % predicted floor", "observed", "above the floor, points"]
    head += ["same text, % predicted", "observed"]
    body = []
    for row in (row for one in _builtin()["series"] for row in one["rows"]):
        floor, above = row["exact_match_floor"], row["exact_match_floor"]["above"]
        low, high = (f"{100 * above[end]:+.1f}" for end in ("low", "high"))
        body.append(
            [
                row["label"],
                f"{100 * floor['floor']:.1f}",
                f"{100 * floor['observed']:.1f}",
                f"{100 * above['mean']:+.1f} [{low}, {high}]",
                *(f"{100 * row['prediction'][n]:.0f}" for n in ("predicted_same", "observed_same")),
            ]
        )
    return head, body


def floors_said() -> str:
    """What the sweep over the built-in questions says of its predictions."""
    sentences = _builtin()["sentences"]
    return _listed([sentences[0], *sentences[-3:]])


def _builtin() -> Any:
    return json.loads((CPU / "sweep_builtin.json").read_text(encoding="utf-8"))


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
                f"{100 * float(row['exact_match_floor']):.1f}",
            ]
        )
    return HEAD, body


def _ends(row: dict[str, str], name: str, scale: float = 100, form: str = "{:.1f}") -> str:
    mean, low, high = (form.format(scale * float(row[name + end])) for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def _listed(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {one}" for one in sentences)
