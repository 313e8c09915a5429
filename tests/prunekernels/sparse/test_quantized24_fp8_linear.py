"""Layers with e4m3 weights and activations on a CPU: values, gradients, tracing, refusals."""

from __future__ import annotations

import pytest
import quantized
import torch
import torch.nn.functional as F
from fake_gpu import fake_gpu
from packed_formats import DTYPES
from prunekernels import (
    quantize_tokens,
    quantized24_fp8_linear,
    quantized24_linear,
    runtime,
)
from prunekernels.sparse.layer import ACTIVATIONS
from prunekernels.sparse.two_four.quantized.fp8.linear import OP
from torch import Tensor


def made(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> quantized.Made:
    return quantized.made(rows, columns, "2:4-fp8", 0, False, dtype)


def rounded(x: Tensor) -> Tensor:
    """What activations are rounded to, float64."""
    codes, scales = quantize_tokens(x)
    return codes.double() * scales.double()[..., None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 16, 64), (1, 1, 4), (17, 48, 330)])
def test_values_are_those_of_rounded_activations(dtype, tokens, rows, columns):
    packed, weight = made(rows, columns, dtype)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    for activation, act in ACTIVATIONS.items():
        truth = act(F.linear(rounded(x), weight, bias.double()))
        got = quantized24_fp8_linear(x, packed, bias, activation)
        assert got.dtype == dtype and got.shape == (tokens, rows)
        # float32 sums, rounded once
        half = torch.finfo(dtype).eps / 2
        floor = 1e-6 * truth.abs().max() if tokens else 0.0
        assert ((got.double() - truth).abs() <= half * truth.abs() * 1.001 + floor).all()


def test_small_integers_are_exact_and_rounding_is_what_separates_it_from_16_bits():
    packed, weight = quantized.made(20, 200, "2:4-fp8", 0, False, torch.float32, whole=True)
    x = torch.randint(-7, 8, (2, 3, 200)).float()
    x[..., 0] = 7
    assert torch.equal(quantized24_fp8_linear(x, packed).double(), x.double() @ weight.T)
    x = torch.randn(6, 200)
    exact = x.double() @ weight.T
    off = (quantized24_fp8_linear(x, packed).double() - exact).abs()
    assert (quantized24_linear(x, packed).double() - exact).abs().max() < 1e-3
    # each activation is off by 2⁻⁴ of itself at most, or by 2⁻¹⁰ of its token's scale
    least = quantize_tokens(x).scales.double()[:, None] / 1024 * weight.abs().sum(1)
    bound = x.double().abs() @ weight.abs().T / 16 + least
    assert (off <= bound).all() and off.max() > 0.02 * bound.max()


def test_gradients_pass_the_rounding_by():
    packed, weight = made(20, 200, torch.float32)
    x = (torch.randn(3, 200) / 100).requires_grad_()
    bias = torch.randn(20, requires_grad=True)
    quantized24_fp8_linear(x, packed, bias, "silu").sum().backward()
    x2, bias2 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    F.silu(F.linear(x2, weight, bias2)).sum().backward()
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias.grad.double(), bias2.grad, rtol=1e-3, atol=1e-3)


def test_the_op_is_traced():
    packed, _ = made(20, 200)
    x = torch.randn(3, 200, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(20, dtype=torch.bfloat16, requires_grad=True)
    arguments = (x, packed.packed, packed.scales, 20, 200, bias, "silu", "auto")
    torch.library.opcheck(torch.ops.prunekernels.quantized24_fp8_linear.default, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: quantized24_fp8_linear(x, packed, bias), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), quantized24_fp8_linear(x, packed, bias))


def test_what_is_refused():
    packed, _ = made(20, 200)
    other, _ = quantized.made(20, 200, "2:4-int8", 0)
    x = torch.randn(3, 200).to(torch.bfloat16)
    with pytest.raises(ValueError, match="w must be a weight packed as 2:4-fp8, not 2:4-int8"):
        quantized24_fp8_linear(x, other)
    with pytest.raises(ValueError, match="x must be a tensor, not NoneType"):
        quantized24_fp8_linear(None, packed)
    with pytest.raises(ValueError, match="quantize_tokens: x must be a tensor, not list"):
        quantize_tokens([1.0])
    with pytest.raises(ValueError, match=r"x is torch.float16 and w torch.bfloat16"):
        quantized24_fp8_linear(x.half(), packed)
    with pytest.raises(ValueError, match="impl must be one of auto, eager, mma_sp, got 'triton'"):
        quantized24_fp8_linear(x, packed, impl="triton")
    with pytest.raises(ValueError, match=r"cannot run: these tensor cores need an NVIDIA GPU"):
        quantized24_fp8_linear(x, packed, impl="mma_sp")
    with pytest.raises(ValueError, match=r"does not hold a \(20, 260\) weight of 2:4-fp8"):
        torch.ops.prunekernels.quantized24_fp8_linear(
            x.to("meta"), packed.packed.to("meta"), packed.scales.to("meta"),
            20, 260, None, "none", "auto",
        )  # fmt: skip


def test_gpus_run_the_kernel_by_name_alone_and_an_a100_says_why_it_cannot(monkeypatch):
    gpu = fake_gpu(monkeypatch, OP)
    for tokens in (1, 64, 4096):
        assert gpu.select(tokens).name == "eager"
    assert gpu.runs == 0
    for dtype in DTYPES:
        assert gpu.select(4, dtype, "mma_sp").name == "mma_sp"
    assert gpu.runs == 1
    gpu = fake_gpu(monkeypatch, OP)
    gpu.capability = (8, 0)
    why = r"no mma_sp kernel for compute capability 8.0 \(e4m3 operands need 8.9 or later\)"
    with pytest.raises(ValueError, match=why):
        gpu.select(4, impl="mma_sp")
    with pytest.raises(ValueError, match="multiply bfloat16 and float16 values, not torch"):
        fake_gpu(monkeypatch, runtime.ops()["quantized24_linear"]).select(
            4, torch.float32, "mma_sp"
        )
