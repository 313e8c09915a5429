"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from prunekit.analysis.findings import Findings
    from prunekit.report.sentences import Sentence

# Characters that remarks need beside a table, and a width that no table has.
_REMARK, _UNBOUNDED = 20, 10_000
_BYTES = ("B", "kB", "MB", "GB", "TB")


def study_summary(study: Findings) -> RenderableType:
    """Every summary table of a study, and what it says in sentences."""
    from prunekit.report import contents, sentences

    parts: list[RenderableType] = []
    for found in contents.tables(study):
        parts += [Fitted(found.title, found.columns, found.rows), Text()]
    parts += [sentence(said) for said in sentences.describe(study)]
    return Group(*parts)


def sentence(said: Sentence) -> RenderableType:
    """One statement as a list item; ! marks a limit."""
    item = Table.grid(padding=(0, 1))
    item.add_row(Text("!" if said.warn else "·"), Text(said.text))
    return item


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
        lines: list[list[object]] = []
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
            lines.append([*cells, remark])
        parts += [Fitted(shape.title, ["", *once, *heads, ""], lines), Text()]
    return Group(*parts)


def facts(title: str, rows: Iterable[tuple[str, object]]) -> RenderableType:
    """Two columns: a name and a value."""
    made = plain_table(title, ("", ""))
    made.show_header = False
    for name, value in rows:
        made.add_row(Text(name), Text(str(value)))
    return made


def records(
    title: str, rows: Sequence[Mapping[str, Any]], spare: Sequence[str] = ()
) -> RenderableType:
    """Rows with the same keys, as a table; columns in `spare` go first on a narrow terminal."""
    columns = list(rows[0]) if rows else []
    return Fitted(title, columns, [list(row.values()) for row in rows], spare)


class Fitted:
    """A table that stays readable on a narrow terminal, where it would wrap every cell.

    It leaves out the remarks (a last column without a name), then the columns in `spare`, then the
    intervals of values; what is still too wide is listed row by row. A file gets all of it.

    Args:
        title: Its title.
        columns: Their names.
        rows: Cells, one per column.
        spare: Names of the columns to leave out, the first first.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        spare: Sequence[str] = (),
    ) -> None:
        self.title, self.columns, self.spare = title, list(columns), list(spare)
        self.rows = [list(row) for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the first form that fits."""
        shown = list(range(len(self.columns)))
        if not console.is_terminal or not shown:
            yield self._table(shown, options.max_width)
            return
        remarks = shown[-1:] if not self.columns[-1] else []
        plain = [index for index in shown if index not in remarks]
        width = options.max_width - (_REMARK if remarks else 0)
        if self._fits(plain, width, console, options):
            yield self._table(shown, options.max_width)  # remarks alone may wrap
            return
        for name in (None, *self.spare):
            plain = [index for index in plain if self.columns[index] != name]
            if self._fits(plain, options.max_width, console, options):
                yield self._table(plain, options.max_width)
                return
        if self._fits(plain, options.max_width, console, options, short=True):
            yield self._table(plain, options.max_width, short=True)
            yield Text("Intervals: on a wider terminal, in the page or with --json.", style="dim")
            return
        yield Text(self.title, style="bold")
        for row in self.rows:
            yield Text(f"{self.columns[0]} {row[0]}".strip(), style="bold")
            yield from (
                Text(f"  {self.columns[i]}: {row[i]}")
                for i in shown[1:]
                if i in plain and str(row[i])
            )

    def _table(self, shown: Sequence[int], width: int, *, short: bool = False) -> Table:
        made = plain_table(self.title, [self.columns[index] for index in shown])
        made.min_width = min(width, len(self.title))
        for row in self.rows:
            made.add_row(*(Text(_cell(row[index], short)) for index in shown))
        return made

    def _fits(
        self,
        shown: Sequence[int],
        width: int,
        console: Console,
        options: ConsoleOptions,
        *,
        short: bool = False,
    ) -> bool:
        table = self._table(shown, 0, short=short)
        unbounded = options.update_width(_UNBOUNDED)
        return Measurement.get(console, unbounded, table).maximum <= width


def _cell(cell: object, short: bool) -> str:
    from prunekit.report.summary_tables import Value

    return cell.short() if short and isinstance(cell, Value) else str(cell)


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
