"""The one exception a user is meant to see, and how errors are quoted in it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


class PrunekitError(ValueError):
    """Bad input, said in one line that names the fix. The command line exits with status 2."""


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks; its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def install(extra: str) -> str:
    """The command that installs an optional part of prunekit for this very interpreter."""
    checkout = Path(__file__).resolve().parents[1]
    editable = (checkout / "pyproject.toml").is_file()
    what = f"-e {shlex.quote(f'{checkout}[{extra}]')}" if editable else f"'prunekit[{extra}]'"
    return f"{shlex.quote(sys.executable)} -m pip install {what}"
