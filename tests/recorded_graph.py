"""A CUDA graph's rules on a CPU: replaying repeats the recorded operations at the same addresses.

`record_on_cpu(monkeypatch)` puts recorders in the place of `torch.cuda`'s graphs and streams. While
one records, what a real capture refuses is refused here too: reading a value on the host, and
copying data that lies on the host into a tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that wait for the device: each ends a capture with an error.
HOST_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
)


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`, and for `torch.cuda.graph` while it records."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in HOST_READS or (func is torch.ops.aten.index.Tensor and _masks(args[1])):
            raise RuntimeError(f"{func} needs the host, and a graph is being captured")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run the recorded operations again; each result lands where it was first written."""
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _masks(indices: Sequence[torch.Tensor | None]) -> bool:
    """Whether an index holds a boolean mask: the size of the result is then known late."""
    return any(index is not None and index.dtype == torch.bool for index in indices)


class _Stream:
    def wait_stream(self, other: object) -> None:
        pass


def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Let `torch.cuda.graph` record on the CPU; returns the graphs made from now on."""
    made: list[RecordedGraph] = []

    def new() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    @contextlib.contextmanager
    def capture(graph: RecordedGraph) -> Generator[None]:
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made
