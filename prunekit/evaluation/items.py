"""The built-in evaluation set, and users' own files in the same format.

`data/` holds multiple-choice items, open prompts and held-out prose, all written for this project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from prunekit.errors import PrunekitError
from prunekit.files.texts import clean, utf8

if TYPE_CHECKING:  # Python 3.10 keeps it elsewhere
    from importlib.resources.abc import Traversable


@dataclass(frozen=True)
class Choice:
    """A question with one right option.

    Attributes:
        id: Unique name.
        question: The question, without the options.
        options: Two or more different options (four in the built-in set).
        answer: Index of the right one.
        topic: Free label, may be empty.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    topic: str = ""


@dataclass(frozen=True)
class Prompt:
    """A request that is answered with free text.

    Attributes:
        id: Unique name.
        prompt: The request, without any chat template.
        topic: Free label, may be empty.
    """

    id: str
    prompt: str
    topic: str = ""


Item = TypeVar("Item", Choice, Prompt)


def load_choices(path: str | Path | None = None) -> list[Choice]:
    """Read multiple-choice items.

    Args:
        path: A .jsonl file (one object per line) or .json file (a list of objects) with the fields
            `question`, `options` (two or more strings), `answer` (index from 0), and optionally
            `id` and `topic`. None reads the built-in set.

    Raises:
        PrunekitError: The file is missing, unreadable or empty, or an item is malformed; the
            message names the file, the line and the fix.
    """
    source = _source(path, "choices.jsonl", (".jsonl", ".json"))
    choices = [_choice(where, number, record) for where, number, record in _records(source)]
    return _checked(source, choices)


def load_prompts(path: str | Path | None = None, field: str = "prompt") -> list[Prompt]:
    """Read open prompts.

    Args:
        path: A .jsonl or .json file of objects with the prompt in `field`, and optionally `id` and
            `topic`, or a .txt file with one prompt per line. None reads the built-in set.
        field: Field of the prompt in objects.

    Raises:
        PrunekitError: As in `load_choices`.
    """
    source = _source(path, "prompts.jsonl", (".jsonl", ".json", ".txt"))
    if source.name.lower().endswith(".txt"):
        lines = enumerate(_read(source).splitlines(), 1)
        prompts = [Prompt(str(number), text.strip()) for number, text in lines if text.strip()]
    else:
        prompts = [
            _prompt(where, number, record, field if path else "prompt")
            for where, number, record in _records(source)
        ]
    return _checked(source, prompts)


def load_heldout() -> str:
    """The built-in held-out text for perplexity: short pieces of original English prose."""
    return _read(_builtin("heldout.txt"))


def _builtin(name: str) -> Traversable:
    return resources.files("prunekit.evaluation") / "data" / name


def _source(path: str | Path | None, builtin: str, suffixes: tuple[str, ...]) -> Traversable:
    if path is None:
        return _builtin(builtin)
    file = Path(path)
    if file.suffix.lower() not in suffixes:
        raise PrunekitError(f"{file}: unknown kind of file; use {' or '.join(suffixes)}")
    if not file.is_file():
        raise PrunekitError(f"{file}: no such file; check the path")
    return file


def _read(source: Traversable) -> str:
    return utf8(source)


def _records(source: Traversable) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (where for messages, number from 1, object) of a .jsonl or .json file."""
    text = _read(source)
    if source.name.lower().endswith(".json"):
        document = _parse(source, 1, text)
        if not isinstance(document, list):
            _fail(f"{source}", "not a list", "put the objects in one [...] list, or use .jsonl")
        entries = [(f"{source}, item {i}", i, entry) for i, entry in enumerate(document, 1)]
    else:
        lines = enumerate(text.split("\n"), 1)  # a JSON string may hold other line separators
        entries = [
            (f"{source}, line {i}", i, _parse(source, i, line)) for i, line in lines if line.strip()
        ]
    for where, number, entry in entries:
        if not isinstance(entry, dict):
            _fail(where, "not a JSON object", 'write {"field": value, ...}')
        yield where, number, entry


def _parse(source: Traversable, line: int, text: str) -> Any:
    """Decode `text`, which starts at `line` of `source`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source}, line {line + error.lineno - 1}, column {error.colno}"
        raise PrunekitError(f"{where}: not valid JSON ({error.msg}); correct it there") from error


def _choice(where: str, number: int, record: dict[str, Any]) -> Choice:
    question = _text(where, record, "question")
    options = record.get("options")
    if not isinstance(options, list) or len(options) < 2:
        _fail(where, "'options' is not a list of two or more", 'write "options": ["...", "..."]')
    if not all(isinstance(option, str) and option.strip() for option in options):
        _fail(where, "an option is empty or not text", "write each option as a non-empty string")
    options = tuple(clean(option.strip()) for option in options)
    if len(set(options)) < len(options):
        _fail(where, "two options are the same", "make every option different")
    answer = record.get("answer")
    if type(answer) is not int or not 0 <= answer < len(options):
        found = json.dumps(answer)
        _fail(where, f"'answer' is {found}", f"use an index from 0 to {len(options) - 1}")
    return Choice(_id(where, number, record), question, options, answer, _topic(where, record))


def _prompt(where: str, number: int, record: dict[str, Any], field: str) -> Prompt:
    text = _text(where, record, field)
    return Prompt(_id(where, number, record), text, _topic(where, record))


def _text(where: str, record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        found = ", ".join(map(str, record)) or "none"
        _fail(where, f"'{field}' is missing or empty (fields: {found})", f'add "{field}": "..."')
    return clean(value.strip())


def _id(where: str, number: int, record: dict[str, Any]) -> str:
    value = record.get("id", str(number))
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        _fail(where, "'id' is not a text or a whole number", "correct it or leave it out")
    return clean(str(value))


def _topic(where: str, record: dict[str, Any]) -> str:
    value = record.get("topic", "")
    if not isinstance(value, str):
        _fail(where, "'topic' is not text", "correct it or leave it out")
    return clean(value)


def _checked(source: Traversable, items: list[Item]) -> list[Item]:
    if not items:
        _fail(f"{source}", "no items", "add at least one")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            _fail(f"{source}", f"the id {item.id!r} occurs twice", "make ids unique")
        seen.add(item.id)
    return items


def _fail(where: str, what: str, fix: str) -> NoReturn:
    raise PrunekitError(f"{where}: {what}; {fix}")
