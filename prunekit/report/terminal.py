"""Tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from prunekit.analysis.findings import Findings
    from prunekit.report.sentences import Sentence

_BYTES = ("B", "kB", "MB", "GB", "TB")


def study_summary(study: Findings) -> RenderableType:
    """Every summary table of a study, and what it says in sentences."""
    from prunekit.report import contents, sentences

    parts: list[RenderableType] = []
    for found in contents.tables(study):
        made = plain_table(found.title, found.columns)
        for row in found.rows:
            made.add_row(*(Text(str(cell)) for cell in row))
        parts += [made, Text()]
    parts += [sentence(said) for said in sentences.describe(study)]
    return Group(*parts)


def sentence(said: Sentence) -> RenderableType:
    """One statement as a list item; ! marks a limit."""
    item = Table.grid(padding=(0, 1))
    item.add_row(Text("!" if said.warn else "·"), Text(said.text))
    return item


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Scores over the number of dropped sublayers, from the rows of `analysis.sweep`."""
    from prunekit.report.answer_charts import SHOWN
    from prunekit.report.summary_tables import Value

    questions, prompts = (int(rows[0]["scores"][key]["n"]) for key in ("accuracy", "chrf"))
    title = f"As more sublayers go: {questions} questions, {prompts} prompts"
    made = plain_table(title, ["dropped", *(name for _, name, _ in SHOWN)])
    for row in rows:
        cells = []
        for key, _, scale in SHOWN:
            ends = (row["scores"][key][end] for end in ("mean", "low", "high"))
            mean, low, high = (math.nan if v is None else scale * v for v in ends)
            cells.append(Text(str(Value(mean, low, high))))
        made.add_row(str(row["count"]), *cells)
    return made


def studies_side_by_side(studies: Mapping[str, Findings]) -> RenderableType:
    """One table for several studies of the same dense model, whose own column comes once."""
    from prunekit.report import contents

    tables = {name: contents.tables(study) for name, study in studies.items()}
    first = next(iter(tables.values()))
    parts: list[RenderableType] = []
    for place, shape in enumerate(first):
        once = ["dense"] if "pruned" in shape.columns else []
        own = shape.columns[1 + len(once) : -1]  # between the names and the remarks
        heads = [name if len(own) == 1 else f"{name}: {part}" for name in studies for part in own]
        made = plain_table(shape.title, ["", *once, *heads, ""])
        for index, row in enumerate(shape.rows):
            pruned = [
                cell
                for found in tables.values()
                for cell in found[place].rows[index][-1 - len(own) : -1]
            ]
            cells = [*row[: 1 + len(once)], *pruned]
            remark = (
                "" if len({str(t[place].rows[index][-1]) for t in tables.values()}) > 1 else row[-1]
            )
            made.add_row(*(Text(str(cell)) for cell in cells), Text(str(remark)))
        parts += [made, Text()]
    return Group(*parts)


def facts(title: str, rows: Iterable[tuple[str, object]]) -> RenderableType:
    """Two columns: a name and a value."""
    made = plain_table(title, ("", ""))
    made.show_header = False
    for name, value in rows:
        made.add_row(Text(name), Text(str(value)))
    return made


def records(title: str, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Rows with the same keys, as a table."""
    made = plain_table(title, list(rows[0]) if rows else [])
    for row in rows:
        made.add_row(*(Text(str(value)) for value in row.values()))
    return made


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table in the house style."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    made.min_width = len(title)  # a title is not wrapped to the width of its columns
    for number, name in enumerate(columns):
        last = number == len(columns) - 1
        made.add_column(Text(name), overflow="fold", style="dim" if last and not name else "")
    return made


def show(renderable: RenderableType, file: Any) -> None:
    """Print to `file`: in colour on a terminal, wide enough for the tables elsewhere."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(renderable)


def size(count: float) -> str:
    """A number of bytes for people."""
    unit = 0
    while count >= 1000 and unit < len(_BYTES) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_BYTES[unit]}" if unit == 0 else f"{count:.3g} {_BYTES[unit]}"
