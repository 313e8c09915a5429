"""Progress bars: on standard error, and only where a person is looking."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prunekit.process import distributed

Item = TypeVar("Item")


def track(items: Sequence[Item], label: str, *, enabled: bool = True) -> Iterator[Item]:
    """Iterate over `items` behind a progress bar.

    Args:
        items: What to iterate over.
        label: What the bar says.
        enabled: False, an output that is no terminal, or a process other than 0 hides the bar.
    """
    console = Console(stderr=True)
    yield from _bar(items, label, console) if enabled and shown(console) else items


@contextlib.contextmanager
def counter(label: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar that is told how many are done, and of how many; None where it is hidden.

    Args:
        label: What the bar says.
        enabled: As for `track`.
    """
    console = Console(stderr=True)
    if not enabled or not shown(console):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def shown(console: Console) -> bool:
    """Whether somebody would see a bar on `console`."""
    return console.is_terminal and distributed.is_main()


def _bar(items: Sequence[Item], label: str, console: Console) -> Iterable[Item]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield from progress.track(items, description=label)


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
