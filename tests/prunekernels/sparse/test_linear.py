"""Linear layers of every packed format: values against float64, gradients, tracing, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packed_formats import DTYPES, every_format
from products import assert_as_good_as_eager
from prunekernels.sparse.layer import ACTIVATIONS


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(0, 16, 64), (1, 1, 1), (1, 1, 4), (3, 33, 61), (17, 48, 576), (300, 20, 130)],
)
def test_values_are_as_good_as_those_of_a_dense_layer(
    form, dtype, activation, tokens, rows, columns
):
    linear, act = form.function("linear"), ACTIVATIONS[activation or "none"]
    weight, x = form.values(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    packed = form.kind.pack(weight)
    for bias in (None, torch.randn(rows).to(dtype)):
        exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
        got = linear(x, packed, bias, activation)
        assert_as_good_as_eager(got, act(F.linear(x, weight, bias)), exact)
        assert torch.equal(got, linear(x, packed, bias, activation))


@every_format
def test_leading_dimensions_and_strides_change_nothing(form):
    linear, packed = form.function("linear"), form.kind.pack(form.values(24, 72, torch.bfloat16))
    x = torch.randn(2, 72, 3, 5).to(torch.bfloat16).permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    got = linear(x, packed)
    assert got.shape == (2, 3, 5, 24) and got.is_contiguous()
    assert torch.equal(got, linear(x.contiguous(), packed))
    assert torch.equal(linear(x[0, 0, 0], packed), linear(x[0, 0, :1], packed)[0])


@every_format
def test_the_result_never_aliases_its_input(form):
    x = torch.randn(2, 4).to(torch.bfloat16)
    y = form.function("linear")(x, form.kind.pack(torch.eye(4).to(torch.bfloat16)))
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@every_format
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_of_input_and_bias_are_as_good_as_eager(form, activation):
    act, weight = ACTIVATIONS[activation], form.values(20, 44, torch.bfloat16)
    bias = torch.randn(20).to(torch.bfloat16).requires_grad_()
    x = torch.randn(3, 2, 44).to(torch.bfloat16).requires_grad_()
    seed = torch.randn(3, 2, 20).to(torch.bfloat16)
    form.function("linear")(x, form.kind.pack(weight), bias, activation).backward(seed)
    x2, bias2 = x.detach().requires_grad_(), bias.detach().requires_grad_()
    act(F.linear(x2, weight, bias2)).backward(seed)
    x3 = x.detach().double().requires_grad_()
    bias3 = bias.detach().double().requires_grad_()
    act(F.linear(x3, weight.double(), bias3)).backward(seed.double())
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)
    assert_as_good_as_eager(bias.grad, bias2.grad, bias3.grad)


@every_format
def test_a_layer_compiles_as_one_graph(form):
    linear, packed = form.function("linear"), form.kind.pack(form.values(20, 44, torch.bfloat16))

    def layer(x):
        return linear(x, packed, activation="relu") * 2

    x = torch.randn(3, 44).to(torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(x1).float().sum().backward()
    layer(x2).float().sum().backward()
    assert torch.equal(x1.grad, x2.grad)


REFUSED = {
    "a dense weight": (lambda x, w, b: ((x, w.to_dense()), {}), "w must .*Tensor.*{name}_pack"),
    "no weight": (lambda x, w, b: ((x, None), {}), "w must .* not NoneType.*{name}_pack"),
    "no x": (lambda x, w, b: ((None, w), {}), "x must be a tensor, not NoneType"),
    "a list as x": (lambda x, w, b: (([1.0], w), {}), "x must be a tensor, not list"),
    "a number as bias": (lambda x, w, b: ((x, w, 1.0), {}), "bias must be a tensor, not float"),
    "other columns": (lambda x, w, b: ((x[:, :8], w), {}), r"\(2, 8\) .* 12 columns .*\(8, 12\)"),
    "a scalar": (lambda x, w, b: ((x[0, 0], w), {}), "12 columns"),
    "float16": (lambda x, w, b: ((x.half(), w), {}), "torch.float16 and w torch.bfloat16"),
    "float32": (lambda x, w, b: ((x.float(), w), {}), "torch.float32 and w torch.bfloat16"),
    "another device": (lambda x, w, b: ((x.to("meta"), w), {}), "meta .* cpu"),
    "a short bias": (lambda x, w, b: ((x, w, b[:7]), {}), r"shape \(8,\).* not \(7,\)"),
    "a wide bias": (lambda x, w, b: ((x, w, b.float()), {}), r"bias\.to\(x\)"),
    "an activation": (lambda x, w, b: ((x, w, None, "swish"), {}), "silu.*'swish'"),
    "an implementation": (lambda x, w, b: ((x, w), {"impl": "cuda"}), "triton.*'cuda'"),
    "Triton on a CPU": (
        lambda x, w, b: ((x, w), {"impl": "triton"}),
        "cannot run: .*need a GPU.*CPU",
    ),
}


@every_format
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_both_values(form, case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    make, message = REFUSED[case]
    weight = form.kind.pack(torch.zeros(8, 12, dtype=torch.bfloat16))
    x, bias = torch.zeros(2, 12, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    arguments, options = make(x, weight, bias)
    with pytest.raises(ValueError, match=message.format(name=form.name)):
        form.function("linear")(*arguments, **options)
