"""Work that several processes do together, and that fails in all of them if it does in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prunekit.errors import PrunekitError, one_line
from prunekit.process import distributed

T = TypeVar("T")
# What a model, its files or a metric op may fail with; a bug in prunekit is none of these.
FAILURES = (PrunekitError, OSError, RuntimeError, ValueError, MemoryError)


def together(work: Callable[[], T]) -> T:
    """What `work` returns here, after every process has finished its own.

    Raises:
        PrunekitError: It failed in another process.
        Exception: What it raised in this one.
    """
    try:
        result = work()
    except FAILURES as error:
        distributed.gather([one_line(error)])
        raise
    told = next((each for each in distributed.gather([""]) if each), "")
    if told:
        raise PrunekitError(told)
    return result


def by_main(work: Callable[[], None]) -> None:
    """Let process 0 do something, and the others wait for it."""
    together(lambda: work() if distributed.is_main() else None)
