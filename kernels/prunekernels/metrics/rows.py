"""How the rows of a pair of tensors of any strides lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


class PairRows:
    """Where the rows of two `(…, width)` tensors lie, as kernels take it.

    Attributes:
        count: how many rows.
        width: elements of a row.
        starts: `(2, count)` int64 first elements, or None if both are evenly spaced.
        strides: of base's rows and elements, then other's (0 between rows with `starts`).
        shift: rows start at any element of an aligned vector, alike in both tensors.
        packed: bfloat16 that may be read two at a time.
    """

    def __init__(self, base: Tensor, other: Tensor) -> None:
        self.width = base.shape[-1]
        self.count = base.numel() // self.width
        self.starts: Tensor | None = None
        steps = [_row_stride(x) for x in (base, other)]
        if None in steps:
            self.starts = torch.stack([_row_starts(x) for x in (base, other)])
        step_a, step_b = (step if self.starts is None and step is not None else 0 for step in steps)
        columns = [x.stride(-1) for x in (base, other)]
        unit = columns == [1, 1]
        aligned = unit and all(x.data_ptr() % 16 == 0 for x in (base, other))
        even = aligned and self.starts is None and step_a % 16 == step_b % 16 == 0
        self.shift = aligned and self.starts is None and not even and step_a == step_b
        self.packed = base.dtype == torch.bfloat16 and (even or self.shift)
        self.strides = (step_a, columns[0], step_b, columns[1])


def _row_stride(tensor: Tensor) -> int | None:
    """Elements between rows of the flattened leading dimensions, None if they differ."""
    step, expected = 0, None
    for size, stride in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if expected is None:
            step = stride
        elif stride != expected:
            return None
        expected = size * stride
    return step


def _row_starts(tensor: Tensor) -> Tensor:
    starts = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        starts = starts[..., None] + torch.arange(size, device=tensor.device) * stride
    return starts.reshape(-1)
