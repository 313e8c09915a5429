"""Weights for linear layers, and how far a layer with a packed one may be from float64 truth."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as_eager(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice eager's own error against float64, plus what another order of sums leaves.

    Rounding errors of a float32 sum of K products walk at random: √K·2⁻²⁴ of it, 1e-6 at K = 280.
    """
    assert got.dtype == eager.dtype and got.shape == eager.shape
    assert not got.isnan().any()
    if exact.numel():
        error = (got.double() - exact).abs().max()
        assert error <= 2 * (eager.double() - exact).abs().max() + 1e-6 * exact.abs().max()


def assert_interpreted_as_good_as_eager(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The same of an interpreted kernel, by element.

    The interpreter cuts a float32 down to a bfloat16 where a GPU rounds: one ulp, not half.
    """
    ulp = exact.abs() * 2.0**-7 if got.dtype == torch.bfloat16 else 0.0
    floor = 1e-6 * exact.abs().max()
    error = (got.double() - exact).abs()
    assert (error <= 2 * (eager.double() - exact).abs().max() + ulp + floor).all()


def ragged(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A random (rows, columns) weight with rows of all sparsities, from empty to full, shuffled."""
    density = torch.linspace(0, 1, rows, device=device)[torch.randperm(rows), None]
    kept = torch.rand(rows, columns, device=device) < density
    return (torch.randn(rows, columns, device=device) * kept).to(dtype)
