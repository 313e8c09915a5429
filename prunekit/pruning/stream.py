"""Calibration batches on their way through the layers: only the current layer's inputs exist."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.models import blocks
from prunekit.models.architectures import Architecture
from prunekit.models.blocks import Keywords
from prunekit.process import distributed

OFFLOADS = ("cpu", "disk")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Stream:
    """This process's calibration batches, at the entrance of one decoder layer.

    Args:
        arch: The model.
        batches: All processes' batches, (sequences, tokens) each; every world_size-th is kept.
        dtype: Run layers in this type instead of their own; the weights stay as they are.
        offload: Where batches wait for their turn instead of the model's device: "cpu" memory, or
            "disk", a temporary folder.

    Attributes:
        indices: Which of `batches` are here.
        total: Number of batches over all processes.
        tokens: Tokens of each batch here.

    Raises:
        PrunekitError: No such dtype or offload.
    """

    def __init__(
        self,
        arch: Architecture,
        batches: Sequence[Tensor],
        *,
        dtype: torch.dtype | None = None,
        offload: str | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise PrunekitError(f"calibration dtype {dtype} is unknown: use bfloat16 or float32")
        if offload is not None and offload not in OFFLOADS:
            raise PrunekitError(f"offload '{offload}' is unknown: use {' or '.join(OFFLOADS)}")
        self.arch = arch
        self.total = len(batches)
        self.indices = distributed.shard(range(self.total))
        self._dtype = dtype
        self._device = arch.model.get_input_embeddings().weight.device
        self._waiting = _Waiting(offload)
        self.tokens = [batches[index].numel() for index in self.indices]
        self._kwargs: list[list[Keywords]] = []
        same_shape: dict[torch.Size, list[Keywords]] = {}
        for position, index in enumerate(self.indices):
            inputs = blocks.capture(arch, batches[index].to(self._device))
            kwargs = _converted(inputs.kwargs, dtype)
            # Masks and position embeddings rarely depend on the tokens: hold one copy then.
            seen = same_shape.setdefault(batches[index].shape, kwargs)
            self._waiting[position] = _converted(inputs.hidden, dtype)
            self._kwargs.append(seen if _equal(seen, kwargs) else kwargs)

    def at(self, position: int, layer: int) -> tuple[Tensor, Keywords]:
        """The hidden states of batch `indices[position]`, and the kwargs of layer `layer`."""
        return self._waiting[position].to(self._device), self._kwargs[position][layer]

    def visit(self, layer: int, function: Callable[[Tensor, int, Keywords], object]) -> None:
        """Call `function(hidden, batch index, kwargs of layer)` for every batch here."""
        with _running_as(self.arch.layers[layer], self._dtype):
            for position, index in enumerate(self.indices):
                hidden = self._waiting[position].to(self._device)
                function(hidden, index, self._kwargs[position][layer])

    def advance(
        self, layer: int, function: Callable[[Tensor, int, Keywords], Tensor] | None = None
    ) -> None:
        """Replace every batch's hidden states by what layer `layer`, or `function`, returns."""
        with _running_as(self.arch.layers[layer], self._dtype):
            for position, index in enumerate(self.indices):
                hidden = self._waiting[position].to(self._device)
                kwargs = self._kwargs[position][layer]
                self._waiting[position] = (
                    blocks.run_layer(self.arch, layer, hidden, kwargs)
                    if function is None
                    else function(hidden, index, kwargs)
                )


class _Waiting:
    """Hidden states by position, on their device, in memory, or in files."""

    def __init__(self, offload: str | None) -> None:
        self._offload = offload
        self._held: dict[int, Tensor] = {}
        self._stored: dict[int, tuple[torch.Size, torch.dtype]] = {}
        # deleted with this object
        self._folder = tempfile.TemporaryDirectory() if offload == "disk" else None

    def __getitem__(self, position: int) -> Tensor:
        if self._folder is None:
            return self._held[position]
        # read, not mapped: a mapped file's pages count as this process's memory
        shape, dtype = self._stored[position]
        hidden = torch.empty(shape, dtype=dtype)
        with self._path(position).open("rb") as file:
            file.readinto(_bytes(hidden))
        return hidden

    def __setitem__(self, position: int, hidden: Tensor) -> None:
        if self._offload is not None:
            hidden = hidden.cpu()
        if self._folder is None:
            held = self._held.get(position)
            if held is None or not _alike(held, hidden):
                self._held[position] = hidden
            else:
                # in place: what moved with every layer would leave holes in the heap for good
                held.copy_(hidden)
            return
        self._stored[position] = (hidden.shape, hidden.dtype)
        with self._path(position).open("wb") as file:
            file.write(_bytes(hidden.contiguous()))

    def _path(self, position: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / str(position)


def _alike(first: Tensor, second: Tensor) -> bool:
    return (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def _running_as(layer: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Give a layer rounded copies of its parameters and buffers for a while."""
    own = {
        tensor: tensor.data
        for tensor in (*layer.parameters(), *layer.buffers())
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype
    }
    try:
        for tensor, data in own.items():
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in own.items():
            tensor.data = data


def _converted(nest: Any, dtype: torch.dtype | None) -> Any:
    """A nest of lists, tuples and dicts with its floating tensors in another type."""
    if isinstance(nest, Tensor):
        return nest.to(dtype) if dtype is not None and nest.is_floating_point() else nest
    if isinstance(nest, list | tuple):
        return type(nest)(_converted(part, dtype) for part in nest)
    if isinstance(nest, dict):
        return {key: _converted(value, dtype) for key, value in nest.items()}
    return nest


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
