"""Every packed format on a real NVIDIA GPU: values, repeatability, graphs, streams, gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from graphs import assert_captured_as_run
from packed_formats import DTYPES, every_format
from products import assert_as_good_as_eager
from prunekernels.sparse.layer import ACTIVATIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = "cuda"
every_impl = pytest.mark.parametrize("impl", ["eager", "triton", "tensor cores", "auto"])
every_kernel = pytest.mark.parametrize("impl", ["triton", "tensor cores"])


def named(form, impl):
    """The implementation as the format's functions call it."""
    return form.tensor_cores if impl == "tensor cores" else impl


@every_format
@every_impl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1024, 4096), (33, 576), (4096, 1216), (16, 4), (130, 61)]
)
def test_values_at_all_token_counts_are_as_good_as_a_dense_layers(form, impl, dtype, rows, columns):
    if impl == "tensor cores" and dtype == torch.float32:
        pytest.skip("the tensor cores multiply 16-bit values")
    linear, weight = form.function("linear"), form.values(rows, columns, dtype, GPU)
    packed, bias = form.kind.pack(weight), torch.randn(rows, device=GPU).to(dtype)
    for tokens in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 300):
        x = torch.randn(tokens, columns, device=GPU).to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        got = linear(x, packed, bias, impl=named(form, impl))
        assert_as_good_as_eager(got, F.linear(x, weight, bias), exact)
        assert torch.equal(got, linear(x, packed, bias, impl=named(form, impl)))


@every_format
@every_impl
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_are_as_good_as_eager(form, impl, activation):
    act, weight = ACTIVATIONS[activation], form.values(512, 2048, torch.bfloat16, GPU)
    x = torch.randn(5, 2048, device=GPU).to(torch.bfloat16)
    packed = form.kind.pack(weight)
    got = form.function("linear")(x, packed, None, activation, impl=named(form, impl))
    exact = act(x.double() @ weight.double().T)
    assert_as_good_as_eager(got, act(F.linear(x, weight)), exact)


@every_format
@every_impl
@pytest.mark.parametrize("tokens", [1, 12, 20, 40, 64, 70])
def test_gate_and_up_in_one_op_are_as_good_as_eager(form, impl, tokens):
    gate, up = (form.values(1000, 1600, torch.bfloat16, GPU) for _ in range(2))
    x = torch.randn(tokens, 1600, device=GPU).to(torch.bfloat16)
    packed = form.kind.pack(gate), form.kind.pack(up)
    got = form.function("gate_up")(x, *packed, impl=named(form, impl))
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert_as_good_as_eager(got, F.silu(F.linear(x, gate)) * F.linear(x, up), exact)


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanding_is_exact(form, dtype):
    weight = form.values(130, 611, dtype, GPU)
    assert torch.equal(form.kind.pack(weight).to_dense(), weight)


@every_format
@every_kernel
def test_graphs_capture_and_replay_together(form, impl):
    linear, impl = form.function("linear"), named(form, impl)
    weights = [form.kind.pack(form.values(4096, 4096, torch.bfloat16, GPU)) for _ in range(2)]
    x = torch.randn(4, 4096, device=GPU).to(torch.bfloat16)
    assert_captured_as_run([functools.partial(linear, x, w, impl=impl) for w in weights])


@every_format
def test_streams_do_not_disturb_each_other(form):
    linear, impl = form.function("linear"), form.tensor_cores
    packed = form.kind.pack(form.values(4096, 4096, torch.bfloat16, GPU))
    x = torch.randn(4, 4096, device=GPU).to(torch.bfloat16)
    want = linear(x, packed, impl=impl)
    torch.cuda.synchronize()
    results = []
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(linear(x, packed, impl=impl))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


@every_format
def test_a_compiled_layer_has_gradients_as_good_as_eager(form):
    linear, weight = form.function("linear"), form.values(512, 768, torch.bfloat16, GPU)
    packed = form.kind.pack(weight)
    x = torch.randn(3, 768, device=GPU).to(torch.bfloat16).requires_grad_()
    y = torch.compile(lambda x: linear(x, packed, activation="silu"), fullgraph=True)(x)
    y.float().sum().backward()
    x2 = x.detach().requires_grad_()
    F.silu(F.linear(x2, weight)).float().sum().backward()
    x3 = x.detach().double().requires_grad_()
    F.silu(F.linear(x3, weight.double())).sum().backward()
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)
