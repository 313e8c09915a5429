"""The formats that hold sparse weights: a table of the engine's weight classes.

A format is one class that fits `prunekernels.sparse.PackedWeight` and one row of
`prunekernels.sparse.FORMATS`. Swapping, saving, loading and reports find it there by its name.
"""

from __future__ import annotations

import torch
from prunekernels.sparse import FORMATS, PackedWeight

Shape = tuple[int, int]

#: Types of values that every format holds.
VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["FORMATS", "VALUE_TYPES", "PackedWeight", "Shape"]
