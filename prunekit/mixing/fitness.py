"""Exact KL of a model as it is now from its dense self, over parts of a text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunekit.divergence.rows import Readout, Rows, compare, states_of
from prunekit.divergence.windows import Windows
from prunekit.errors import PrunekitError
from prunekit.mixing.mixes import Mix
from prunekit.process import distributed


class Fitness:
    """KL(dense ‖ model) over windows of a text; the dense model's states are computed once.

    Args:
        model: Dense now; it may change between calls of `kl`, its head and embedding may not.
        windows: The text.
        batch_tokens: Padded tokens per forward pass.

    Raises:
        PrunekitError: The dense model's states are not finite.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows, batch_tokens: int) -> None:
        self._model, self._windows, self._batch_tokens = model, windows, batch_tokens
        self._readout = Readout.of(model)
        self._dense = [self._states([index]) for index in range(len(windows))]
        for index, states in enumerate(self._dense):
            if not bool(states.isfinite().all()):
                raise PrunekitError(
                    f"the dense model's states are not finite in window {index}: check its "
                    "weights, or use another dtype"
                )

    @torch.inference_mode()
    def kl(self, indices: Sequence[int]) -> float:
        """The mean over the scored positions of some windows, in nats; inf for a broken model."""
        dense = Rows(torch.cat([self._dense[index] for index in indices]), self._readout)
        now = Rows(self._states(indices), self._readout)
        found = compare(
            dense,
            now,
            self._windows.labels(indices),
            level="precise",
            fields=("kl_base_other",),
        )
        mean = float(found.kl_base_other.double().mean())
        return mean if math.isfinite(mean) else math.inf

    @torch.inference_mode()
    def _states(self, indices: Sequence[int]) -> torch.Tensor:
        ids = [self._windows.ids[index] for index in indices]
        firsts = [self._windows.firsts[index] for index in indices]
        return states_of(self._model, ids, firsts, self._batch_tokens)


class Record:
    """What was measured, in a file: a search that is run again measures nothing twice.

    Under several processes the main one writes.

    Args:
        path: JSON lines; created with the first one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[Mix, str], float] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # what a killed run was writing ends without one
        self._before = "" if not text or text.endswith("\n") else "\n"
        for line in text.splitlines():
            try:
                told = json.loads(line)
                self._known[tuple(told["mix"]), told["data"]] = float(told["kl"])
            except (ValueError, KeyError, TypeError):
                continue

    def __len__(self) -> int:
        return len(self._known)

    def get(self, mix: Mix, data: str) -> float | None:
        """The KL of a mix on some data, None if it was not measured."""
        return self._known.get((mix, data))

    def add(self, mix: Mix, data: str, kl: float) -> None:
        """Keep a measurement."""
        self._known[mix, data] = kl
        if not distributed.is_main():
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._before + json.dumps({"mix": mix, "data": data, "kl": kl}) + "\n")
        self._before = ""

    def measured(self, data: str) -> dict[Mix, float]:
        """All mixes that were measured on some data."""
        return {mix: kl for (mix, name), kl in self._known.items() if name == data}
