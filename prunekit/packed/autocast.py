"""In which types a packed layer multiplies, autocast included."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.packed.formats import VALUE_TYPES


def computed_in(
    x: Tensor, dtype: torch.dtype, held: torch.dtype
) -> tuple[torch.dtype, torch.dtype] | None:
    """How a packed layer multiplies x: the type to multiply in and the type of the result.

    Args:
        x: The layer's input.
        dtype: Type of the layer.
        held: Type of its values.

    Returns:
        None where no kernel multiplies such values: nn.Linear on the dense weight does.
    """
    if _autocasts(x):
        result = torch.get_autocast_dtype(x.device.type)
        if dtype == held and x.dtype in VALUE_TYPES and held in (torch.float32, result):
            return held, result
        return None
    return (x.dtype, x.dtype) if dtype == held else None


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    # one question instead of three; it is not about every kind of device, and cannot be traced
    known = not torch.compiler.is_dynamo_compiling() and (x.is_cuda or x.is_cpu)
    if known and not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
