"""What the launchers of the tensor-core kernels prepare: rows of x, and room for split sums.

Programs that must know who arrives last count themselves; the kernels set the counters back to 0.
Filling a counter for every launch would cost a launch. So each device has an arena of zeros, made
once. Outside graph capture each stream has its own part of it, as launches on one stream follow one
another. A captured launch takes a part for good: graphs that are replayed at the same time must not
share any. When the arena is used up (millions of programs captured), launches fill theirs, which is
slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.launch import Launch, allocator, current_device, current_stream

_ARENA, _PER_STREAM, _PARTS = 1 << 20, 1 << 12, 1 << 20

_by_stream: dict[tuple[int, int], Tensor] = {}
# by device and stream: sizes of parts and counters, and their addresses
_rooms: dict[tuple[int | None, int], tuple[int, int, int, int]] = {}
_lasting_rooms: list[tuple[Tensor, Tensor]] = []
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


#: Launches a prepared product: activations, weights' tensors, bias -> result, or None.
Run = Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor | None]


def prepared_run(call: Launch, shape: Sequence[int]) -> Run:
    """A tensor-core product for activations of one shape, launched with addresses alone.

    A function that has all it needs at hand, as it runs once for every launch.

    Args:
        call: The product's call, whose tensors are x, those of the weight, the bias (y if there is
            none), y, and the parts and counters of split sums (y twice if there are none).
        shape: Shape of the result.

    Returns:
        A function of x, the tensors of both weights (of a product with one, its own, which stand
        for both) and the bias or None. It returns the result, or None (and nothing is done) if a
        tensor is not aligned to 16 bytes.
    """
    tensors = [value for value in call.arguments if isinstance(value, Tensor)]
    _, *weights, _, like, parts, _ = tensors
    twice = len(weights)
    allocate = allocator(shape, like)
    place, device = like.device, _index(like.device)
    sums = 0 if parts is like else parts.numel()
    # by stream, outside graph capture: rooms stay
    rooms: dict[int, tuple[int, int]] = {}
    programs = call.grid[0] * call.grid[1]
    start = call.bind().start
    capturing = torch.cuda.is_current_stream_capturing

    def run(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> Tensor | None:
        x_at = joined = x.data_ptr()
        weight_at = []
        for tensor in weight:
            weight_at.append(address := tensor.data_ptr())
            joined |= address
        if len(weight_at) < twice:
            weight_at += weight_at
        bias_at = 0
        if bias is not None:
            joined |= (bias_at := bias.data_ptr())
        if joined & 15:
            return None
        if current_device() != device:
            with torch.cuda.device(device):
                return run(x, weight, bias)
        y = allocate()
        at = y.data_ptr()
        stream = current_stream(device)
        if not sums:
            start(stream, x_at, *weight_at, bias_at or at, at, at, at)
            return y
        captured = capturing()
        room = None if captured else rooms.get(stream)
        if room is None:
            room = _room(sums, programs, place, stream)
            if not captured:
                rooms[stream] = room
        start(stream, x_at, *weight_at, bias_at or at, at, *room)
        return y

    return run


def difference(got: Tensor, x: Tensor, weight: Tensor, power: int = 1) -> str | None:
    """None if `got` equals x·Wᵀ of small integers (all sums are exact), else what differs.

    With a `power`, each sum to that power, which float32 must hold.
    """
    wanted = (x.double() @ weight.double().T).pow(power).to(got.dtype)
    wrong = int((got != wanted).sum())
    if not wrong:
        return None
    return f"{wrong} of {wanted.numel()} results differ ({got.dtype}, {len(x)} tokens)"


def counters(count: int, device: torch.device) -> Tensor:
    """int32 (at least `count`,) zeros on a CUDA device, for one launch on the current stream."""
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    index = _index(device)
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


def _index(device: torch.device) -> int:
    """Index of a CUDA device; "cuda" is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def _room(parts: int, count: int, device: torch.device, stream: int) -> tuple[int, int]:
    """Addresses of float32 (`parts`,) and zeroed int32 (`count`,), for one launch from now on.

    Outside graph capture a stream's launches use the same room one after another.
    """
    if torch.cuda.is_current_stream_capturing():
        # freed on return: what the graph allocates later comes after the launch
        taken = torch.empty(parts, dtype=torch.float32, device=device)
        return taken.data_ptr(), counters(count, device).data_ptr()
    key = device.index, stream
    room = _rooms.get(key)
    if room is None or room[0] < parts or room[1] < count:
        # the former room stays: launches that are under way may still use it
        made = _lasting(
            torch.empty, max(_PARTS, 1 << (parts - 1).bit_length()), torch.float32, device
        )
        zeros = counters(max(count, _PER_STREAM), device)
        _lasting_rooms.append((made, zeros))
        room = made.numel(), zeros.numel(), made.data_ptr(), zeros.data_ptr()
        _rooms[key] = room
    return room[2], room[3]


def _new_arena(device: torch.device) -> Tensor:
    return _lasting(torch.zeros, _ARENA, torch.int32, device)


def _lasting(
    make: Callable[..., Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # torch.compile's CUDA graphs warm up with all allocations of the calling thread going to a
    # pool whose memory is used again afterwards: what shall stay is allocated by another thread.
    def allocate() -> Tensor:
        made = make(size, dtype=dtype, device=device)
        torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(allocate).result()
