"""The built-in evaluation set, and users' own files in the same format.

`data/` holds multiple-choice items, open prompts and held-out prose, all written for this project.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.evaluation.records import (
    builtin,
    fail,
    fields_of,
    id_of,
    located,
    records,
    text_of,
    topic_of,
    unique,
)
from prunekit.files.texts import clean, utf8


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
    source = located(path, "choices.jsonl", (".jsonl", ".json"))
    choices = [_choice(where, number, record) for where, number, record in records(source)]
    return unique(source, choices)


def load_prompts(path: str | Path | None = None, field: str = "prompt") -> list[Prompt]:
    """Read open prompts.

    Args:
        path: A .jsonl or .json file of objects with the prompt in `field`, and optionally `id` and
            `topic`, or a .txt file with one prompt per line. None reads the built-in set.
        field: Field of the prompt in objects.

    Raises:
        PrunekitError: As in `load_choices`.
    """
    source = located(path, "prompts.jsonl", (".jsonl", ".json", ".txt"))
    if source.name.lower().endswith(".txt"):
        lines = enumerate(utf8(source).splitlines(), 1)
        prompts = [Prompt(str(number), text.strip()) for number, text in lines if text.strip()]
    else:
        prompts = [
            _prompt(where, number, record, field if path else "prompt")
            for where, number, record in records(source)
        ]
    return unique(source, prompts)


def load_heldout() -> str:
    """The built-in held-out text for perplexity: short pieces of original English prose."""
    return utf8(builtin("heldout.txt"))


def _choice(where: str, number: int, record: dict[str, Any]) -> Choice:
    question = text_of(where, record, "question")
    options = record.get("options")
    if not isinstance(options, list) or len(options) < 2:
        found = f"'options' is not a list of two or more ({fields_of(record)})"
        fail(where, found, 'write "options": ["...", "..."]')
    if not all(isinstance(option, str) and option.strip() for option in options):
        fail(where, "an option is empty or not text", "write each option as a non-empty string")
    options = tuple(clean(option.strip()) for option in options)
    if len(set(options)) < len(options):
        fail(where, "two options are the same", "make every option different")
    answer = record.get("answer")
    if type(answer) is not int or not 0 <= answer < len(options):
        found = json.dumps(answer) if "answer" in record else f"missing ({fields_of(record)})"
        fail(where, f"'answer' is {found}", f"use an index from 0 to {len(options) - 1}")
    return Choice(id_of(where, number, record), question, options, answer, topic_of(where, record))


def _prompt(where: str, number: int, record: dict[str, Any], field: str) -> Prompt:
    text = text_of(where, record, field)
    return Prompt(id_of(where, number, record), text, topic_of(where, record))
