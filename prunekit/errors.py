"""The one exception a user is meant to see, and how errors are quoted in it."""

from __future__ import annotations


class PrunekitError(ValueError):
    """Bad input, said in one line that names the fix. The command line exits with status 2."""


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks; its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
