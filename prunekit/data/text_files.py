"""Read texts from local files, or from a Hub dataset that the user names.

A .txt file is one text. .jsonl (one object or string per line), .json (a list of objects or of
strings) and .parquet hold one text per row. Nothing is downloaded unless the source is a Hub
dataset id, and then through `datasets`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import PrunekitError, install
from prunekit.files.texts import clean, utf8

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SHUFFLE_BUFFER = 1000  # documents of a streamed dataset that are shuffled among each other


def read(source: str, *, text_field: str = "text", seed: int = 0) -> Iterable[str]:
    """Texts of `source`, in random order.

    Args:
        source: Path of a .txt, .jsonl, .json or .parquet file, or a Hub dataset id such as
            `allenai/c4:en` (owner/name, then optionally a configuration; its train split).
        text_field: Field or column that holds the text.
        seed: Seed of the order.

    Returns:
        The texts: a list for a file, a stream for a Hub dataset.

    Raises:
        PrunekitError: Not found, not readable, not in its format, or without any text.
    """
    if is_hub_id(source):
        return _stream_hub(source, text_field, seed)
    texts = read_file(source, text_field=text_field)
    random.Random(seed).shuffle(texts)
    return texts


def is_hub_id(source: str) -> bool:
    """Whether `source` can only mean a dataset on the Hub: no file, no file's name, no folder."""
    path = Path(source).expanduser()
    local = path.suffix in SUFFIXES or path.exists() or (path.parent.name and path.parent.is_dir())
    return not local and _HUB_ID.fullmatch(source) is not None


def read_file(source: str | Path, *, text_field: str = "text") -> list[str]:
    """All non-blank texts of a local file, in its order.

    Raises:
        PrunekitError: See `read`; the message names the line or row at fault.
    """
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise PrunekitError(
            f"'{source}' is no text source: give a {', '.join(SUFFIXES)} file, or a Hub dataset id "
            "(owner/name)"
        )
    if not path.is_file():
        raise PrunekitError(f"'{source}' does not exist: check the path")
    if path.suffix == ".parquet":
        texts = _parquet(path, text_field)
    else:
        content = utf8(path)
        parse = {".txt": _plain, ".jsonl": _json_lines, ".json": _json}[path.suffix]
        texts = parse(content, str(source), text_field)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise PrunekitError(f"'{source}' holds no text: give a file with some")
    return texts


def _plain(content: str, source: str, text_field: str) -> list[str]:
    return [content]


def _json_lines(content: str, source: str, text_field: str) -> list[str]:
    texts = []
    # not splitlines(): JSON strings may hold U+2028 and other line separators unescaped
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"'{source}' line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PrunekitError(f"{where} is no valid JSON ({error.msg}): fix it") from None
        texts.append(_text_of(row, text_field, where))
    return texts


def _json(content: str, source: str, text_field: str) -> list[str]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise PrunekitError(
            f"'{source}' line {error.lineno} is no valid JSON ({error.msg}): fix it"
        ) from None
    if not isinstance(rows, list):
        raise PrunekitError(
            f"'{source}' holds a JSON {type(rows).__name__}: give a list of objects or of strings"
        )
    return [
        _text_of(row, text_field, f"'{source}' item {number}")
        for number, row in enumerate(rows, start=1)
    ]


def _parquet(path: Path, text_field: str) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise PrunekitError(
            f"'{path}' needs pyarrow: give a .jsonl file, or run {install('parquet')}"
        ) from None
    try:
        names = parquet.read_schema(path).names
        if text_field not in names:
            raise _no_field(f"'{path}'", text_field, names)
        column: list[Any] = parquet.read_table(path, columns=[text_field])[text_field].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PrunekitError(
            f"'{path}' is no readable parquet file ({str(error).splitlines()[0]}): check it"
        ) from None
    return [
        _text_of({text_field: value}, text_field, f"'{path}' row {number}")
        for number, value in enumerate(column, start=1)
    ]


def _stream_hub(source: str, text_field: str, seed: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise PrunekitError(
            f"'{source}' names a Hub dataset, which needs the datasets package: give a local file, "
            f"or run {install('datasets')}"
        ) from None
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        shuffled = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for number, row in enumerate(shuffled, start=1):
            yield _text_of(row, text_field, f"'{source}' row {number}")
    except PrunekitError:
        raise
    except Exception as error:  # whatever the network, the Hub or the data set's format does
        raise PrunekitError(
            f"Hub dataset '{source}' can't be read ({str(error).splitlines()[0]}): check its name "
            "and the network, or give a local file"
        ) from None


def _text_of(row: Any, text_field: str, where: str) -> str:
    """The text of one row, which is a string or an object with a text field."""
    if isinstance(row, dict):
        if text_field not in row:
            raise _no_field(where, text_field, list(row))
        row = row[text_field]
    if not isinstance(row, str):
        raise PrunekitError(
            f"{where} holds {type(row).__name__} where text is expected: give strings, or name "
            "another text_field"
        )
    return clean(row)


def _no_field(where: str, text_field: str, names: Sequence[str]) -> PrunekitError:
    return PrunekitError(
        f"{where} has no field '{text_field}': set text_field to one of {', '.join(names)}"
    )
