"""Calls of the metric ops that are ready to be launched again, with addresses alone.

The first call of a key (shapes, strides, types, device, options) checks its arguments, chooses the
kernels and binds their launches; further ones allocate, launch, and hand out a result whose fields
are views that are made when they are asked for. On a CPU further calls of a key go to the eager
sums at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekernels import runtime
from prunekernels.launch import Launch, UnalignedError, allocator, current_device
from prunekernels.metrics.fields import Layout, PairStats, VectorStats

_address = Tensor.data_ptr


class Prepared:
    """Launches over pairs of rows that follow one another.

    Args:
        calls: The launches. Their tensors are the inputs and what is filled.
        inputs: base and other, two objects.
        blocks: What is filled of the result, each `(fields, N)`; the rest is scratch.
        layout: Where its fields are in the blocks.
        kind: Of the result.
    """

    __slots__ = ("_blocks", "_device", "_kind", "_launches", "_layout", "_places", "_scratch")

    def __init__(
        self,
        calls: Sequence[Launch],
        inputs: tuple[Tensor, Tensor],
        blocks: Sequence[Tensor],
        layout: Layout,
        kind: type[PairStats] | type[VectorStats],
    ) -> None:
        self._layout, self._kind = layout, kind
        index, lead = inputs[0].device.index, inputs[0].shape[:-1]
        self._device = current_device() if index is None else index
        self._blocks = tuple(allocator(block.shape[:1] + lead, block) for block in blocks)
        # where the address of each tensor is among those that `run` lists
        order = {id(None): 0, **{id(x): i for i, x in enumerate((*inputs, *blocks), 1)}}
        size, places = 0, []
        for call in calls:
            for value in call.arguments:
                if isinstance(value, Tensor) and id(value) not in order:
                    order[id(value)] = len(order)
                    places.append(size)
                    # so that each is as aligned as an allocation
                    size += -(-math.prod(value.shape) * value.itemsize // 16) * 16
        self._places = tuple(places)
        self._scratch = allocator((size,), inputs[0].new_empty(0, dtype=torch.uint8))
        self._launches = tuple(
            (
                call.bind().launch,
                operator.itemgetter(
                    *(order[id(x)] for x in call.arguments if x is None or isinstance(x, Tensor))
                ),
            )
            for call in calls
        )

    def run(self, base: int, other: int) -> Any:
        """The result, or None (and nothing done) if an input is less aligned than the first was.

        Args:
            base: Its address.
            other: Its address.
        """
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self.run(base, other)
        # one per type: torch.save refuses tensors of several types that share memory
        blocks = [allocate() for allocate in self._blocks]
        addresses = [None, base, other, *map(_address, blocks)]
        if self._places:
            # freed on return: what is allocated later on this stream comes after the launches
            scratch = self._scratch()
            start = scratch.data_ptr()
            addresses += [start + place for place in self._places]
        try:
            for launch, pick in self._launches:
                launch(*pick(addresses))
        except UnalignedError:
            return None
        return self._kind.later(self._layout, blocks)


def again(op: str, base: Tensor, other: Tensor, *options: Any) -> tuple[Any, Any]:
    """Key of a call (None: it has none), and its result if a call of that key was prepared.

    Args:
        op: The op's name.
        base: A plain tensor.
        other: A plain tensor.
        options: All else that the op was given.
    """
    at, at_other = base.data_ptr(), other.data_ptr()
    key = (
        base.shape,
        base.stride(),
        base.dtype,
        base.device,
        other.shape,
        other.stride(),
        other.dtype,
        other.device,
        # other kernels read rows that are not aligned
        (at | at_other) & 15 == 0,
        options,
    )
    try:
        prepared = runtime.known(op).prepared.get(key)
    except TypeError:  # something that no option can be, such as a list
        return None, None
    if prepared is None:
        return key, None
    if isinstance(prepared, Prepared):
        return key, prepared.run(at, at_other)
    return key, prepared(base, other)


def prepare(
    op: str,
    key: Any,
    base: Tensor,
    other: Tensor,
    options: Any,
    impl: str,
    eager: Callable[[Tensor, Tensor], Any],
) -> None:
    """Keep a call that has just run under its key: launches, or on a CPU what was looked up.

    Args:
        op: The op's name.
        key: From `again`.
        base: The call's tensor.
        other: The call's tensor.
        options: What the module of the kernels calls so.
        impl: As the op's.
        eager: The call without its checks, where no kernel runs.
    """
    known = runtime.known(op)
    choice = known.select(runtime.Problem(base.device, base.dtype), impl)
    if choice.name == "eager":
        if base.device.type == "cpu":
            runtime.keep(known.prepared, key, eager)
        return
    # Triton binds differently in its interpreter and on AMD
    if runtime.interpreting() or torch.version.hip is not None or not base.numel():
        return
    if runtime.recording.launches is not None:
        return
    # a view, so that a tensor compared with itself is two objects
    pair = base, other.view(other.shape)
    prepared = known.kernels[choice.name].load().prepared(*pair, options, choice.name)
    if prepared is not None:
        runtime.keep(known.prepared, key, prepared)
