"""The ranked table of a comparison, as text."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from prunekit.report import terminal
from prunekit.report.summary_tables import Value

HEAD = (
    "candidate",
    "on disk",
    "in memory",
    "bits/weight",
    "mean KLD [95 %]",
    "99.9 %",
    "same top",
    "PPL ratio [95 %]",
    "remark",
)

# Columns that a narrow terminal goes without, the first first.
_SPARE = ("on disk", "99.9 %", "in memory")


def lines(told: dict[str, Any]) -> list[list[str]]:
    """The cells of the table of `Kld.to_dict()`, the closest candidate first."""
    apart = {each["farther"]: each["kl"]["low"] for each in told["differences"]}
    found = []
    for row in told["candidates"]:
        if row["error"]:
            found.append([row["name"], *["–"] * 7, f"failed: {row['error']}"])
            continue
        means, low = row["means"], apart.get(row["name"])
        tied = "not told apart from the one above" if low is not None and low <= 0 else ""
        found.append(
            [
                row["name"],
                _size(row["bytes_on_disk"]),
                _size(row["bytes_in_memory"]),
                "–" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}",
                with_ends(means["kl"]),
                f"{row['summary']['kl_p99.9']:.3g}",
                f"{100 * means['same_top']['mean']:.2f} %",
                with_ends(means["ppl_ratio"]),
                tied,
            ]
        )
    return found


def with_ends(value: dict[str, Any]) -> str:
    """A mean and its interval."""
    return str(Value.of_dict(value))


def ranked(told: dict[str, Any]) -> RenderableType:
    """The table of `Kld.to_dict()`, and what a reader must know about it."""
    reference = told["reference"]
    title = f"KL({reference['name']} ‖ candidate), nats"
    made = terminal.Fitted(title, HEAD, lines(told), _SPARE)
    return Group(made, Text(), *(Text(f"· {said}") for said in remarks(told)))


def remarks(told: dict[str, Any]) -> list[str]:
    """Where the numbers come from, and each candidate's notes."""
    reference, plan = told["reference"], told["plan"]
    stride = f" with a stride of {plan['stride']}" if plan["stride"] else ""
    found = [
        f"{plan['positions']} positions of {plan['count']} {plan['windows']} windows of "
        f"{plan['context']} tokens{stride}; states in {reference['dtype']}; intervals resample "
        f"{plan['blocks']} {plan['block_unit']}s.",
    ]
    if plan["blocks"] < 8:
        found.append(f"{plan['blocks']} {plan['block_unit']}s are too few for honest intervals.")
    for row in told["candidates"]:
        found += [f"{row['name']}: {note}." for note in row.get("notes", [])]
    return found


def _size(count: int | None) -> str:
    return "–" if count is None else terminal.size(count)
