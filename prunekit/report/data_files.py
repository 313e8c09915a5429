"""Results as files: CSV of lines, data that JSON can hold, several files written one by one."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.files.atomic import replaced_file


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """CSV of lines by column; columns stand in the order in which lines name them."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    made = io.StringIO()
    writer = csv.DictWriter(made, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return made.getvalue()


def finite(data: Any) -> Any:
    """The same data with None for what JSON can't write, such as the perplexity of a ruin."""
    if isinstance(data, Mapping):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, which is made; each replaces its former self, whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with replaced_file(folder / name) as written:
            written.write_text(text, encoding="utf-8", errors="backslashreplace")
