"""Quantised 2:4 weights on a real NVIDIA GPU: values, graphs, streams, gradients."""

from __future__ import annotations

import functools

import pytest
import quantized
import torch
import torch.nn.functional as F
from graphs import assert_captured_as_run
from products import assert_as_good_as_eager
from prunekernels import quantized24_gate_up, quantized24_linear
from prunekernels.sparse.layer import ACTIVATIONS
from prunekernels.sparse.two_four.quantized import mma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = "cuda"
every_impl = pytest.mark.parametrize("impl", ["eager", "triton", "mma_sp"])
every_kernel = pytest.mark.parametrize("impl", ["triton", "mma_sp"])
every_form = pytest.mark.parametrize(("kind", "group", "zeros"), quantized.EVERY)
every_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def on_gpu(*form, **options):
    """A packed weight on the GPU, and what it stands for; arguments of `quantized.made`."""
    packed, exact = quantized.made(*form, **options)
    return packed.to(GPU), exact.to(GPU)


def test_the_self_test_passes():
    assert mma.self_test(torch.device(GPU, 0)) is None


@every_form
@every_impl
@every_type
@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (130, 204)])
def test_values_at_all_token_counts_are_as_good_as_a_dense_layers(
    kind, group, zeros, impl, dtype, rows, columns
):
    packed, weight = on_gpu(rows, columns, kind, group, zeros, dtype)
    bias = torch.randn(rows, device=GPU).to(dtype)
    for tokens in (1, 7, 8, 9, 16, 17, 33, 64, 65, 300):
        x = (torch.randn(tokens, columns, device=GPU) / 100).to(dtype)
        exact = F.linear(x.double(), weight, bias.double())
        got = quantized24_linear(x, packed, bias, impl=impl)
        assert_as_good_as_eager(got, F.linear(x, weight.to(dtype), bias), exact)
        assert torch.equal(got, quantized24_linear(x, packed, bias, impl=impl))


@every_kernel
@every_form
def test_small_integers_are_multiplied_exactly(impl, kind, group, zeros):
    packed, weight = on_gpu(200, 1088, kind, group, zeros, whole=True)
    for tokens in (3, 20, 64):
        x = torch.randint(-1, 2, (tokens, 1088), device=GPU).to(torch.bfloat16)
        got = quantized24_linear(x, packed, impl=impl)
        assert torch.equal(got, (x.double() @ weight.T).to(torch.bfloat16))


@every_impl
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_are_as_good_as_eager(impl, activation):
    act, (packed, weight) = ACTIVATIONS[activation], on_gpu(512, 2048, "2:4-int4", 128)
    x = (torch.randn(5, 2048, device=GPU) / 100).to(torch.bfloat16)
    got = quantized24_linear(x, packed, None, activation, impl=impl)
    dense = act(F.linear(x, weight.to(torch.bfloat16)))
    assert_as_good_as_eager(got, dense, act(x.double() @ weight.T))


@every_form
@every_impl
@pytest.mark.parametrize("tokens", [1, 40])
def test_gate_and_up_in_one_op_are_as_good_as_eager(kind, group, zeros, impl, tokens):
    gate, exact_gate = on_gpu(1000, 1600, kind, group, zeros)
    up, exact_up = on_gpu(1000, 1600, kind, group, zeros)
    x = (torch.randn(tokens, 1600, device=GPU) / 100).to(torch.bfloat16)
    got = quantized24_gate_up(x, gate, up, impl=impl)
    exact = F.silu(x.double() @ exact_gate.T) * (x.double() @ exact_up.T)
    dense = [F.linear(x, weight.to(torch.bfloat16)) for weight in (exact_gate, exact_up)]
    assert_as_good_as_eager(got, F.silu(dense[0]) * dense[1], exact)


@every_form
@every_type
def test_expanding_is_exact(kind, group, zeros, dtype):
    packed, weight = quantized.made(130, 612, kind, group, zeros, dtype)
    dense = packed.to(GPU).to_dense()
    assert torch.equal(dense.cpu(), packed.to_dense())
    assert torch.equal(dense, weight.to(GPU, dtype))


@every_form
@every_kernel
def test_graphs_capture_and_replay_together(kind, group, zeros, impl):
    weights = [on_gpu(4096, 4096, kind, group, zeros)[0] for _ in range(2)]
    x = torch.randn(4, 4096, device=GPU).to(torch.bfloat16)
    assert_captured_as_run(
        [functools.partial(quantized24_linear, x, w, impl=impl) for w in weights]
    )


@every_form
def test_a_compiled_layer_has_gradients_as_good_as_eager(kind, group, zeros):
    torch.compiler.reset()  # each form is compiled anew
    packed, weight = on_gpu(512, 768, kind, group, zeros)
    x = (torch.randn(3, 768, device=GPU) / 100).to(torch.bfloat16).requires_grad_()
    layer = torch.compile(
        lambda x: quantized24_linear(x, packed, activation="silu"), fullgraph=True
    )
    layer(x).float().sum().backward()
    x2 = x.detach().requires_grad_()
    F.silu(F.linear(x2, weight.to(torch.bfloat16))).float().sum().backward()
    x3 = x.detach().double().requires_grad_()
    F.silu(F.linear(x3, weight)).sum().backward()
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)
