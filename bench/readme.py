"""Draw the README's measured tables from the files under results/.

    python bench/readme.py            rewrite README.md between its markers
    python bench/readme.py --check    exit with 1 if README.md says something else

A block of the README stands between `<!-- measured: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import RESULTS

README = Path(__file__).parent.parent / "README.md"
CPU = RESULTS / "cpu"


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a CSV of CPU results."""
    with (CPU / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality() -> str:
    """Perplexity by method and pattern."""
    body = [
        [row["method"], row["pattern"] or "–", f"{float(row['perplexity']):.1f}"]
        for row in rows("quality_c4.csv")
    ]
    return table(["method", "pattern", "perplexity"], body)


def layerwise() -> str:
    """Seconds of the layerwise analysis beside the research script's."""
    found = {(row["mode"], row["provider"]): row for row in rows("layerwise.csv")}
    body = []
    for mode in ("dropped", "pruned"):
        ours, theirs = (float(found[mode, p]["p50_ms"]) / 1000 for p in ("prunekit", "research"))
        body.append([mode, f"{ours:.1f} s", f"{theirs:.0f} s", f"{theirs / ours:.1f}×"])
    return table(["mode", "prunekit", "research script", "ratio"], body)


def demo() -> str:
    """The demo's headline, for both prunings."""
    found = json.loads((CPU / "demo.json").read_text(encoding="utf-8"))
    dropped, wanda = found["summary"].values()

    def cell(summary: dict[str, Any], name: str, form: str) -> str:
        value = summary[name]
        return form.format(value["mean"] if isinstance(value, dict) else value)

    body = [
        [label, *(cell(summary, name, form) for summary in (dropped, wanda))]
        for label, name, form in DEMO
    ]
    return table(["", *found["summary"]], body)


DEMO = (
    ("hidden states: cosine", "h_cosine", "{:.3f}"),
    ("logits: cosine", "z_cosine", "{:.3f}"),
    ("probabilities: cosine", "p_cosine", "{:.3f}"),
    ("KL(dense‖pruned), nats per token", "kl_dense_pruned", "{:.3f}"),
    ("its second-order estimate", "kl_estimate", "{:.3f}"),
    ("positions where the estimate is valid", "estimate_valid", "{:.0%}"),
    ("single-step: multiple-choice accuracy, dense", "dense_accuracy", "{:.1%}"),
    ("single-step: multiple-choice accuracy, pruned", "pruned_accuracy", "{:.1%}"),
    ("generated texts identical to the dense model's", "pruned_identical", "{:.0%}"),
    ("generated texts: chrF to the dense model's", "pruned_chrf", "{:.1f}"),
)
BLOCKS: dict[str, Callable[[], str]] = {"demo": demo, "quality": quality, "layerwise": layerwise}


def drawn(text: str) -> str:
    """`text` with every measured block redrawn."""
    for name, draw in BLOCKS.items():
        block = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda m, draw=draw: f"{m[1]}{draw()}\n{m[2]}", text)
    return text


def main() -> None:
    """Rewrite, or check."""
    before = README.read_text(encoding="utf-8")
    after = drawn(before)
    if "--check" in sys.argv:
        sys.exit(
            None if before == after else "README.md differs from bench/results: run bench/readme.py"
        )
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
