"""Zeroed counters for programs that must know who arrives last; the kernels set them back to 0.

Filling a counter for every launch would cost a launch. So each device has an arena of zeros, made
once. Outside graph capture each stream has its own part of it, as launches on one stream follow one
another. A captured launch takes a part for good: graphs that are replayed at the same time must not
share any. When the arena is used up (millions of programs captured), launches fill theirs, which is
slower.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_ARENA, _PER_STREAM = 1 << 20, 1 << 12

_by_stream: dict[tuple[int, int], Tensor] = {}
# the zeros of a device, and how many of them are taken
_arenas: dict[int, tuple[Tensor, int]] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """int32 (at least `count`,) zeros on a CUDA device, for one launch on the current stream."""
    stream = torch.cuda.current_stream(device)
    index = stream.device_index
    if torch.cuda.is_current_stream_capturing():
        taken = _take(count, index)
    else:
        if index not in _arenas:
            _arenas[index] = (_new_arena(torch.device(device.type, index)), 0)
        key = (index, stream.cuda_stream)
        taken = _by_stream.get(key)
        if taken is None or taken.numel() < count:
            taken = _take(max(count, _PER_STREAM), index)
            if taken is not None:
                _by_stream[key] = taken
    return torch.zeros(count, dtype=torch.int32, device=device) if taken is None else taken


def _take(count: int, index: int) -> Tensor | None:
    """Part of the device's arena, or None if there is not enough left."""
    arena, used = _arenas.get(index, (None, 0))
    if arena is None or used + count > arena.numel():
        return None
    # launches assume 16-byte aligned pointers
    _arenas[index] = (arena, used + -(-count // 4) * 4)
    return arena[used : used + count]


def _new_arena(device: torch.device) -> Tensor:
    # torch.compile's CUDA graphs warm up with all allocations of the calling thread going to a
    # pool whose memory is used again afterwards: what shall stay is allocated by another thread.
    def allocate() -> Tensor:
        zeros = torch.zeros(_ARENA, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(allocate).result()
