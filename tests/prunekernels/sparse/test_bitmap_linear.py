"""Linear layers with a bitmap weight: values, gradients, tracing, refusals (expanded path)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from products import assert_as_good_as_eager, ragged
from prunekernels.sparse.bitmap.expand import product
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.linear import bitmap_gate_up, bitmap_linear
from prunekernels.sparse.layer import ACTIVATIONS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(0, 16, 64), (1, 1, 1), (17, 48, 576), (300, 33, 61)]
)
def test_values(dtype, activation, tokens, rows, columns):
    weight, x = ragged(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    act, packed = ACTIVATIONS[activation or "none"], bitmap_pack(weight)
    for bias in (None, torch.randn(rows).to(dtype)):
        exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
        got = bitmap_linear(x, packed, bias, activation)
        assert_as_good_as_eager(got, act(F.linear(x, weight, bias)), exact)
        assert torch.equal(got, bitmap_linear(x, packed, bias, activation))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(density):
    weight = torch.full((20, 70), 1.5 * density)
    # sums of small integers are exact in any order
    x = torch.randint(-3, 4, (3, 70)).float()
    assert torch.equal(bitmap_linear(x, bitmap_pack(weight)), F.linear(x, weight))


def test_a_product_on_a_cpu_holds_no_dense_weight():
    beside_the_result = []
    for rows in (500, 4000):
        weight = ragged(rows, 1000, torch.bfloat16)
        packed, x = bitmap_pack(weight), torch.randn(2, 1000).to(torch.bfloat16)
        parts = packed.records, packed.starts, rows
        with Allocations() as used:
            y = product(x, *parts, None)
        # the result has rows to fill up a line
        beside_the_result.append(used.peak - 2 * y.nbytes)
    assert beside_the_result[1] < 1.1 * beside_the_result[0]
    assert beside_the_result[1] < weight.nbytes / 2
    assert_as_good_as_eager(y, F.linear(x, weight), x.double() @ weight.double().T)


def test_leading_dimensions_strides_and_aliasing():
    packed = bitmap_pack(ragged(24, 72, torch.bfloat16))
    x = torch.randn(2, 72, 3, 5).to(torch.bfloat16).permute(0, 2, 3, 1)
    got = bitmap_linear(x, packed)
    assert got.shape == (2, 3, 5, 24) and got.is_contiguous()
    assert torch.equal(got, bitmap_linear(x.contiguous(), packed))
    assert torch.equal(bitmap_linear(x[0, 0, 0], packed), bitmap_linear(x[0, 0, :1], packed)[0])
    x = torch.randn(2, 4)
    y = bitmap_linear(x, bitmap_pack(torch.eye(4)))
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_of_input_and_bias(activation):
    weight = ragged(20, 44, torch.bfloat16)
    bias = torch.randn(20).to(torch.bfloat16).requires_grad_()
    x = torch.randn(3, 2, 44).to(torch.bfloat16).requires_grad_()
    seed = torch.randn(3, 2, 20).to(torch.bfloat16)
    bitmap_linear(x, bitmap_pack(weight), bias, activation).backward(seed)
    x2, bias2 = x.detach().requires_grad_(), bias.detach().requires_grad_()
    ACTIVATIONS[activation](F.linear(x2, weight, bias2)).backward(seed)
    x3 = x.detach().double().requires_grad_()
    bias3 = bias.detach().double().requires_grad_()
    ACTIVATIONS[activation](F.linear(x3, weight.double(), bias3)).backward(seed.double())
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)
    assert_as_good_as_eager(bias.grad, bias2.grad, bias3.grad)


def test_gate_and_up_together():
    gate, up = (ragged(40, 100, torch.bfloat16) for _ in range(2))
    x = torch.randn(2, 3, 100).to(torch.bfloat16).requires_grad_()
    packed = bitmap_pack(gate), bitmap_pack(up)
    eager = F.silu(F.linear(x, gate)) * F.linear(x, up)
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    got = bitmap_gate_up(x, *packed)
    assert got.shape == (2, 3, 40)
    assert_as_good_as_eager(got.detach(), eager.detach(), exact.detach())
    assert torch.equal(got, bitmap_gate_up(x.detach(), *packed))
    (grad,) = torch.autograd.grad(got.float().sum(), x)
    (want,) = torch.autograd.grad(exact.sum(), x)
    (close,) = torch.autograd.grad(eager.float().sum(), x)
    assert_as_good_as_eager(grad, close, want)
    with pytest.raises(ValueError, match=r"same shape, not \(40, 100\) and \(33, 100\)"):
        bitmap_gate_up(x, packed[0], bitmap_pack(up[:33]))
    with pytest.raises(ValueError, match="columns of up"):
        bitmap_gate_up(x, packed[0], bitmap_pack(up[:, :96]))


def test_ops_pass_opcheck():
    packed = bitmap_pack(ragged(20, 44, torch.bfloat16))
    parts = packed.records, packed.starts, packed.chunks, 20, 44
    bias = torch.randn(20).to(torch.bfloat16).requires_grad_()
    x = torch.randn(2, 3, 44).to(torch.bfloat16).requires_grad_()
    linear = torch.ops.prunekernels.bitmap_linear
    torch.library.opcheck(linear, (x, *parts, bias, "silu", "auto"))
    torch.library.opcheck(linear, (x.detach(), *parts, None, "none", "eager"))
    expanded = packed.records, packed.starts, torch.bfloat16, 20, 44
    torch.library.opcheck(torch.ops.prunekernels.bitmap_expand, expanded)


def test_compiles_as_one_graph():
    packed = bitmap_pack(ragged(20, 44, torch.bfloat16))

    def layer(x):
        return bitmap_linear(x, packed, activation="relu") * 2

    x = torch.randn(3, 44).to(torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(x1).float().sum().backward()
    layer(x2).float().sum().backward()
    assert torch.equal(x1.grad, x2.grad)


def _bad_inputs():
    weight = torch.zeros(8, 12, dtype=torch.bfloat16)
    w, x = bitmap_pack(weight), torch.zeros(2, 12, dtype=torch.bfloat16)
    bias = torch.zeros(8, dtype=torch.bfloat16)
    return {
        "dense": ((x, weight), {}, "bitmap_pack"),
        "columns": ((x[:, :8], w), {}, r"\(2, 8\) .* 12 columns .*\(8, 12\)"),
        "scalar": ((x[0, 0], w), {}, "12 columns"),
        "type": ((x.half(), w), {}, "torch.float16 and w torch.bfloat16"),
        "device": ((x.to("meta"), w), {}, "meta .* cpu"),
        "bias shape": ((x, w, bias[:7]), {}, r"shape \(8,\).* not \(7,\)"),
        "bias type": ((x, w, bias.float()), {}, r"bias\.to\(x\)"),
        "activation": ((x, w, None, "swish"), {}, "silu.*'swish'"),
        "impl": ((x, w), {"impl": "cuda"}, "triton.*'cuda'"),
        "triton": ((x, w), {"impl": "triton"}, "cannot run: .*cpu"),
    }


@pytest.mark.parametrize("kind", list(_bad_inputs()))
def test_bad_input_is_refused_with_both_values(kind, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    arguments, options, message = _bad_inputs()[kind]
    with pytest.raises(ValueError, match=message):
        bitmap_linear(*arguments, **options)
