"""The packed formats of exact values, for tests that hold for every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import prunekernels
import pytest
import torch
from prunekernels import BitmapSparse, Sparse24
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def two_of_four(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """A random bool mask (rows, columns) that keeps none, one or two of every four columns."""
    groups = -(-columns // 4)
    rank = torch.rand(rows, groups, 4, device=device).argsort(2).argsort(2)
    kept = rank < torch.randint(0, 3, (rows, groups, 1), device=device)
    return kept.view(rows, -1)[:, :columns]


def of_any_density(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """A random bool mask (rows, columns) with rows of all densities, from empty to full."""
    density = torch.linspace(0, 1, rows, device=device)[torch.randperm(rows), None]
    return torch.rand(rows, columns, device=device) < density


@dataclass(frozen=True)
class PackedFormat:
    """One format and the weights that fit it.

    Attributes:
        kind: Its weight class.
        name: The prefix of its public functions.
        tensor_cores: The implementation by inline assembly, for 16-bit values.
        mask: Makes a random mask of the weights that may differ from zero.
    """

    kind: Any
    name: str
    tensor_cores: str
    mask: Callable[..., Tensor]

    def function(self, name: str) -> Callable[..., Any]:
        """A public function: "linear" is `prunekernels.sparse24_linear`."""
        found: Callable[..., Any] = getattr(prunekernels, f"{self.name}_{name}")
        return found

    def values(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """A weight of normal numbers that fits."""
        numbers = torch.randn(rows, columns, device=device)
        return (numbers * self.mask(rows, columns, device)).to(dtype)

    def bits(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A weight of random bits that fits: NaN, infinities, subnormals and −0.0 included."""
        integer = integers(dtype)
        lowest = torch.iinfo(integer).min
        bits = torch.randint(lowest, -lowest, (rows, columns)).to(integer)
        zeros = torch.where(torch.rand(rows, columns) < 0.5, lowest, 0).to(integer)
        return torch.where(self.mask(rows, columns), bits, zeros).view(dtype)


FORMATS = [
    PackedFormat(Sparse24, "sparse24", "mma_sp", two_of_four),
    PackedFormat(BitmapSparse, "bitmap", "mma", of_any_density),
]
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.name))


def integers(dtype: torch.dtype) -> torch.dtype:
    """The integer type as wide as a floating type."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def assert_same_bits(got: Tensor, weight: Tensor) -> None:
    """Two weights are equal bit for bit, where −0.0 has become 0.0."""
    integer = integers(weight.dtype)
    wanted = torch.where(weight == 0, 0, weight.view(integer))
    assert got.dtype == weight.dtype and torch.equal(got.view(integer), wanted)


def assert_same_state(one: Any, other: Any) -> None:
    """Two packed weights hold the same tensors, NaN included."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and (one.shape, one.dtype) == (other.shape, other.dtype)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)
