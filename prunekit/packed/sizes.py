"""How large weights are: packed ones, and those of the tensor classes of quantisation packages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from prunekit.packed.modules import PackedLinear


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor itself, or the tensors inside one of a class that can be flattened."""
    # not of a detached one: such classes can't be detached in another mode than they were made in
    inner: Any = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor.detach()
        return
    for name in inner()[0]:
        yield from plain_parts(getattr(tensor, name))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, packed and quantised weights in memory; tied ones count once."""
    parts = (part for parameter in model.parameters() for part in plain_parts(parameter))
    parameters = sum(part.numel() * part.element_size() for part in parts)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return parameters + sum(module.weight.nbytes for module in packed)


def weight_count(model: nn.Module) -> int:
    """Number of weights, zeros of packed ones included; tied ones count once."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    inside = sum(module.out_features * module.in_features for module in packed)
    return inside + sum(parameter.numel() for parameter in model.parameters())
