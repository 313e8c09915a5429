"""Time several alternatives fairly: in turns, so that a change of clocks hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Times:
    """Seconds of one alternative, a sample per round.

    Attributes:
        seconds: At least one sample.
    """

    seconds: Sequence[float]

    def percentile(self, share: float) -> float:
        """Seconds below which `share` per cent of the samples lie."""
        return float(np.percentile(self.seconds, share))

    @property
    def median(self) -> float:
        """The middle sample, in seconds."""
        return self.percentile(50)

    def milliseconds(self) -> dict[str, float]:
        """The columns p20_ms, p50_ms and p80_ms."""
        return {f"p{share}_ms": 1000 * self.percentile(share) for share in (20, 50, 80)}


def interleaved(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Times]:
    """Take `rounds` samples of each alternative, one after the other in every round.

    Args:
        samplers: Each runs once and returns the seconds that this took.
        rounds: How often, at least once. The one that begins changes from round to round, so that
            nobody always runs behind the same neighbour's cache or heat.

    Returns:
        The times under the same names.
    """
    names = list(samplers)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            found[name].append(samplers[name]())
    return {name: Times(seconds) for name, seconds in found.items()}


def stopwatch(run: Callable[[], object], device: torch.device) -> float:
    """Seconds by the host's clock until everything that `run` starts on `device` is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
