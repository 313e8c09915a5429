"""Several copies of one model: a table, CSV, and a page of quality against size and speed.

All of it is drawn from the plain data of `Several.to_dict()`.
"""

from __future__ import annotations

import csv as tables
import io
import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from prunekit.report import terminal
from prunekit.report.charts import DISTINCT, Chart, Figure, Series
from prunekit.report.data_files import csv_text
from prunekit.report.page import asset, document
from prunekit.report.summary_tables import NONE, Value

# Columns that a narrow terminal goes without, the first first.
_SPARE = ("chrF", "identical texts", "bits/weight", "right → wrong")
# metric of a study's teacher-forced grid, title, unit, logarithmic
STEPS = (
    ("h_cosine", "Hidden state", "cosine(dense, copy)", False),
    ("z_cosine", "Logits", "cosine(dense, copy)", False),
    ("p_cosine", "Probabilities", "cosine(dense, copy)", False),
    ("z_delta_rms", "Change of the logits", "root mean square of Δz", True),
    ("uniform_variance", "Spread of the change", "variance of Δz", True),
    ("kl_dense_pruned", "Divergence", "KL(dense‖copy), nats", True),
)
_SCRIPTS = ("elements", "points", "overview")


def table(told: Mapping[str, Any]) -> RenderableType:
    """The ranking, the closest copy first, and what a reader must know about it."""
    rows = [_cells(row) for row in told["copies"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[row.get(name, NONE) for name in columns] for row in rows]
    fitted = terminal.Fitted(_title(told["meta"]), columns, lines, _SPARE)
    return Group(fitted, Text(), *(Text(f"· {said}") for said in remarks(told)))


def remarks(told: Mapping[str, Any]) -> list[str]:
    """Failures, notes, copies that others beat, and what the numbers rest on."""
    meta = told["meta"]
    found = [
        f"KL(dense‖copy) in nats per token of the dense model's own greedy texts; intervals (95 %) "
        f"resample {meta['prompts']} prompts and {meta['choices']} questions, paired with those of "
        f"the dense model ({meta['device']}, {meta['dtype']})."
    ]
    if any(row.get("speed") for row in told["copies"]):
        found.append("Speed: one sequence, in turns with the dense model.")
    needed = [row["needed"] for row in told["copies"] if not row["error"] and row["needed"]]
    if needed and min(needed) > meta["choices"]:
        ends = dict.fromkeys((min(needed), max(needed)))
        found.append(
            f"A change of 2 points of accuracy would show on {' to '.join(map(str, ends))} such "
            f"questions (power 80 %); {meta['choices']} were asked."
        )
    for row in told["copies"]:
        if row["error"]:
            found.append(f"{row['name']} failed: {row['error']}")
            continue
        found += [f"{row['name']}: {note}" for note in row["notes"]]
        if row["beaten_by"]:
            found.append(
                f"{row['name']} is no smaller than {' and '.join(row['beaten_by'])} and farther "
                "from the dense model."
            )
    return found


def csv(told: Mapping[str, Any]) -> str:
    """One line per copy."""
    lines = []
    for row in told["copies"]:
        line: dict[str, Any] = {"copy": row["name"], "error": row["error"]}
        for name in ("bytes_on_disk", "bytes_in_memory", "bits_per_weight"):
            line[name] = row.get(name)
        line |= row.get("speed") or {}
        for name, value in row.get("scores", {}).items():
            ends = {"": value["mean"], "_low": value["low"], "_high": value["high"]}
            line |= {f"{name}{end}": number for end, number in ends.items()}
        line |= {name: row.get(name) for name in ("gained", "lost", "mcnemar_p", "needed")}
        lines.append(line)
    return csv_text(lines)


def steps_csv(told: Mapping[str, Any]) -> str:
    """One line per copy and step: means over the prompts that reach it, and how many these are."""
    made = io.StringIO()
    writer = tables.writer(made, lineterminator="\n")
    names = [key for key, *_ in STEPS]
    writer.writerow(["copy", "step", "prompts", *names])
    for row in told["copies"]:
        found = row.get("steps")
        if found:
            columns = [found["step"], found["prompts"], *(found[name] for name in names)]
            writer.writerows([row["name"], *line] for line in zip(*columns, strict=True))
    return made.getvalue()


def steps_figure(told: Mapping[str, Any]) -> Figure:
    """Both models along the dense model's own text, in h, z and p, one curve per copy."""
    rows = [row for row in told["copies"] if row.get("steps")]
    charts = []
    for key, title, unit, log in STEPS:
        series = [
            Series(row["name"], role, row["steps"]["step"], _numbers(row["steps"][key]))
            for row, role in zip(rows, cycle(DISTINCT), strict=False)
        ]
        charts.append(Chart(f"step-{key}", title, "step of decoding", unit, series, log=log))
    return Figure("steps", f"Copies of {told['meta']['name']}, step by step", "", charts)


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def render(told: Mapping[str, Any]) -> str:
    """The page, one self-contained file; texts enter it as JSON only."""
    return document(
        f"Copies of {told['meta']['name']} · prunekit",
        asset("overview.html"),
        asset("plain.css"),
        [asset(f"{name}.js") for name in _SCRIPTS],
        {**told, "title": _title(told["meta"]), "remarks": remarks(told)},
    )


def _title(meta: Mapping[str, Any]) -> str:
    asked = [f"{meta['prompts']} prompts"]
    asked += [f"{meta['choices']} questions"] if meta["choices"] else []
    return f"Copies of {meta['name']}: {', '.join(asked)}"


def _cells(row: Mapping[str, Any]) -> dict[str, object]:
    """A row's cells by column."""
    if row["error"]:
        return {"copy": row["name"], "size": "failed"}
    scores = row["scores"]

    def value(name: str, unit: str = "", scale: float = 1.0) -> object:
        if name not in scores:
            return NONE
        return Value.of_dict(scores[name], unit, scale)

    cells: dict[str, object] = {
        "copy": row["name"],
        "size": NONE if row["size"] is None else terminal.size(row["size"]),
        "bits/weight": NONE if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}",
        "× dense speed": NONE if row["speed"] is None else f"{row['speed']['speedup']:.2f}",
        "KL, nats": value("kl_dense_pruned"),
    }
    if "pruned_accuracy" in scores:
        cells["accuracy"] = f"{100 * scores['pruned_accuracy']['mean']:.1f} %"
        cells["change, points"] = value("accuracy_difference", "", 100)
        cells["right → wrong"] = f"{row['lost']}, back {row['gained']}"
    if "pruned_exact_match" in scores:
        cells["exact match"] = f"{100 * scores['pruned_exact_match']['mean']:.1f} %"
        cells["its change, points"] = value("exact_match_difference", "", 100)
        cells["same answer"] = f"{100 * scores['pruned_same_answer']['mean']:.0f} %"
    cells["identical texts"] = f"{100 * scores['pruned_identical']['mean']:.0f} %"
    cells["chrF"] = value("pruned_chrf")
    return cells
