"""What a search found: the front of size against KL, and the best mix, as table, files, figure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from prunekit.files.atomic import replaced_file
from prunekit.mixing.copies import Part
from prunekit.mixing.mixes import Mix, undominated
from prunekit.report import terminal
from prunekit.report.charts import Chart, Figure, Series
from prunekit.report.data_files import csv_text, write_texts

FORMAT, VERSION = "prunekit-search", 1
FILES = ("search.json", "search.csv", "search.png")
_HEAD = ("mix", "bytes", "of dense", "speed (expected)", "KL searched", "KL held out")


@dataclass(frozen=True)
class Point:
    """A mix that was measured on all of the text that is searched on.

    Attributes:
        mix: The choice of each part.
        name: "all 2:4", "found", … where it has a name, else "".
        bytes: Of the whole model.
        speed: Expected decoding speed over the dense model's: bytes read by dense layers in the
            same time.
        kl: Mean KL(dense ‖ mix) on the text that is searched on, in nats.
        within: Whether it keeps the budget.
        held_out: The same on the windows that the search never saw, of what has a name or is on
            the front; None of the others.
    """

    mix: Mix
    name: str
    bytes: int
    speed: float
    kl: float
    within: bool
    held_out: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """What `prunekit.search` returns.

    Attributes:
        parts: The sublayers, in the order of mixes.
        choices: Names of the choices.
        points: All mixes measured on the whole of the searched text.
        found: The best mix within the budget.
        budget: As it was given: "bytes ≤ 60 %".
        facts: Model, text, seed and how much was measured.
    """

    parts: tuple[Part, ...]
    choices: tuple[str, ...]
    points: tuple[Point, ...]
    found: Point
    budget: str
    facts: dict[str, Any]

    @property
    def front(self) -> list[Point]:
        """The points that no other beats in bytes and KL, by rising bytes."""
        return [self.points[i] for i in undominated([(p.bytes, p.kl) for p in self.points])]

    def choice_of(self, part: Part) -> str:
        """The name of the choice that the found mix takes for a part."""
        return self.choices[self.found.mix[self.parts.index(part)]]

    def verdict(self) -> str:
        """The found mix beside the uniform copy that keeps the budget, in one or two sentences."""
        counts = Counter(self.choices[choice] for choice in self.found.mix)
        made = ", ".join(f"{count} × {name}" for name, count in counts.most_common())
        said = f"Found {_short(self.found)}: {made} of {len(self.parts)} sublayers."
        rivals = [point for point in self.points if point.name[:4] == "all " and point.within]
        if not rivals:
            return f"{said} No single choice for all sublayers keeps the budget."
        best = min(rivals, key=lambda point: point.kl)
        if best.mix == self.found.mix:
            return f"{said} That is one choice for all."
        return f"{said} {best.name[0].upper()}{best.name[1:]}: {_short(best)}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "budget": self.budget,
            **self.facts,
            "choices": list(self.choices),
            "found": self._told(self.found),
            "layers": [
                {"layer": part.layer, "sublayer": part.sublayer, "choice": self.choice_of(part)}
                for part in self.parts
            ],
            "front": [self._told(point) for point in self.front],
            "points": [self._told(point) for point in self.points],
        }

    def word(self, point: Point) -> str:
        """A mix as one letter per sublayer, by the index of its choice."""
        return "".join(_LETTERS[choice] for choice in point.mix)

    def _told(self, point: Point) -> dict[str, Any]:
        return {**vars(point), "mix": self.word(point)}

    def csv(self) -> str:
        """One line per point."""
        front = set(self.front)
        return csv_text(
            [
                {
                    "name": point.name,
                    "on_front": int(point in front),
                    "bytes": point.bytes,
                    "speed": point.speed,
                    "kl": point.kl,
                    "kl_held_out": point.held_out,
                    "mix": self.word(point),
                }
                for point in sorted(self.points, key=lambda point: point.bytes)
            ]
        )

    def figure(self) -> Figure:
        """KL against bytes: single choices for all sublayers, and the front of mixes."""
        uniform = sorted(
            (p for p in self.points if p.name.startswith("all ")), key=lambda p: p.bytes
        )
        front = [point for point in self.front if point.kl > 0]

        def series(name: str, role: str, points: Sequence[Point]) -> Series:
            return Series(name, role, [p.bytes / 1e6 for p in points], [p.kl for p in points])

        chart = Chart(
            "kl_over_bytes",
            "KL from the dense model against size",
            "size in memory, MB",
            "mean KL, nats",
            [
                series("one choice for all", "dense", uniform),
                series("mixed per sublayer", "kl", front),
            ],
            log=True,
        )
        return Figure("search", "Search", "What each byte buys.", [chart])

    def save(self, folder: str | Path) -> None:
        """Write search.json, search.csv and search.png."""
        from prunekit.report import png  # matplotlib is slow to import, and only needed here

        folder = Path(folder)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_texts(folder, dict(zip(FILES, (text, self.csv()), strict=False)))
        with replaced_file(folder / FILES[2]) as written:
            png.draw(self.figure(), written)

    def table(self) -> RenderableType:
        """The named points, the layers of the found mix, and the verdict, for a terminal."""
        dense = max(point.bytes for point in self.points)
        named = sorted((p for p in self.points if p.name), key=lambda p: -p.bytes)
        rows = [
            (
                point.name,
                terminal.size(point.bytes),
                f"{point.bytes / dense:.3f}",
                f"{point.speed:.2f}×",
                f"{point.kl:.4g}",
                "–" if point.held_out is None else f"{point.held_out:.4g}",
            )
            for point in named
        ]
        title = f"KL(dense ‖ mix), nats; {self.budget}"
        return Group(
            terminal.Fitted(title, _HEAD, rows, ("of dense",)),
            Text(),
            *(Text(line) for line in self._map()),
            Text(),
            Text(self.verdict()),
        )

    def _map(self) -> list[str]:
        """A letter per layer and sublayer, and what the letters say."""
        lines = []
        layers = 1 + max(part.layer for part in self.parts)
        for sublayer in ("attn", "mlp"):
            letters = ["·"] * layers
            for part, choice in zip(self.parts, self.found.mix, strict=True):
                if part.sublayer == sublayer:
                    letters[part.layer] = _LETTERS[choice]
            lines.append(f"{sublayer:5s}{''.join(letters)}")
        legend = ", ".join(f"{_LETTERS[i]} {name}" for i, name in enumerate(self.choices))
        return [*lines, f"     layer 0 to {layers - 1}: {legend}"]


#: What choices are called in a mix written as a word.
_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _short(point: Point) -> str:
    held = "" if point.held_out is None else f", {point.held_out:.4g} on the text held out"
    return (
        f"{terminal.size(point.bytes)}, expected speed {point.speed:.2f}×, KL {point.kl:.4g}{held}"
    )
