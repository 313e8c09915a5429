"""The plain tensors that a tensor subclass is made of, as quantisation packages define them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor itself, or the tensors inside one of a class that can be flattened."""
    inner: Any = getattr(tensor.detach(), "__tensor_flatten__", None)
    if inner is None:
        yield tensor.detach()
        return
    for name in inner()[0]:
        yield from plain_parts(getattr(tensor, name))
