"""Work that several processes do together, and that fails in all of them if it does in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prunekit.errors import PrunekitError, one_line
from prunekit.process import distributed

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """What `work` returns here, after every process has finished its own.

    Raises:
        PrunekitError: It failed in another process.
        Exception: What it raised in this one.
    """
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must not wait for ever
        distributed.gather([one_line(error)])
        raise
    told = next((each for each in distributed.gather([""]) if each), "")
    if told:
        raise PrunekitError(told)
    return result


def by_main(work: Callable[[], object]) -> None:
    """Let process 0 do something, and the others wait for it."""
    together(lambda: work() if distributed.is_main() else None)
