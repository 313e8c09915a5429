"""Zeroed counters for programs that must know who arrives last; the kernels set them back to 0.

Filling a counter for every launch would cost a launch. Outside graph capture each stream has its
own counters, as launches on one stream follow one another. A captured launch takes counters of its
own from an arena, for good: graphs that are replayed at the same time must not share any. When the
arena is used up (millions of programs captured), captured launches fill theirs, which is slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ARENA = 1 << 20

_by_stream: dict[tuple[int, int], Tensor] = {}
_arenas: dict[int, tuple[Tensor, int]] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """int32 (at least `count`,) zeros on a CUDA device, for one launch on the current stream."""
    stream = torch.cuda.current_stream(device)
    index = stream.device_index
    if torch.cuda.is_current_stream_capturing():
        arena, used = _arenas.get(index, (None, 0))
        if arena is None or used + count > arena.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)
        # launches assume 16-byte aligned pointers
        _arenas[index] = (arena, used + -(-count // 4) * 4)
        return arena[used : used + count]
    if index not in _arenas:
        _arenas[index] = (torch.zeros(_ARENA, dtype=torch.int32, device=device), 0)
    key = (index, stream.cuda_stream)
    held = _by_stream.get(key)
    if held is None or held.numel() < count:
        held = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _by_stream[key] = held
    return held
