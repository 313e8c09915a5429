"""The one exception a user is meant to see."""

from __future__ import annotations


class PrunekitError(ValueError):
    """Bad input, said in one line that names the fix. The command line exits with status 2."""
