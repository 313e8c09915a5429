"""Put the shares of several processes together: every process ends up with the whole result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from prunekit.analysis import grid as grids
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.subspace import Subspace
from prunekit.process import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_shares(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Result],
    gather: Callable[[Result | None], Result],
) -> Result:
    """Have each process run its share of `items`, and give all of them the whole result.

    Args:
        items: What there is to do, the same in every process.
        run: Does a share, which is not empty.
        gather: One of the functions below.
    """
    share = distributed.shard(items)
    return gather(run(share) if share else None)


def gather_grid(share: MetricGrid | None) -> MetricGrid:
    """The grid over all prompts, labelled 0, 1, 2, … in their order before `distributed.shard`.

    Args:
        share: This process's grid; None if it had no prompts.
    """
    whole = grids.concat(distributed.gather([] if share is None else share.prompts()))
    return whole.relabelled(range(whole.shape[0]))


def gather_decoding(share: Decoding | None) -> Decoding:
    """The decoding of all prompts, from this process's share (None if it had none)."""
    parts: list[tuple[MetricGrid, Any, dict[str, float]]] = []
    if share is not None:
        grid = share.teacher_forced
        for index, (part, texts) in enumerate(zip(grid.prompts(), share.generations, strict=True)):
            measures = {name: float(values[index]) for name, values in share.sequence.items()}
            parts.append((part, texts, measures))
    parts = distributed.gather(parts)
    whole = grids.concat(part for part, _, _ in parts).relabelled(range(len(parts)))
    names = parts[0][2]
    sequence = {name: np.array([measures[name] for _, _, measures in parts]) for name in names}
    return Decoding(whole, tuple(texts for _, texts, _ in parts), sequence)


def gather_subspace(share: Subspace | None) -> Subspace:
    """The subspace analysis of all questions, from this process's share (None if it had none)."""
    parts = [] if share is None else [replace(share, grid=g) for g in share.grid.prompts()]
    shares = [replace(part, items=(part.items[index],)) for index, part in enumerate(parts)]
    gathered = distributed.gather(shares)
    longest = max(gathered, key=lambda part: len(part.token_ids))
    whole = grids.concat(part.grid for part in gathered).relabelled(range(len(gathered)))
    return replace(longest, grid=whole, items=tuple(part.items[0] for part in gathered))
