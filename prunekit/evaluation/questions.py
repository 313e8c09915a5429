"""Questions that are answered with generated text, and files of them in their usual layouts.

| layout              | question           | answer                                            |
|---------------------|--------------------|---------------------------------------------------|
| GSM8K               | `question`         | `answer`: a solution that ends in `#### N`        |
| MAWPS (AddSub, …)   | `sQuestion`        | `lSolutions`: a list of one number                |
| SVAMP               | `Body`, `Question` | `Answer`: a number                                |
| LLM-Adapters        | `instruction`      | `answer`: a number                                |
| MATH                | `problem`          | `answer`, or `solution` with a `\\boxed{…}`        |
| any                 | `question`         | `answer`: a number or a text                      |

Fields of another name are mapped by name (`question_field`, `answer_field`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prunekit.errors import PrunekitError
from prunekit.evaluation import records
from prunekit.evaluation.extraction import right_answer
from prunekit.files.texts import clean


@dataclass(frozen=True)
class Question:
    """A question with the answer that a generated text must end with.

    Attributes:
        id: Unique name.
        question: The question.
        answer: The right answer: a number or a short text.
        worked: The answer as an example shows it: the whole solution where the file has one.
        topic: Free label, may be empty.
    """

    id: str
    question: str
    answer: str
    worked: str
    topic: str = ""


class Layout(NamedTuple):
    """Fields of a file: those that are joined to the question, and the answer's."""

    name: str
    question: tuple[str, ...]
    answer: str


#: Layouts in the order in which a file's first item is matched with them.
LAYOUTS = (
    Layout("MAWPS", ("sQuestion",), "lSolutions"),
    Layout("SVAMP", ("Body", "Question"), "Answer"),
    Layout("MATH", ("problem",), "answer"),
    Layout("MATH", ("problem",), "solution"),
    Layout("LLM-Adapters", ("instruction",), "answer"),
    Layout("question and answer", ("question",), "answer"),
)
# GSM8K's notes for a calculator, which are no part of a solution: 2 + 3 = <<2+3=5>>5
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def load_questions(
    path: str | Path | None = None,
    *,
    question_field: str | None = None,
    answer_field: str | None = None,
) -> list[Question]:
    """Read questions with their answers; the layout is known by the fields of the first item.

    Args:
        path: A .jsonl file (one object per line) or .json file (a list of objects), in one of
            `LAYOUTS`; `id` and `topic` may be there too. None reads the built-in set.
        question_field: Field of the question, instead of the layout's.
        answer_field: Field of the answer, instead of the layout's.

    Raises:
        PrunekitError: The file is missing, unreadable or empty, its layout is unknown, or an item
            has no question or no answer; the message names the file, the line and the fix.
    """
    source = records.located(path, "questions.jsonl", (".jsonl", ".json"))
    layout: Layout | None = None
    found = []
    for where, number, record in records.records(source):
        layout = layout or _layout(where, record, question_field, answer_field)
        found.append(_question(where, number, record, layout))
    return records.unique(source, found)


def split_examples(
    questions: Sequence[Question], count: int
) -> tuple[list[Question], list[Question]]:
    """The first `count` questions as examples, and the others to be asked.

    Raises:
        PrunekitError: Nothing would be left to ask.
    """
    if count >= len(questions):
        raise PrunekitError(
            f"{count} examples of {len(questions)} questions leave none to ask: use fewer, or "
            "take the examples from another file"
        )
    return list(questions[:count]), list(questions[count:])


def _layout(where: str, record: dict[str, Any], question: str | None, answer: str | None) -> Layout:
    for known in LAYOUTS:
        asked = (question,) if question else known.question
        given = answer or known.answer
        if given in record and all(name in record for name in asked):
            return Layout(known.name, asked, given)
    fields = ", ".join(map(str, record)) or "none"
    records.fail(
        where,
        f"no question with an answer in the fields {fields}",
        "name them with --question-field and --answer-field (question_field, answer_field)",
    )


def _question(where: str, number: int, record: dict[str, Any], layout: Layout) -> Question:
    question = " ".join(records.text_of(where, record, name) for name in layout.question)
    worked = _worked(where, record, layout.answer)
    answer = right_answer(worked)
    if answer is None:
        records.fail(
            where,
            f"'{layout.answer}' has several lines and marks no answer",
            "end it with a line such as '#### 5'",
        )
    own = records.id_of(where, number, {**record, "id": record.get("id", record.get("ID", number))})
    return Question(own, question, answer, worked, records.topic_of(where, record))


def _worked(where: str, record: dict[str, Any], field: str) -> str:
    """The answer's field as text: numbers as they are read, 8.0 as 8."""
    value = record.get(field)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        records.fail(
            where,
            f"'{field}' holds no answer ({records.fields_of(record)})",
            f'write "{field}": "..." or a number',
        )
    return clean(_CALCULATOR.sub("", value).strip())
