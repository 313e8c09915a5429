"""Tensors that are read when they are asked for, and let go once they have been converted.

Weights in the files' own type are left to transformers, which maps the files. In another type, that
would keep the whole mapped files beside the copy that is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import EllipsisType

import torch
from safetensors import safe_open
from torch import Tensor

_WRITTEN = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class DeferredTensor:
    """A value of a state dict of which transformers takes `tensor[...]`, and that alone."""

    make: Callable[[], Tensor]

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return self.make()[index]


def deferred_state(files: Sequence[Path]) -> dict[str, DeferredTensor]:
    """The tensors of safetensors files, each to be mapped for as long as it is used."""
    state = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                state[name] = DeferredTensor(partial(_mapped, file, name))
    return state


def converts(files: Sequence[Path], dtype: torch.dtype) -> bool:
    """Whether safetensors files hold a tensor of another type than `dtype`."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if tensors.get_slice(name).get_dtype() != _WRITTEN[dtype]:
                    return True
    return False


def _mapped(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
        return tensor
