"""Answers in texts, by the rules of the literature, and when two are the same."""

from __future__ import annotations

import pytest

from prunekit.evaluation.extraction import (
    answer_end,
    as_number,
    given_answer,
    right_answer,
    same_answer,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She eats 3 + 4 = 7 eggs.", "7"),
        ("3 and 4.\n#### 1,234", "1234"),
        ("#### 5\nQuestion 9", "5"),
        (r"so \boxed{42} and no 7", "42"),
        (r"first \boxed{1}, then \boxed{3/4}", "3/4"),
        ("The answer is $1,472.50. Next: 8", "1472.50"),
        ("The answer is 72 apples", "72"),
        ("The answer is **18**", "18"),
        ("Answer: -3.", "-3"),
        ("It falls from 4 to −5", "−5"),
        ("between 2-3", "3"),
        ("(1)-2", "2"),
        ("The answer is unknown, maybe 6", "6"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_gives(text, number):
    assert given_answer(text, right="1") == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris", "Paris"),
        ("Paris.\nQuestion: 3", "Paris"),
        ("I think of 7.\nThe answer is Paris.", "Paris"),
        (r"\boxed{x^{2}+1} is it", "x^{2}+1"),
        ("\n \n", None),
    ],
)
def test_the_text_that_a_text_gives(text, answer):
    assert given_answer(text, right="Rome") == answer


@pytest.mark.parametrize(
    ("until", "after"),
    [
        ("She eats 7 ", "apples"),
        ("7\n", "Question: next"),
        ("7. ", "So"),  # 7.5 is ruled out by the space only
        ("1,472,", None),
        ("3/4)", " of it"),
        ("-3.5%", ""),
        ("so \\boxed{42}", " is it"),
        ("The answer is $1,472.50 ", "in all\nand more"),
        ("#### 5", None),
        ("maybe 7", None),
        ("no number", None),
    ],
)
def test_where_a_number_is_complete(until, after):
    text = until + (after or "")
    assert answer_end(text, right="1") == (None if after is None else len(until))


@pytest.mark.parametrize(
    ("until", "after"),
    [
        ("\n Paris.\n", "Question: 3"),
        ("Paris and Rome", None),
        ("I think.\nThe answer is Paris\n", "\n"),
        ("\\boxed{x^{2}}", "+1"),
        ("\n\n", None),
    ],
)
def test_where_a_text_is_complete(until, after):
    text = until + (after or "")
    assert answer_end(text, right="Rome") == (None if after is None else len(until))


def test_the_right_answer_of_a_solution():
    assert right_answer("2 + 3 = 5\n#### 5") == "5"
    assert right_answer(r"Hence $x = \boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert right_answer("World War 2") == "World War 2"
    assert right_answer("first 1\nthen 2") is None  # which of them?


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,472.00", "1472", True),
        ("3/4", "0.75", True),
        ("$5", "5", True),
        ("0.1", "0.10000000000000001", False),  # exact, not as floats
        ("-3", "−3", True),
        ("1/0", "1/0", True),  # no numbers: the same text
        ("The Eiffel Tower", "eiffel tower.", True),
        ("Rome", "Romes", False),
        ("5", "five", False),
        (None, None, False),
    ],
)
def test_same_answers(one, other, same):
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


def test_what_is_no_number():
    assert as_number("1/0") is None and as_number("12 men") is None and as_number("") is None
