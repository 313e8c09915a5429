"""Prompts and questions: the built-in set, files of one's own, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from prunekit.errors import PrunekitError
from prunekit.evaluation.items import (
    Choice,
    Prompt,
    load_choices,
    load_heldout,
    load_prompts,
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_user_files(tmp_path: Path) -> None:
    item = {"question": " Which? ", "options": ["a", "b"], "answer": 1}
    expected = Choice("1", "Which?", ("a", "b"), 1)
    line = json.dumps(item)
    assert load_choices(write(tmp_path, "a.jsonl", f"\ufeff{line}\n\n")) == [expected]
    assert load_choices(write(tmp_path, "a.json", f"[{line}]")) == [expected]
    assert load_prompts(write(tmp_path, "p.txt", "Say hi.\n\n  Count to ten. \n")) == [
        Prompt("1", "Say hi."),
        Prompt("3", "Count to ten."),
    ]
    line = json.dumps({"id": 7, "prompt": "Go on.", "topic": "t"})
    assert load_prompts(write(tmp_path, "p.jsonl", line)) == [Prompt("7", "Go on.", "t")]


def test_prompts_are_read_from_the_field_that_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", json.dumps({"question": "Why?", "answer": "So."}))
    assert [item.prompt for item in load_prompts(path, "question")] == ["Why?"]
    with pytest.raises(
        PrunekitError, match=r"'prompt' is missing or empty \(fields: question, answer"
    ):
        load_prompts(path)
    assert load_prompts(None, "question") == load_prompts()  # the built-in set has its own field


GOOD = '{"question": "q", "options": ["a", "b"], "answer": 0}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "use .jsonl or .json"),
        ("x.jsonl", "\n", "no items; add at least one"),
        ("x.jsonl", GOOD + "\n{", r"line 2, column 2: not valid JSON .*; correct it there"),
        ("x.json", "[\n" + GOOD + ",\n]", r"line 3, column 1: not valid JSON"),
        ("x.json", GOOD, r"put the objects in one \[...\] list, or use .jsonl"),
        ("x.jsonl", GOOD + "\n3", "line 2: not a JSON object"),
        (
            "x.jsonl",
            GOOD.replace('"q"', '" "'),
            r"line 1: 'question' is missing or empty \(fields: question",
        ),
        (
            "x.jsonl",
            GOOD.replace(', "b"', ""),
            r"line 1: 'options' is not a list of two or more \(fields: question, options, answer\)",
        ),
        (
            "x.jsonl",
            GOOD.replace("answer", "answerKey"),
            r"line 1: 'answer' is missing \(fields: question, options, answerKey\); use an index",
        ),
        ("x.jsonl", GOOD.replace('"b"', "4"), "line 1: an option is empty or not text"),
        ("x.jsonl", GOOD.replace('"b"', '" a"'), "line 1: two options are the same"),
        ("x.jsonl", GOOD.replace("0}", "2}"), "line 1: 'answer' is 2; use an index from 0 to 1"),
        ("x.jsonl", GOOD.replace("0}", "true}"), "line 1: 'answer' is true; use an index"),
        ("x.json", "[" + GOOD.replace("0}", "null}") + "]", "item 1: 'answer' is null; use"),
        ("x.jsonl", GOOD[:-1] + ', "id": []}', "line 1: 'id' is not a text"),
        ("x.jsonl", GOOD[:-1] + ', "topic": 3}', "line 1: 'topic' is not text"),
        ("x.jsonl", (GOOD[:-1] + ', "id": "s"}\n') * 2, "the id 's' occurs twice"),
    ],
    ids=str,
)
def test_bad_files_name_the_place_and_the_fix(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(PrunekitError, match=message) as caught:
        load_choices(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PrunekitError, match="no such file; check the path"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PrunekitError, match=r"not UTF-8 text \(byte 3\): save it as UTF-8"):
        load_prompts(tmp_path / "latin.txt")


def test_built_in_data_is_sane() -> None:
    choices, prompts = load_choices(), load_prompts()
    assert len(choices) >= 72 and len(prompts) >= 32
    assert len({choice.question for choice in choices}) == len(choices)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    for choice in choices:
        assert len(choice.options) == 4 and choice.topic
        assert len({option.casefold() for option in choice.options}) == 4
    positions = Counter(choice.answer for choice in choices)
    assert max(positions.values()) - min(positions.values()) <= 1
    # The right option must not give itself away by its length.
    longest = sum(
        all(len(o) < len(c.options[c.answer]) for i, o in enumerate(c.options) if i != c.answer)
        for c in choices
    )
    assert longest / len(choices) < 0.4
    assert 12_000 <= len(load_heldout().encode()) <= 20_000
    assert load_heldout().isascii()
