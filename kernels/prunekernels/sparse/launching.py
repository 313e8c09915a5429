"""What the launchers of the tensor-core kernels prepare: rows of x, and room for split sums.

Programs that must know who arrives last count themselves; the kernels set the counters back to 0.
Filling a counter for every launch would cost a launch. So each device has an arena of zeros, made
once. Outside graph capture each stream has its own part of it, as launches on one stream follow one
another. A captured launch takes a part for good: graphs that are replayed at the same time must not
share any. When the arena is used up (millions of programs captured), launches fill theirs, which is
slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.launch import Launch, UnalignedError, current_stream

_ARENA, _PER_STREAM = 1 << 20, 1 << 12

_by_stream: dict[tuple[int, int], Tensor] = {}
# the zeros of a device, and how many of them are taken
_arenas: dict[int, tuple[Tensor, int]] = {}


def padded_rows(x: Tensor, columns: int) -> Tensor:
    """x (M, K) with zeros up to `columns`, in rows that can be copied in chunks of 16 bytes."""
    if x.shape[1] != columns:
        return F.pad(x, (0, columns - x.shape[1]))
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def split_columns(pieces: int, splits: int) -> tuple[int, int]:
    """Pieces of a split and number of splits, none empty, when `pieces` are shared by `splits`."""
    per_split = max(1, -(-pieces // splits))
    return per_split, max(1, -(-pieces // per_split))


def room_for_parts(
    y: Tensor, token_blocks: int, row_blocks: int, splits: int, tokens: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Sums and counters of `fragments.sum_parts`, for blocks of `tokens` × `rows`.

    Returns:
        float32 (token_blocks, row_blocks, splits, tokens·rows) and zeroed int32 (at least
        token_blocks·row_blocks,); y twice, which nobody reads, if there is nothing to split.
    """
    if splits == 1:
        return y, y
    shape = (token_blocks, row_blocks, splits, tokens * rows)
    parts = torch.empty(shape, dtype=torch.float32, device=y.device)
    return parts, counters(token_blocks * row_blocks, y.device)


class Prepared:
    """A tensor-core product for activations of one shape, launched with addresses alone.

    Args:
        call: The product's call, whose tensors are x, those of the weight, the bias (y if there is
            none), y, and the parts and counters of split sums (y twice if there are none).
        shape: Shape of the result.
    """

    __slots__ = ("_bound", "_counters", "_device", "_dtype", "_parts", "_shape")

    def __init__(self, call: Launch, shape: Sequence[int]) -> None:
        tensors = [value for value in call.arguments if isinstance(value, Tensor)]
        *_, y, parts, _ = tensors
        self._shape, self._dtype, self._device = tuple(shape), y.dtype, y.device
        self._parts = None if parts is y else parts.shape
        self._counters = call.grid[0] * call.grid[1]
        self._bound = call.bind()

    def run(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> Tensor | None:
        """The result, or None (and nothing done) if a tensor is not aligned to 16 bytes."""
        y = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        at = y.data_ptr()
        parts_at = counters_at = at
        if self._parts is not None:
            parts = torch.empty(self._parts, dtype=torch.float32, device=self._device)
            parts_at = parts.data_ptr()
            counters_at = counters(self._counters, self._device).data_ptr()
        addresses = [tensor.data_ptr() for tensor in weight]
        bias_at = at if bias is None else bias.data_ptr()
        try:
            self._bound.launch(x.data_ptr(), *addresses, bias_at, at, parts_at, counters_at)
        except UnalignedError:
            return None
        return y


def difference(got: Tensor, x: Tensor, weight: Tensor) -> str | None:
    """None if `got` equals x·Wᵀ of small integers (all sums are exact), else what differs."""
    wanted = (x.cpu().double() @ weight.cpu().double().T).to(got.dtype)
    wrong = int((got.cpu() != wanted).sum())
    if not wrong:
        return None
    return f"{wrong} of {wanted.numel()} results differ ({got.dtype}, {len(x)} tokens)"


def counters(count: int, device: torch.device) -> Tensor:
    """int32 (at least `count`,) zeros on a CUDA device, for one launch on the current stream."""
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        taken = _take(count, index)
    else:
        if index not in _arenas:
            _arenas[index] = (_new_arena(torch.device(device.type, index)), 0)
        key = (index, current_stream(index))
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
