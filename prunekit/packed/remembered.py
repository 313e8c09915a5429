"""Packed weights that dense layers remember.

Rounding a weight again need not find the numbers that it was made of. So a dense layer whose values
were rounded by a format remembers the packed weight, and packing takes that while it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.packed.formats import VALUE_TYPES, PackedWeight

_ATTRIBUTE = "_prunekit_packed"


def remember_(module: nn.Module, weight: PackedWeight) -> None:
    """Keep a packed weight beside the dense values that it stands for."""
    vars(module)[_ATTRIBUTE] = weight


def remembered(module: nn.Module) -> PackedWeight | None:
    """What `remember_` kept, in the layer's type and place, if the layer still has its values."""
    weight: PackedWeight | None = vars(module).get(_ATTRIBUTE)
    dense = getattr(module, "weight", None)
    if weight is None or not isinstance(dense, Tensor) or dense.dtype not in VALUE_TYPES:
        return None
    stored = dense.detach()
    stored = stored.t() if isinstance(module, Conv1D) else stored
    here = weight.to(stored.device, stored.dtype)
    return here if torch.equal(here.to_dense(), stored) else None
