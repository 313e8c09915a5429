"""CUDA graphs in tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_captured_as_run(calls: Sequence[Callable[[], Tensor]]) -> None:
    """Each call in a graph of its own; all are replayed at the same time, on streams of their own.

    Args:
        calls: What allocates and computes one tensor each.
    """
    want = [call() for call in calls]
    graphs, results = [], []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(call())
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))
