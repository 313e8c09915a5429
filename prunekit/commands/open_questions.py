"""Options of questions that are answered with text, and the questions that they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.evaluation.answering import Asking
    from prunekit.evaluation.questions import Question


def add_arguments(group: Any, default: str = "builtin") -> None:
    """Add the options; `default` is what is asked without --generate."""
    group.add_argument(
        "--generate",
        metavar="FILE",
        default=default,
        help=f"questions to be answered with text: a file, 'builtin' or 'none' ({default})",
    )
    group.add_argument("--question-field", help="field of the question (known by the layout)")
    group.add_argument("--answer-field", help="field of its answer (known by the layout)")
    group.add_argument(
        "--examples", type=options.whole, default=8, help="shown before each open question (8)"
    )
    group.add_argument(
        "--examples-from", metavar="FILE", help="another file for them (the first of the same)"
    )
    group.add_argument(
        "--answer-tokens", type=options.positive, default=64, help="longest answer (64)"
    )


def load(args: argparse.Namespace, batch_size: int) -> tuple[list[Question], Asking]:
    """The questions, at most --limit of them, and how they are asked.

    Raises:
        PrunekitError: --generate names no file, the file can't be read, its layout is unknown, or
            no question is left.
    """
    from prunekit.evaluation.answering import Asking
    from prunekit.evaluation.questions import load_questions, split_examples

    if args.generate == "none":
        return [], Asking()
    if args.generate != "builtin" and not Path(args.generate).suffix:
        raise PrunekitError(
            f"--generate {args.generate}: give a file of questions (.jsonl or .json), 'builtin' or "
            "'none'; how many are asked is --limit, and how long an answer may be --answer-tokens"
        )
    fields = {"question_field": args.question_field, "answer_field": args.answer_field}
    questions = load_questions(None if args.generate == "builtin" else args.generate, **fields)
    if args.examples_from is not None:
        examples = load_questions(args.examples_from, **fields)[: args.examples]
    else:
        examples, questions = split_examples(questions, args.examples)
    asking = Asking(tuple(examples), args.answer_tokens, batch_size)
    return questions[: args.limit], asking
