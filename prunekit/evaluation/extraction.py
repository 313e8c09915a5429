"""What a text gives as its answer, and whether two answers are the same.

The rules of the literature, in this order: what stands behind the last `####` (GSM8K, Cobbe et al.
2021, arXiv 2110.14168), in the last `\\boxed{…}` (MATH, Hendrycks et al. 2021, arXiv 2103.03874),
behind the last "answer is" (chain of thought, Wei et al. 2022, arXiv 2201.11903), and else the last
number (Kojima et al. 2022, arXiv 2205.11916; lm-eval's "flexible-extract"), or the first line where
the right answer is no number.
"""

from __future__ import annotations

import re
import string
from fractions import Fraction
from typing import TypeAlias

# 1,472.50, -3, 3/4; a minus behind a digit is an operator
_NUMBER = re.compile(r"(?:(?<![\d.)])[-−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
_ANSWER_IS = re.compile(r"answer(?:\s+is|\s*:)\s*", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# What ends a number: nothing that could go on as 7.5, 7,000 or 7/4; and what ends a line or a box.
_NO_DIGIT = re.compile(r"[^\d.,/]|[.,/]\D")
_SIGN = re.compile(r".", re.DOTALL)

#: An answer, and where it ends in its text.
_Found: TypeAlias = tuple[str, int]


def right_answer(worked: str) -> str | None:
    """The answer that a file's `worked` solution ends with, or the whole of a text of one line.

    Returns:
        A number as written, without sign of currency or thousands' commas; or a text; None where
        several lines mark no answer by `####`, `\\boxed{…}` or "answer is".
    """
    marked = _marked(worked)
    if marked is not None:
        found = _first(worked, *marked)
    else:
        found = _first_line(worked) if len(worked.strip().splitlines()) == 1 else None
    return None if found is None else found[0]


def given_answer(text: str, right: str) -> str | None:
    """The answer that a generated `text` gives, of the kind of the `right` one; None for none."""
    found = _given(text, right)
    return None if found is None else found[0]


def answer_end(text: str, right: str) -> int | None:
    """Where in `text` the answer that it gives is complete: behind the sign that ends it.

    A number ends where no digit can follow, a line with its line break, a box with its brace.

    Returns:
        The number of leading characters; None where only the end of the text ends the answer, or
        it gives none.
    """
    found = _given(text, right)
    if found is None:
        return None
    ended = (_SIGN if as_number(right) is None else _NO_DIGIT).match(text, found[1])
    return None if ended is None else ended.end()


def _given(text: str, right: str) -> _Found | None:
    """The answer of `text`, of the kind of the `right` one."""
    marked = _marked(text)
    if as_number(right) is None:
        return _first_line(text, *(marked or ()))
    found = None if marked is None else _first(text, *marked)
    if found is not None and as_number(found[0]) is not None:
        return found
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _marked(text: str) -> tuple[int, int] | None:
    """Where what stands behind the last mark of an answer, or in it, begins and ends."""
    mark = text.rfind("####")
    if mark >= 0:
        return mark + len("####"), len(text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    marks = list(_ANSWER_IS.finditer(text))
    return (marks[-1].end(), len(text)) if marks else None


def same_answer(one: str | None, other: str | None) -> bool:
    """Whether two answers are the same: as numbers, or as texts by SQuAD's normalisation.

    Numbers are compared exactly (1,472.00 = 1472, 3/4 = 0.75). Texts are compared in lower case,
    without punctuation, articles and surplus spaces (Rajpurkar et al. 2016, arXiv 1606.05250).
    No answer equals nothing.
    """
    if one is None or other is None:
        return False
    numbers = as_number(one), as_number(other)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _normalised(one) == _normalised(other)


def as_number(answer: str) -> Fraction | None:
    """The number that an answer is, or None."""
    bare = answer.strip().strip("$€£% ").rstrip(".").replace(",", "").replace("−", "-")
    bare = bare.replace(" ", "")
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None


def _first(text: str, start: int, stop: int) -> _Found | None:
    """The number that a marked answer begins with, or its first line."""
    line = _first_line(text, start, stop)
    if line is None:
        return None
    numbers = _numbers(text, start, line[1])
    bare = re.sub(r"^[\s$€£*(\\]+", "", line[0])
    return numbers[0] if numbers and bare.startswith(numbers[0][0][:1]) else line


def _numbers(text: str, start: int = 0, stop: int | None = None) -> list[_Found]:
    found = _NUMBER.finditer(text[start:stop])
    return [(match.group().replace(",", ""), start + match.end()) for match in found]


def _first_line(text: str, start: int = 0, stop: int | None = None) -> _Found | None:
    """The first line that is not empty, without its full stop; it ends before its break."""
    place, part = start, text[start:stop]
    for line, whole in zip(part.splitlines(), part.splitlines(keepends=True), strict=True):
        if line.strip():
            answer = line.strip().rstrip(".")
            return (answer, place + len(line)) if answer else None
        place += len(whole)
    return None


def _last_boxed(text: str) -> tuple[int, int] | None:
    """Where what the last `\\boxed{…}` holds begins and ends, braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return begin + 1, place
    return begin + 1, len(text)


def _normalised(text: str) -> str:
    bare = "".join(" " if sign in string.punctuation else sign for sign in text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())
