"""Layers with quantised 2:4 weights on a CPU: values, gradients, tracing, refusals."""

from __future__ import annotations

import pytest
import quantized
import torch
import torch.nn.functional as F
from packed_formats import DTYPES
from products import assert_as_good_as_eager
from prunekernels import quantized24_gate_up, quantized24_linear
from prunekernels.sparse.layer import ACTIVATIONS

every = pytest.mark.parametrize(("kind", "group", "zeros"), quantized.EVERY)


@every
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 16, 64), (1, 1, 4), (17, 48, 330)])
def test_values_are_as_good_as_those_of_a_dense_layer(
    kind, group, zeros, dtype, tokens, rows, columns
):
    packed, exact = quantized.made(rows, columns, kind, group, zeros, dtype)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    for activation, act in ACTIVATIONS.items():
        truth = act(F.linear(x.double(), exact, bias.double()))
        eager = act(F.linear(x, exact.to(dtype), bias))
        got = quantized24_linear(x, packed, bias, activation)
        assert_as_good_as_eager(got, eager, truth)


@pytest.mark.parametrize("rows", [700, 1500])
def test_weights_of_many_blocks_are_expanded_one_by_one(rows):
    packed, exact = quantized.made(rows, 1000, "2:4-int4", 128, True, torch.float32)
    x, bias = torch.randn(2, 1000), torch.randn(rows)
    got = quantized24_linear(x, packed, bias)
    torch.testing.assert_close(
        got.double(), F.linear(x.double(), exact, bias.double()), rtol=1e-4, atol=1e-3
    )


@every
def test_gate_and_up(kind, group, zeros):
    gate, exact_gate = quantized.made(33, 200, kind, group, zeros)
    up, exact_up = quantized.made(33, 200, kind, group, zeros)
    x = (torch.randn(2, 3, 200) / 50).to(torch.bfloat16)
    truth = F.silu(x.double() @ exact_gate.T) * (x.double() @ exact_up.T)
    gates, ups = exact_gate.to(x.dtype), exact_up.to(x.dtype)
    got = quantized24_gate_up(x, gate, up)
    assert_as_good_as_eager(got, F.silu(F.linear(x, gates)) * F.linear(x, ups), truth)


@pytest.mark.parametrize(("kind", "group", "zeros"), quantized.EVERY[2::3])
def test_ops_are_traced_and_differentiated(kind, group, zeros):
    packed, exact = quantized.made(20, 200, kind, group, zeros, torch.float32)
    other, exact_other = quantized.made(20, 200, kind, group, zeros, torch.float32)
    x = (torch.randn(3, 200) / 100).requires_grad_()
    bias = torch.randn(20, requires_grad=True)

    def layer(x, bias):
        return quantized24_linear(x, packed, bias, "silu") + quantized24_gate_up(x, packed, other)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bias), layer(x, bias))
    compiled(x, bias).sum().backward()
    x2, bias2 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    truth = F.silu(F.linear(x2, exact, bias2))
    truth = truth + F.silu(F.linear(x2, exact)) * F.linear(x2, exact_other)
    truth.sum().backward()
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias.grad.double(), bias2.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zeros", [False, True])
def test_opcheck(zeros):
    packed, _ = quantized.made(20, 200, "2:4-int4", 128, zeros)
    x = torch.randn(3, 200, dtype=torch.bfloat16, requires_grad=True)
    parts = packed.packed, packed.scales, packed.zeros
    ops = torch.ops.prunekernels
    rest = *packed.shape, packed.format
    torch.library.opcheck(ops.quantized24_linear.default, (x, *parts, *rest, None, "none", "auto"))
    torch.library.opcheck(ops.quantized24_gate_up.default, (x, *parts, *parts, *rest, "auto"))
    torch.library.opcheck(ops.quantized24_expand.default, (*parts, *rest, torch.bfloat16))


def test_bad_input_is_refused_with_both_values():
    packed, _ = quantized.made(32, 200, "2:4-int4", 128)
    other, _ = quantized.made(32, 200, "2:4-int4", 64)
    x = torch.zeros(2, 200, dtype=torch.bfloat16)
    for arguments, message in (
        ((x.half(), packed), "torch.float16 and w torch.bfloat16"),
        ((x[:, :8], packed), r"\(2, 8\) .* 200 columns"),
        ((x, packed.to_dense()), r"w must be .*2:4-int8 .* not Tensor: .*quantized24_round\("),
        ((None, packed), "x must be a tensor, not NoneType"),
        ((x, packed, [1.0]), "bias must be a tensor, not list"),
        ((x, packed, x[0]), r"shape \(32,\)"),
        ((x, packed, None, "swish"), "silu.*'swish'"),
        ((x, packed, None, None, "cuda"), "mma_sp.*'cuda'"),
        ((x, packed, None, None, "mma_sp"), "cannot run: .*NVIDIA GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            quantized24_linear(*arguments)
    with pytest.raises(ValueError, match="pack them alike"):
        quantized24_gate_up(x, packed, other)
    whole, _ = quantized.made(32, 200, "2:4-int8", 0)
    for arguments, message in (
        (
            (x, whole, packed),
            r'up must .*2:4-int8, not 2:4-int4: .*quantized24_round\(weight, "2:4-i',
        ),
        ((x, None, packed), "gate must be .*, not NoneType"),
        ((None, packed, packed), "x must be a tensor, not NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            quantized24_gate_up(*arguments)
    with pytest.raises(ValueError, match="does not hold"):
        torch.ops.prunekernels.quantized24_linear(
            x.to("meta"), packed.packed, packed.scales, None, 48, 200, "2:4-int4", None, "none", ""
        )
