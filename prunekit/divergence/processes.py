"""Work that several processes do together, and that fails in all of them if it does in one."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

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


def free_memory() -> None:
    """Give back what a model that is gone has held: collected, and to the GPU and the system.

    glibc keeps freed tensors of less than 32 MiB for itself unless it is told to trim.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def by_main(work: Callable[[], object]) -> None:
    """Let process 0 do something, and the others wait for it."""
    together(lambda: work() if distributed.is_main() else None)
