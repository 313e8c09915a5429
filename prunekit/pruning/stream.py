"""Calibration batches on their way through the layers: only the current layer's inputs exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit import blocks, distributed
from prunekit.architectures import Architecture
from prunekit.blocks import Keywords


class Stream:
    """This process's calibration batches, at the entrance of one decoder layer.

    Args:
        arch: The model.
        batches: All processes' batches, (sequences, tokens) each; every world_size-th is kept.

    Attributes:
        indices: Which of `batches` are here.
        total: Number of batches over all processes.
    """

    def __init__(self, arch: Architecture, batches: Sequence[Tensor]) -> None:
        self.arch = arch
        self.total = len(batches)
        self.indices = distributed.shard(range(self.total))
        device = arch.model.get_input_embeddings().weight.device
        self._hidden: list[Tensor] = []
        self._kwargs: list[list[Keywords]] = []
        same_shape: dict[torch.Size, list[Keywords]] = {}
        for index in self.indices:
            inputs = blocks.capture(arch, batches[index].to(device))
            # Masks and position embeddings rarely depend on the tokens: hold one copy then.
            seen = same_shape.setdefault(batches[index].shape, inputs.kwargs)
            self._hidden.append(inputs.hidden)
            self._kwargs.append(seen if _equal(seen, inputs.kwargs) else inputs.kwargs)

    def visit(self, layer: int, function: Callable[[Tensor, int, Keywords], object]) -> None:
        """Call `function(hidden, batch index, kwargs of layer)` for every batch here."""
        for position, index in enumerate(self.indices):
            function(self._hidden[position], index, self._kwargs[position][layer])

    def advance(
        self, layer: int, function: Callable[[Tensor, int, Keywords], Tensor] | None = None
    ) -> None:
        """Replace every batch's hidden states by what layer `layer`, or `function`, returns."""
        for position, index in enumerate(self.indices):
            hidden, kwargs = self._hidden[position], self._kwargs[position][layer]
            self._hidden[position] = (
                blocks.run_layer(self.arch, layer, hidden, kwargs)
                if function is None
                else function(hidden, index, kwargs)
            )


def _equal(first: Any, second: Any) -> bool:
    """Whether two nests of lists, tuples, dicts and tensors hold the same values."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            _equal(value, second[key]) for key, value in first.items()
        )
    return bool(first == second)
