"""2:4 linear layers: values against float64, gradients, tracing, refusals (expanded path)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from products import assert_as_good_as_eager
from prunekernels.sparse.two_four import expand as expand24
from prunekernels.sparse.two_four.format import Sparse24, sparse24_pack
from prunekernels.sparse.two_four.linear import ACTIVATIONS, sparse24_gate_up, sparse24_linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    groups = -(-columns // 4)
    rank = torch.rand(rows, groups, 4).argsort(2).argsort(2)
    kept = rank < torch.randint(0, 3, (rows, groups, 1))
    return (torch.randn(rows, groups, 4) * kept).view(rows, -1)[:, :columns].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(0, 16, 64), (1, 1, 4), (3, 33, 61), (17, 48, 576), (300, 20, 130)],
)
def test_values(dtype, activation, tokens, rows, columns):
    weight, x = two_of_four(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    act = ACTIVATIONS[activation or "none"]
    for bias in (None, torch.randn(rows).to(dtype)):
        exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
        got = sparse24_linear(x, sparse24_pack(weight), bias, activation)
        assert_as_good_as_eager(got, act(F.linear(x, weight, bias)), exact)
        assert torch.equal(got, sparse24_linear(x, sparse24_pack(weight), bias, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 16, 64), (5, 33, 300)])
def test_gate_up_values(dtype, tokens, rows, columns):
    gate, up = two_of_four(rows, columns, dtype), two_of_four(rows, columns, dtype)
    x = torch.randn(tokens, columns).to(dtype)
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    eager = F.silu(F.linear(x, gate)) * F.linear(x, up)
    got = sparse24_gate_up(x, sparse24_pack(gate), sparse24_pack(up))
    assert_as_good_as_eager(got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [96, 103])
def test_a_cpu_multiplies_some_lines_at_a_time(monkeypatch, dtype, rows):
    weight, bias = two_of_four(rows, 330, dtype), torch.randn(rows).to(dtype)
    packed, expanded, real = sparse24_pack(weight), [], expand24._expand
    monkeypatch.setattr(expand24, "_CHUNK", 16 * 384 * 3)
    monkeypatch.setattr(expand24, "_LINES", 1)
    monkeypatch.setattr(
        expand24, "_expand", lambda words, *rest: (expanded.append(len(words)), real(words, *rest))
    )
    for tokens in (0, 1, 5):
        x = torch.randn(tokens, 330).to(dtype)
        got = sparse24_linear(x, packed, bias)
        assert expanded == ([3, 3] if rows == 96 else [3, 3, 1])
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert_as_good_as_eager(got, F.linear(x, weight, bias), exact)
        expanded.clear()


def test_leading_dimensions_and_strides():
    weight = two_of_four(24, 72, torch.bfloat16)
    packed = sparse24_pack(weight)
    wide = torch.randn(2, 72, 3, 5).to(torch.bfloat16)
    x = wide.permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    got = sparse24_linear(x, packed)
    assert got.shape == (2, 3, 5, 24) and got.is_contiguous()
    assert torch.equal(got, sparse24_linear(x.contiguous(), packed))
    assert sparse24_linear(x[0, 0, 0], packed).shape == (24,)
    assert torch.equal(sparse24_linear(x[0, 0, 0], packed), sparse24_linear(x[0, 0, :1], packed)[0])


def test_the_result_never_aliases_its_input():
    x = torch.randn(2, 4).to(torch.bfloat16)
    weight = torch.eye(4).to(torch.bfloat16)
    y = sparse24_linear(x, sparse24_pack(weight))
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_of_input_and_bias(activation):
    weight = two_of_four(20, 44, torch.bfloat16)
    bias = torch.randn(20).to(torch.bfloat16).requires_grad_()
    x = torch.randn(3, 2, 44).to(torch.bfloat16).requires_grad_()
    seed = torch.randn(3, 2, 20).to(torch.bfloat16)
    sparse24_linear(x, sparse24_pack(weight), bias, activation).backward(seed)
    x2, bias2 = x.detach().requires_grad_(), bias.detach().requires_grad_()
    ACTIVATIONS[activation](F.linear(x2, weight, bias2)).backward(seed)
    x3 = x.detach().double().requires_grad_()
    bias3 = bias.detach().double().requires_grad_()
    ACTIVATIONS[activation](F.linear(x3, weight.double(), bias3)).backward(seed.double())
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)
    assert_as_good_as_eager(bias.grad, bias2.grad, bias3.grad)


def test_gradient_of_gate_up():
    gate, up = two_of_four(20, 44, torch.float16), two_of_four(20, 44, torch.float16)
    x = torch.randn(6, 44).to(torch.float16).requires_grad_()
    seed = torch.randn(6, 20).to(torch.float16)
    sparse24_gate_up(x, sparse24_pack(gate), sparse24_pack(up)).backward(seed)
    x2 = x.detach().requires_grad_()
    (F.silu(F.linear(x2, gate)) * F.linear(x2, up)).backward(seed)
    x3 = x.detach().double().requires_grad_()
    (F.silu(F.linear(x3, gate.double())) * F.linear(x3, up.double())).backward(seed.double())
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)


def test_training_the_packed_weight_is_refused():
    with pytest.raises(ValueError, match=r"to_dense\(\)"):
        sparse24_pack(torch.zeros(4, 4, dtype=torch.bfloat16)).requires_grad_()


def test_ops_pass_opcheck():
    packed = sparse24_pack(two_of_four(20, 44, torch.bfloat16))
    bias = torch.randn(20).to(torch.bfloat16).requires_grad_()
    x = torch.randn(2, 3, 44).to(torch.bfloat16).requires_grad_()
    linear = torch.ops.prunekernels.sparse24_linear
    torch.library.opcheck(linear, (x, packed.packed, 20, 44, bias, "silu", "auto"))
    torch.library.opcheck(linear, (x.detach(), packed.packed, 20, 44, None, "none", "eager"))
    torch.library.opcheck(
        torch.ops.prunekernels.sparse24_gate_up, (x, packed.packed, packed.packed, 20, 44, "auto")
    )
    torch.library.opcheck(
        torch.ops.prunekernels.sparse24_expand, (packed.packed, 20, 44, torch.bfloat16)
    )


def test_compiles_as_one_graph():
    packed = sparse24_pack(two_of_four(20, 44, torch.bfloat16))

    def layer(x):
        return sparse24_gate_up(x, packed, packed) + sparse24_linear(x, packed, activation="relu")

    x = torch.randn(3, 44).to(torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(x1).float().sum().backward()
    layer(x2).float().sum().backward()
    assert torch.equal(x1.grad, x2.grad)


def _bad_inputs():
    weight = torch.zeros(8, 12, dtype=torch.bfloat16)
    w, x = sparse24_pack(weight), torch.zeros(2, 12, dtype=torch.bfloat16)
    bias = torch.zeros(8, dtype=torch.bfloat16)
    return [
        ((x, weight), {}, "sparse24_pack"),
        ((x[:, :8], w), {}, r"\(2, 8\) .* 12 columns .*\(8, 12\)"),
        ((x[0, 0], w), {}, "12 columns"),
        ((x.half(), w), {}, "torch.float16 and w torch.bfloat16"),
        ((x.float(), w), {}, "torch.float32 and w torch.bfloat16"),
        ((x.to("meta"), w), {}, "meta .* cpu"),
        ((x, w, bias[:7]), {}, r"shape \(8,\).* not \(7,\)"),
        ((x, w, bias.float()), {}, r"bias\.to\(x\)"),
        ((x, w, None, "swish"), {}, "silu.*'swish'"),
        ((x, w), {"impl": "cuda"}, "mma_sp.*'cuda'"),
        ((x, w), {"impl": "triton"}, "cannot run: .*cpu"),
        ((x, w), {"impl": "mma_sp"}, "NVIDIA GPU"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_bad_input_is_refused_with_both_values(number, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    arguments, options, message = _bad_inputs()[number]
    with pytest.raises(ValueError, match=message):
        sparse24_linear(*arguments, **options)


def test_gate_and_up_must_match():
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    gate = sparse24_pack(torch.zeros(8, 8, dtype=torch.bfloat16))
    up = sparse24_pack(torch.zeros(4, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(8, 8\) and \(4, 8\)"):
        sparse24_gate_up(x, gate, up)
    with pytest.raises(ValueError, match="up"):
        sparse24_gate_up(x, gate, Sparse24(up.packed, up.shape, torch.float16))
