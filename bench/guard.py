"""Survive kernels that break a GPU or never end: say which it was, leave, and be started again.

An illegal access makes every later call of the process fail, and a kernel that waits for ever
cannot be stopped from Python. Either ends the process with the status `BROKEN`; whoever started
it starts it again, and what broke it is passed over.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import torch

BROKEN = 76  # exit status: what broke the device is written down, call again to go on
PATIENCE = 240.0  # seconds for one step: loading a large model, or compiling with tuning


def works(device: torch.device) -> bool:
    """Whether a device still computes."""
    if device.type != "cuda":
        return True
    with contextlib.suppress(Exception):
        return float(torch.ones(8, device=device).sum()) == 8.0
    return False


class Watchdog:
    """Calls `expired` with the step's name from its own thread when a step takes too long.

    Args:
        expired: Writes down what happened; the process then exits with `BROKEN`.
        patience: Seconds for a step.
        leave: Ends the process; another only in tests.

    Attributes:
        current: The step that runs, or the last one that ran.
    """

    def __init__(
        self,
        expired: Callable[[str], None],
        patience: float = PATIENCE,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._expired, self._patience, self._leave = expired, patience, leave
        self.current, self._deadline = "", float("inf")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def step(self, name: str) -> None:
        """A new step begins, with all its time before it."""
        self.current, self._deadline = name, time.monotonic() + self._patience

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._patience / 4)):
            if time.monotonic() > self._deadline:
                self._expired(self.current)
                self._leave(BROKEN)
                return
