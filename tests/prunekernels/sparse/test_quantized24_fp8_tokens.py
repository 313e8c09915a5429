"""Activations rounded to e4m3 per token: the eager function and the kernel, bit for bit."""

from __future__ import annotations

import pytest
import quantized
import torch
from packed_formats import DTYPES
from prunekernels import quantize_tokens

pytest.importorskip("triton")
from interpreter import run_interpreted
from prunekernels.runtime import interpreting
from prunekernels.sparse.two_four.quantized.fp8.tokens_triton import ordered_tokens

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")

#: Every finite e4m3 number that is not negative, in order; written from the format's definition.
NUMBERS = torch.tensor(
    [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)]
)[:-1].double()


def nearest(values: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 numbers, float64; of two as near the one with an even mantissa."""
    size = values.double().abs()
    gap = (size[..., None] - NUMBERS).abs()
    best = gap.amin(-1, keepdim=True)
    at = torch.where(gap == best, torch.arange(len(NUMBERS)) % 2, 2).argmin(-1)
    return NUMBERS[at] * values.sign()


def tokens(dtype: torch.dtype) -> torch.Tensor:
    """Rows of many sizes, of zeros, of one value, of ties between numbers and of subnormals."""
    ties = torch.cat((NUMBERS, (NUMBERS[1:] + NUMBERS[:-1]) / 2)).float()
    ties = torch.cat((ties, -ties))[torch.randperm(506)[:300]]
    ties[7] = 448.0
    rows = [torch.randn(300) * 10.0**power for power in (-30, -6, 0, 4)]
    tiny = torch.zeros(300)
    tiny[::5] = 2.0**-140
    last = torch.zeros(300)
    last[299] = -3.0
    return torch.stack([*rows, ties, tiny, torch.zeros(300), last]).to(dtype)


def exact_scales(x: torch.Tensor) -> torch.Tensor:
    return (x.double().abs().amax(-1) / 448).float().clamp_min(2.0**-126)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_nearest_numbers(dtype):
    x = tokens(dtype)
    codes, scales = quantize_tokens(x)
    assert torch.equal(scales, exact_scales(x))
    assert torch.equal(codes.double(), nearest((x.float() / scales[:, None]).clamp(-448, 448)))
    off = (codes.double() * scales.double()[:, None] - x.double()).abs()
    bound = torch.maximum(x.double().abs() / 16, scales.double()[:, None] / 1024)
    assert (off <= bound * (1 + 1e-6)).all()


def test_a_token_that_is_not_finite_has_the_scale_nan():
    x = torch.ones(4, 2, 8)
    x[0, 0, 3], x[1, 1, 2], x[2, 0, 7] = torch.nan, torch.inf, -torch.inf
    wrong = torch.zeros(4, 2, dtype=torch.bool)
    wrong[0, 0] = wrong[1, 1] = wrong[2, 0] = True
    codes, scales = quantize_tokens(x)
    assert torch.equal(scales.isnan(), wrong)
    assert torch.equal(codes.float().isnan().all(-1), wrong)
    assert (codes[~wrong].float() == 448).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"float32, not torch.float64"):
        quantize_tokens(torch.ones(2, 2).double())
    with pytest.raises(ValueError, match=r"K > 0, not \(2, 0\)"):
        quantize_tokens(torch.ones(2, 0))


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("order", ["e4m3", "f16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_writes_the_same_bits_in_the_products_order(order, dtype):
    x = tokens(dtype)
    want, scales = quantize_tokens(x)
    for given in (x, x.t().contiguous().t()):
        got = ordered_tokens(given, order)
        assert torch.equal(got.scales, scales)
        assert got.codes.shape == (len(x), 384)
        back = got.codes[:, quantized.places(300, order)]
        assert torch.equal(back[:, :300], want.view(torch.uint8))
        assert not back[:, 300:].any()


@interpreted
def test_the_kernel_marks_tokens_that_are_not_finite():
    x = torch.ones(4, 200)
    x[0, 3], x[1, 150], x[2, 7] = torch.nan, torch.inf, -torch.inf
    codes, scales = ordered_tokens(x, "e4m3")
    assert scales.isnan().tolist() == [True, True, True, False]
    assert (codes[:3] == 0x7F).all() and (codes[3, :192] == 0x7E).any()
