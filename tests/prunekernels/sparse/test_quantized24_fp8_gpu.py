"""Layers with e4m3 weights and activations on a real NVIDIA GPU: values, graphs, repeatability."""

from __future__ import annotations

import functools

import pytest
import quantized
import torch
import torch.nn.functional as F
from graphs import assert_captured_as_run
from packed_formats import DTYPES
from prunekernels import quantize_tokens, quantized24_fp8_linear
from prunekernels.sparse.layer import ACTIVATIONS

pytest.importorskip("triton")
from prunekernels.sparse.two_four.quantized.fp8 import mma
from prunekernels.sparse.two_four.quantized.fp8.tokens_triton import ordered_tokens


def _fits() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() in mma.CAPABILITIES


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _fits(), reason="needs an NVIDIA GPU that knows e4m3 (sm_89 or later)"),
]

GPU = "cuda"


def on_gpu(rows, columns, dtype=torch.bfloat16, **options):
    """A packed weight on the GPU, and what it stands for."""
    packed, exact = quantized.made(rows, columns, "2:4-fp8", 0, False, dtype, **options)
    return packed.to(GPU), exact.to(GPU)


def exactly(x, weight, bias=None):
    """Float64: the product of what x is rounded to."""
    codes, scales = quantize_tokens(x)
    return F.linear(codes.double() * scales.double()[:, None], weight, bias)


def assert_near(got, exact):
    """One rounding, and what sums leave: ten times what an adder of 13 bits typically does."""
    half = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    native = torch.cuda.get_device_capability() in mma.NATIVE
    floor = (1e-2 if native else 1e-5) * exact.square().mean().sqrt()
    assert ((got.double() - exact).abs() <= half * exact.abs() + floor).all()


def test_the_self_test_passes():
    assert mma.self_test(torch.device(GPU, 0)) is None


@pytest.mark.parametrize("order", ["e4m3", "f16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_rounded_as_on_a_cpu(order, dtype):
    x = (torch.randn(9, 1000) * 10.0 ** torch.arange(-6, 3)[:, None]).to(dtype)
    x[1], x[2, 999] = 0, torch.inf
    got, want = ordered_tokens(x.to(GPU), order), quantized.ordered_tokens(x, order)
    assert torch.equal(got.scales.cpu().isnan(), want.scales.isnan())
    finite = want.scales.isfinite()
    assert torch.equal(got.scales.cpu()[finite], want.scales[finite])
    assert torch.equal(got.codes.cpu()[finite], want.codes[finite])
    eager = quantize_tokens(x.to(GPU))
    assert torch.equal(eager.scales.cpu()[finite], want.scales[finite])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (130, 204)])
def test_values_at_all_token_counts_are_those_of_rounded_activations(dtype, rows, columns):
    packed, weight = on_gpu(rows, columns, dtype)
    bias = torch.randn(rows, device=GPU).to(dtype)
    for tokens in (1, 7, 8, 9, 16, 17, 33, 64, 65, 300):
        x = (torch.randn(tokens, columns, device=GPU) / 100).to(dtype)
        got = quantized24_fp8_linear(x, packed, bias, impl="mma_sp")
        assert_near(got, exactly(x, weight, bias.double()))
        for _ in range(3):
            assert torch.equal(got, quantized24_fp8_linear(x, packed, bias, impl="mma_sp"))


@pytest.mark.parametrize("tokens", [3, 20, 64, 200])
def test_small_integers_are_multiplied_exactly(tokens):
    packed, weight = on_gpu(200, 1216, torch.float32, whole=True)
    x = torch.randint(-7, 8, (tokens, 1216), device=GPU).float()
    x[:, 0] = 7
    got = quantized24_fp8_linear(x, packed, impl="mma_sp")
    assert torch.equal(got.double(), x.double() @ weight.T)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_and_eager(activation):
    packed, weight = on_gpu(512, 2048)
    x = (torch.randn(5, 2048, device=GPU) / 1000).to(torch.bfloat16)
    exact = ACTIVATIONS[activation](exactly(x, weight))
    for impl in ("eager", "mma_sp"):
        assert_near(quantized24_fp8_linear(x, packed, None, activation, impl=impl), exact)


def test_tokens_that_are_not_finite_give_nan_alone():
    packed, _ = on_gpu(64, 512)
    x = torch.randn(4, 512, device=GPU).to(torch.bfloat16)
    x[1, 3], x[2] = torch.nan, 0
    got = quantized24_fp8_linear(x, packed, impl="mma_sp")
    assert got[1].isnan().all() and got[[0, 3]].isfinite().all() and not got[2].any()


def test_graphs_capture_and_replay_together():
    weights = [on_gpu(4096, 4096)[0] for _ in range(2)]
    x = torch.randn(4, 4096, device=GPU).to(torch.bfloat16)
    assert_captured_as_run(
        [functools.partial(quantized24_fp8_linear, x, w, impl="mma_sp") for w in weights]
    )
