"""Progress on standard error: a bar where a person is looking, now and then a line in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prunekit.process import distributed

Item = TypeVar("Item")
#: Takes how many are done, and of how many.
Report = Callable[[int, int], None]

#: Seconds between two lines where no terminal shows a bar; shorter work says nothing.
LINE_EVERY = 15.0


def track(
    items: Sequence[Item],
    label: str,
    *,
    enabled: bool = True,
    count: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Iterate over `items` and show how far it is.

    Args:
        items: What to iterate over.
        label: What is being done.
        enabled: As for `counter`.
        count: What an item counts for, such as `len` for batches of prompts.
    """
    with counter(label, enabled=enabled) as report:
        if report is None:
            yield from items
            return
        total, done = sum(map(count, items)), 0
        report(0, total)
        for item in items:
            yield item
            done += count(item)
            report(done, total)


@contextlib.contextmanager
def counter(label: str, *, enabled: bool = True) -> Iterator[Report | None]:
    """Something to tell how many are done; None where nothing is shown.

    Args:
        label: What is being done.
        enabled: False, and processes other than 0, show nothing.
    """
    console = Console(stderr=True)
    if not enabled or not distributed.is_main():
        yield None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _lines(label)


def _lines(label: str) -> Report:
    """Prints a line every `LINE_EVERY` seconds."""
    started = said = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < LINE_EVERY or not 0 < done < total:
            return
        left = duration((now - started) * (total - done) / done)
        print(f"{label}: {done} of {total}, about {left} left", file=sys.stderr, flush=True)
        said = now

    return report


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own bars and warnings for a while: what matters is raised instead."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
