"""The result of a comparison: a ranking, its numbers as JSON and CSV, and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import prunekit
from prunekit.divergence.bootstrap import BlockBootstrap
from prunekit.divergence.measuring import WORST, Compared
from prunekit.divergence.ranking import ranked, remarks
from prunekit.divergence.reference import Reference
from prunekit.divergence.row_statistics import by_place, described, percentiles
from prunekit.divergence.web_page import render
from prunekit.errors import PrunekitError
from prunekit.report.data_files import csv_text, finite, write_texts

FORMAT, VERSION = "prunekit-kld", 1
FILES = ("kld.json", "kld.csv", "blocks.csv", "index.html")


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        name: What it is called.
        found: Its comparison; None where it failed.
        error: Why it failed, or "".
    """

    name: str
    found: Compared | None
    error: str = ""


@dataclass(frozen=True)
class Kld:
    """Candidates compared with one reference; what `prunekit.kld` returns.

    Attributes:
        reference: Facts of the reference.
        plan: Facts of the windows.
        rows: Candidates, the closest first, those that failed last.
        bootstrap: The draws that all intervals come from.
        held: The reference itself, for texts of positions.
        topk: Likeliest tokens whose overlap is reported.
    """

    reference: dict[str, Any]
    plan: dict[str, Any]
    rows: tuple[Candidate, ...]
    bootstrap: BlockBootstrap
    held: Reference
    topk: int

    @classmethod
    def of(
        cls, held: Reference, rows: Sequence[Candidate], *, seed: int = 0, topk: int = 10
    ) -> Kld:
        """Rank what was compared."""
        facts = {name: value for name, value in held.facts.items() if name in REFERENCE}
        bootstrap = BlockBootstrap(held.windows.block_of(), seed=seed)

        def order(row: Candidate) -> float:
            return (
                np.inf if row.found is None else float(np.mean(row.found.values["kl"], dtype=float))
            )

        ranked = tuple(sorted(rows, key=order))
        return cls(facts, held.windows.facts(), ranked, bootstrap, held, topk)

    @property
    def failed(self) -> list[Candidate]:
        """Candidates without a result."""
        return [row for row in self.rows if row.found is None]

    @property
    def compared(self) -> list[tuple[str, Compared]]:
        """Names and comparisons of those with a result, the closest first."""
        return [(row.name, row.found) for row in self.rows if row.found is not None]

    def __getitem__(self, name: str) -> dict[str, Any]:
        """What `to_dict` says of the candidate `name`."""
        for told in self.to_dict()["candidates"]:
            if told["name"] == name:
                return dict(told)
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows themselves, as JSON-able data (see docs/kld.md)."""
        return self._told

    @cached_property
    def _told(self) -> dict[str, Any]:
        told: dict[str, Any] = finite(
            {
                "format": FORMAT,
                "version": VERSION,
                "prunekit": prunekit.__version__,
                "reference": self.reference,
                "plan": self.plan,
                "topk": self.topk,
                "candidates": [self._row(row) for row in self.rows],
                "differences": self._differences(),
            }
        )
        return told

    def _row(self, row: Candidate) -> dict[str, Any]:
        if row.found is None:
            return {"name": row.name, "error": row.error}
        facts = dict(row.found.facts)
        size = facts.get("bytes_on_disk") or facts.get("bytes_in_memory")
        parameters = self.reference.get("parameters")
        bits = 8 * size / parameters if size and parameters else None
        return {
            **facts,
            "name": row.name,
            "error": None,
            "size": size,
            "bits_per_weight": bits,
            **described(row.found.values, self.bootstrap),
        }

    def _differences(self) -> list[dict[str, Any]]:
        """Mean KL of each candidate less that of the one ranked before it, in the same draws."""
        return [
            {
                "closer": closer,
                "farther": farther,
                "kl": self.bootstrap.interval(
                    np.asarray(theirs.values["kl"], np.float64)
                    - np.asarray(ours.values["kl"], np.float64)
                ),
            }
            for (closer, ours), (farther, theirs) in pairwise(self.compared)
        ]

    def difference(self, name: str, other: str, value: str = "kl") -> dict[str, float | None]:
        """Mean of a value of one candidate less that of another, with its paired interval.

        Args:
            name: A candidate.
            other: Another one.
            value: A name of `row_statistics.FIELDS`' values, such as "kl".

        Raises:
            PrunekitError: There is no such candidate or value.
        """
        held = dict(self.compared)
        for each in (name, other):
            if each not in held or value not in held[each].values:
                raise PrunekitError(f"no {value} of a candidate {each!r}: there are {list(held)}")
        ours, theirs = (np.asarray(held[each].values[value], np.float64) for each in (name, other))
        return self.bootstrap.interval(ours - theirs)

    def blocks(self) -> list[dict[str, Any]]:
        """Mean KL per block (document or window) and candidate."""
        windows = self.held.windows
        numbers = np.unique(windows.block_of())
        told: list[dict[str, Any]] = [
            {windows.unit: windows.block_names[number], "positions": int(count)}
            for number, count in zip(numbers, self.bootstrap.counts, strict=True)
        ]
        for name, found in self.compared:
            for row, mean in zip(told, self.bootstrap.block_means(found.values["kl"]), strict=True):
                row[name] = float(mean)
        return told

    def curves(self) -> list[dict[str, Any]]:
        """Per candidate its percentile curve, and its mean KL by place in the window."""
        windows = self.held.windows
        places = np.array(
            [
                index
                for ids, first in zip(windows.ids, windows.firsts, strict=True)
                for index in range(first, len(ids))
            ]
        )
        return [
            {
                "name": name,
                "percentiles": percentiles(found.values["kl"]),
                "places": by_place(found.values["kl"], places, windows.context),
            }
            for name, found in self.compared
        ]

    def worst(self, count: int = WORST) -> dict[str, list[dict[str, Any]]]:
        """Per candidate the positions with the largest KL, with their text and top tokens."""
        return {
            name: [self._worded(place) for place in found.worst[:count]]
            for name, found in self.compared
        }

    def _worded(self, place: dict[str, Any]) -> dict[str, Any]:
        tokenizer, windows = self.held.tokenizer, self.held.windows
        ids, index = windows.ids[place["window"]], place["index"]

        def text(tokens: Sequence[int]) -> str:
            if tokenizer is None:
                return " ".join(map(str, tokens))
            return str(tokenizer.decode(list(tokens)))

        told = {name: place[name] for name in ("kl", "window", "index")}
        told["before"] = text(ids[max(0, index - 40) : index])
        told["token"] = text([ids[index]])
        for whose in ("base", "other"):
            told[whose] = [(text([token]), share) for token, share in place[whose]]
        return told

    def csv(self) -> str:
        """One line per candidate."""
        lines = []
        for told in self.to_dict()["candidates"]:
            if told["error"]:
                lines.append({"candidate": told["name"], "error": told["error"]})
                continue
            line: dict[str, Any] = {"candidate": told["name"], "error": ""}
            names = ("dtype", "bytes_on_disk", "bytes_in_memory", "bits_per_weight")
            line |= {name: told[name] for name in names}
            for name, value in told["means"].items():
                line |= {name: value["mean"], f"{name}_low": value["low"]}
                line[f"{name}_high"] = value["high"]
            line |= {n: v for n, v in told["summary"].items() if n.startswith(("kl_", "prob_"))}
            lines.append(line)
        return csv_text(lines)

    def page_data(self) -> dict[str, Any]:
        """What the page shows: `to_dict` and all that is drawn."""
        drawn = {"curves": self.curves(), "worst": self.worst(), "blocks": self.blocks()}
        return {**self.to_dict(), **drawn, "remarks": remarks(self.to_dict())}

    def save(self, folder: str | Path) -> None:
        """Write kld.json, kld.csv, blocks.csv and index.html; each replaces its former self."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        contents = (text, self.csv(), csv_text(self.blocks()), render(self.page_data()))
        write_texts(Path(folder), dict(zip(FILES, contents, strict=True)))

    def table(self) -> Any:
        """The ranking, for a terminal."""
        return ranked(self.to_dict())


REFERENCE = (
    "name",
    "dtype",
    "parameters",
    "bytes_on_disk",
    "bytes_in_memory",
    "model",
    "tokenizer",
    "notes",
)
