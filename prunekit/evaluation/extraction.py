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

# 1,472.50, -3, 3/4; a minus behind a digit is an operator
_NUMBER = re.compile(r"(?:(?<![\d.)])[-−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
_ANSWER_IS = re.compile(r"answer(?:\s+is|\s*:)\s*", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def right_answer(worked: str) -> str | None:
    """The answer that a file's `worked` solution ends with, or the whole of a text of one line.

    Returns:
        A number as written, without sign of currency or thousands' commas; or a text; None where
        several lines mark no answer by `####`, `\\boxed{…}` or "answer is".
    """
    marked = _marked(worked)
    if marked is not None:
        return _first(marked)
    return _first_line(worked) if len(worked.strip().splitlines()) == 1 else None


def given_answer(text: str, right: str) -> str | None:
    """The answer that a generated `text` gives, of the kind of the `right` one; None for none."""
    marked = _marked(text)
    if as_number(right) is None:
        return _first_line(text if marked is None else marked)
    found = None if marked is None else _first(marked)
    if found is not None and as_number(found) is not None:
        return found
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _marked(text: str) -> str | None:
    """What stands behind the last mark of an answer, or in it; None without any."""
    if "####" in text:
        return text.rpartition("####")[2]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    marks = list(_ANSWER_IS.finditer(text))
    return text[marks[-1].end() :] if marks else None


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


def _first(text: str) -> str | None:
    """The number that a marked answer begins with, or its first line."""
    line = _first_line(text)
    if line is None:
        return None
    numbers = _numbers(line)
    bare = re.sub(r"^[\s$€£*(\\]+", "", line)
    return numbers[0] if numbers and bare.startswith(numbers[0][:1]) else line


def _numbers(text: str) -> list[str]:
    return [match.group().replace(",", "") for match in _NUMBER.finditer(text)]


def _first_line(text: str) -> str | None:
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if line), None)
    return line.rstrip(".") or None if line else None


def _last_boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` holds, braces inside it balanced; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin + 1 : place]
    return text[begin + 1 :]


def _normalised(text: str) -> str:
    bare = "".join(" " if sign in string.punctuation else sign for sign in text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())
