"""How much memory a function's tensors take, on any device."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Bytes of the storages that live Python tensors made under this mode hold."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor) or not tensor.untyped_storage().nbytes():
                continue
            storage = tensor.untyped_storage()
            pointer, size = storage.data_ptr(), storage.nbytes()
            if pointer in given and pointer not in self.live:
                continue
            count, _ = self.live.get(pointer, (0, 0))
            if count == 0:
                self.now += size
                self.peak = max(self.peak, self.now)
            self.live[pointer] = (count + 1, size)
            weakref.finalize(tensor, self.forget, pointer)
        return result

    def forget(self, pointer: int) -> None:
        count, size = self.live[pointer]
        if count == 1:
            del self.live[pointer]
            self.now -= size
        else:
            self.live[pointer] = (count - 1, size)


def cpu_peak(function: Callable[[], object]) -> int:
    """Most bytes that `function` holds at once on a CPU, what operators use inside included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))
