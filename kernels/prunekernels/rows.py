"""Rows of a tensor whose leading dimensions count as one."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows of the flattened leading dimensions; a copy of just those where no view exists."""
    lead, width = tensor.shape[:-1], tensor.shape[-1]
    if len(lead) == 1:
        return tensor[start:stop] if stop - start < lead[0] else tensor
    if flattens(tensor):
        return tensor.view(-1, width)[start:stop]
    # As torch.unravel_index, which would copy the shape to the device.
    index, places = torch.arange(start, stop, device=tensor.device), []
    for size in reversed(lead):
        places.append(index % size)
        index = index // size
    return tensor[tuple(reversed(places))]


def flattens(tensor: Tensor) -> bool:
    """Whether the leading dimensions can be seen as one without a copy."""
    if tensor.dim() <= 2:
        return True
    try:
        tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return False
    return True
