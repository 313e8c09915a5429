"""Write a study into a folder: JSON, CSV tables, PNG figures and one HTML page.

The schema is documented in docs/study.md.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.analysis.answers import Answers
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.findings import Findings
from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.subspace import Subspace
from prunekit.errors import PrunekitError, one_line
from prunekit.files.atomic import replaced_folder
from prunekit.report import contents, page

STUDY = "study.json"
PAGE = "index.html"


def save(study: Findings, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write `study` into `folder`, whole or not at all.

    Args:
        study: What `prunekit.compare` returned.
        folder: Where to; its parents are created.
        overwrite: Whether to replace a study that is there.

    Returns:
        Path of the HTML page.

    Raises:
        PrunekitError: The folder is not empty, holds something that is no study, or can't be
            written.
    """
    from prunekit.report import png  # matplotlib is slow to import, and only needed here

    with replaced_folder(folder, overwrite=overwrite, replaceable=(STUDY,)) as new:
        _write_json(new / STUDY, study.to_dict())
        for name, rows in _tables(study).items():
            _write_csv(new / f"{name}.csv", rows)
        (new / "figures").mkdir()
        for figure in contents.figures(study):
            png.draw(figure, new / "figures" / f"{figure.key}.png")
        (new / PAGE).write_text(page.render(contents.payload(study)), encoding="utf-8")
    return Path(folder) / PAGE


def read(folder: str | Path) -> dict[str, Any]:
    """The data of the study in `folder`, for `Findings.from_dict`.

    Raises:
        PrunekitError: There is no study.
    """
    try:
        data: dict[str, Any] = json.loads((Path(folder) / STUDY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrunekitError(
            f"{folder} holds no study that can be read ({one_line(error)}): give the folder that "
            "`prunekit compare` or Study.save wrote"
        ) from error
    return data


def _tables(study: Findings) -> dict[str, Iterable[Mapping[str, Any]]]:
    tables: dict[str, Iterable[Mapping[str, Any]]] = {}
    for name in ("layerwise", "removal", "accumulated"):
        grid = getattr(study, name)
        if grid is not None:
            tables[name] = _over_steps(grid).rows()
    if study.theory is not None:
        tables["theory"] = study.theory
    if study.decoding is not None:
        tables["decoding"] = study.decoding.teacher_forced.rows()
        tables["generations"] = _generation_rows(study.decoding)
    if study.subspace is not None:
        tables["subspace"] = _subspace_rows(study.subspace)
    if study.answers is not None:
        tables["answers"] = _answer_rows(study.answers)
    if study.scores is not None:
        tables["scores"] = [
            {"model": model, "score": name, **_ends(interval)}
            for model, values in study.scores.items()
            for name, interval in values.items()
        ]
    return tables


def _over_steps(grid: MetricGrid) -> MetricGrid:
    """Each prompt's mean over decode steps; every step is in study.json."""
    keep = tuple(axis for axis in grid.axes if axis != "step")
    values = {name: grid.per_prompt(name, keep[1:]) for name in grid.metrics}
    return MetricGrid(keep, {axis: grid.labels[axis] for axis in keep}, values)


def _ends(interval: Any) -> dict[str, Any]:
    return {name: getattr(interval, name) for name in ("mean", "low", "high", "n")}


def _generation_rows(decoding: Decoding) -> Iterable[dict[str, Any]]:
    for index, found in enumerate(decoding.generations):
        texts = {"dense_text": found.dense_text, "pruned_text": found.pruned_text}
        measures = {name: float(values[index]) for name, values in decoding.sequence.items()}
        yield {"prompt": index, "prompt_text": found.prompt, **texts, **measures}


def _subspace_rows(found: Subspace) -> Iterable[dict[str, Any]]:
    for index, item in enumerate(found.items):
        logprobs = {
            f"logprob_{name}_{option}": value
            for name, values in (("dense", item.logprobs_dense), ("pruned", item.logprobs_pruned))
            for option, value in enumerate(values)
        }
        metrics = {name: float(values[index]) for name, values in found.grid.values.items()}
        facts = {"id": item.id, "question": item.question, "answer": item.answer}
        yield {**facts, **logprobs, **metrics}


def _answer_rows(found: Answers) -> Iterable[dict[str, Any]]:
    for item in found.items:
        sides = {
            f"{side}_{name}": getattr(reply, name)
            for side, reply in (("dense", item.dense), ("pruned", item.pruned))
            for name in ("right", "given", "text")
        }
        yield {"id": item.id, "question": item.question, "right_answer": item.right, **sides}


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Columns in order of appearance; NaN and None are empty cells."""
    listed = list(rows)
    fields = list(dict.fromkeys(name for row in listed for name in row))
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows([_cell(row.get(name)) for name in fields] for row in listed)


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and np.isnan(value)) else value
