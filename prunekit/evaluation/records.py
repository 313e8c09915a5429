"""Files of items, one JSON object each: read, located, and refused with the line and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from prunekit.errors import PrunekitError
from prunekit.files.texts import clean, utf8

if TYPE_CHECKING:  # Python 3.10 keeps it elsewhere
    from importlib.resources.abc import Traversable


class Named(Protocol):
    """What has a unique name."""

    @property
    def id(self) -> str:
        """Its name."""


Item = TypeVar("Item", bound=Named)


def builtin(name: str) -> Traversable:
    """A file that comes with prunekit."""
    return resources.files("prunekit.evaluation") / "data" / name


def located(path: str | Path | None, default: str, suffixes: tuple[str, ...]) -> Traversable:
    """The file of items, or the built-in `default` without a path.

    Raises:
        PrunekitError: It is missing, or of another kind than `suffixes`.
    """
    if path is None:
        return builtin(default)
    file = Path(path)
    if file.suffix.lower() not in suffixes:
        raise PrunekitError(f"{file}: unknown kind of file; use {' or '.join(suffixes)}")
    if not file.is_file():
        raise PrunekitError(f"{file}: no such file; check the path")
    return file


def records(source: Traversable) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (where for messages, number from 1, object) of a .jsonl or .json file."""
    text = utf8(source)
    if source.name.lower().endswith(".json"):
        document = _parse(source, 1, text)
        if not isinstance(document, list):
            fail(f"{source}", "not a list", "put the objects in one [...] list, or use .jsonl")
        entries = [(f"{source}, item {i}", i, entry) for i, entry in enumerate(document, 1)]
    else:
        lines = enumerate(text.split("\n"), 1)  # a JSON string may hold other line separators
        entries = [
            (f"{source}, line {i}", i, _parse(source, i, line)) for i, line in lines if line.strip()
        ]
    for where, number, entry in entries:
        if not isinstance(entry, dict):
            fail(where, "not a JSON object", 'write {"field": value, ...}')
        yield where, number, entry


def _parse(source: Traversable, line: int, text: str) -> Any:
    """Decode `text`, which starts at `line` of `source`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source}, line {line + error.lineno - 1}, column {error.colno}"
        raise PrunekitError(f"{where}: not valid JSON ({error.msg}); correct it there") from error


def text_of(where: str, record: dict[str, Any], field: str) -> str:
    """A field that must hold a text."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        fail(where, f"'{field}' is missing or empty ({fields_of(record)})", f'add "{field}": "..."')
    return clean(value.strip())


def fields_of(record: dict[str, Any]) -> str:
    """What a file in another layout holds, for messages."""
    return f"fields: {', '.join(map(str, record)) or 'none'}"


def id_of(where: str, number: int, record: dict[str, Any]) -> str:
    """An item's id, its number without one."""
    value = record.get("id", str(number))
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        fail(where, "'id' is not a text or a whole number", "correct it or leave it out")
    return clean(str(value))


def topic_of(where: str, record: dict[str, Any]) -> str:
    """An item's topic, or ""."""
    value = record.get("topic", "")
    if not isinstance(value, str):
        fail(where, "'topic' is not text", "correct it or leave it out")
    return clean(value)


def unique(source: Traversable, items: list[Item]) -> list[Item]:
    """`items` of `source`, of which there must be some, with ids that differ."""
    if not items:
        fail(f"{source}", "no items", "add at least one")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            fail(f"{source}", f"the id {item.id!r} occurs twice", "make ids unique")
        seen.add(item.id)
    return items


def fail(where: str, what: str, fix: str) -> NoReturn:
    """Raise a PrunekitError in the words that all files of items share."""
    raise PrunekitError(f"{where}: {what}; {fix}")
