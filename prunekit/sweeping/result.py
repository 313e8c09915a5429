"""The result of a sweep: its rows, where each series breaks, and what is written of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prunekit.analysis.grid import interval_to_dict
from prunekit.report.data_files import csv_text, finite, write_texts
from prunekit.sweeping import contents
from prunekit.sweeping import figures as drawn
from prunekit.sweeping.findings import SweepFindings
from prunekit.sweeping.rows import dense_scores

FORMAT, VERSION = "prunekit-sweep", 1
JSON, CSV, PAGE = "sweep.json", "sweep.csv", "index.html"


@dataclass(frozen=True)
class Sweep(SweepFindings):
    """What `prunekit.sweeping` returns."""

    def make_best(self) -> tuple[PreTrainedModel, dict[str, Any]] | None:
        """The model of `best`, made again, with what was done to it."""
        best = self.best()
        if best is None:
            return None
        one, at = best
        made = one.points[at].make()
        return made.model, {"sweep": {"point": one.rows[at].label, **made.facts}}

    def sentences(self) -> list[str]:
        """What the numbers say, and no more."""
        return [said.text for said in contents.sentences(self)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able (see docs/sweep.md)."""
        told: dict[str, Any] = finite(
            {
                "format": FORMAT,
                "version": VERSION,
                "meta": self.meta,
                "dense": {
                    "scores": {n: interval_to_dict(s) for n, s in dense_scores(self.dense).items()},
                    **{n: self.dense[n] for n in ("parameters", "bytes_in_memory")},
                },
                "series": [
                    {
                        "name": one.name,
                        "axis": one.axis,
                        "edges": {side: vars(found) for side, found in self.edges(one).items()},
                        "exact_match_lost_from": self.lost_from(one),
                        "left": list(one.left),
                        "rows": [row.to_dict() for row in one.rows],
                    }
                    for one in self.series
                ],
                "sentences": self.sentences(),
                "prediction": self.calibration(),
                "exact_match_prediction": self.floor_calibration(),
            }
        )
        return told

    def csv(self) -> str:
        """One line per point, and the dense model's first."""
        lines: list[dict[str, Any]] = [{"series": "dense", "point": self.meta["dense"]}]
        for name, interval in dense_scores(self.dense).items():
            lines[0] |= _ends(name, interval_to_dict(interval))
        for one in self.series:
            for row in one.rows:
                line: dict[str, Any] = {"series": one.name, "point": row.label, "x": row.x}
                told = row.to_dict()
                for name, ends in {**told["scores"], "speed": told["speed"] or {}}.items():
                    line |= _ends(name, ends)
                for name, change in told["changes"].items():
                    line |= _ends(f"{name}_difference", change["difference"])
                    for part in ("gained", "lost", "p", "needed"):
                        line[f"{name}_{part}"] = change[part]
                for name in ("kl", "same_top", "ppl_ratio"):
                    line |= _ends(name, (row.kl or {}).get(name, {}))
                line |= dict(row.sizes)
                if row.by_chance is not None:
                    line["same_answer_by_chance"] = row.by_chance
                if row.prediction is not None:
                    for name in ("predicted_same", "observed_same"):
                        line[name] = row.prediction[name]
                if row.floor is not None:
                    line["exact_match_floor"] = row.floor.floor
                    line |= _ends("exact_match_above_floor", interval_to_dict(row.floor.above))
                lines.append({**line, "seconds": row.seconds, "error": row.error})
        return csv_text(lines)

    def table(self) -> Any:
        """For a terminal."""
        return contents.shown(self)

    def save(self, folder: str | Path) -> None:
        """Write sweep.json, sweep.csv, figures and index.html; each replaces its former self."""
        from prunekit.report import page, png

        folder = Path(folder)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        html = page.render(contents.payload(self), page.asset("sweep_methods.html"))
        write_texts(folder, {JSON: text, CSV: self.csv(), PAGE: html})
        (folder / "figures").mkdir(exist_ok=True)
        for figure in drawn.figures(self):
            png.draw(figure, folder / "figures" / f"{figure.key}.png")


def _ends(name: str, interval: dict[str, Any]) -> dict[str, Any]:
    ends = {"": "mean", "_low": "low", "_high": "high"}
    return {f"{name}{ending}": interval.get(end) for ending, end in ends.items()}


def read(folder: str | Path) -> dict[str, Any]:
    """The data of `Sweep.to_dict` that `Sweep.save` wrote into `folder`."""
    return dict(json.loads((Path(folder) / JSON).read_text(encoding="utf-8")))
