"""2:4 linear layers alone: gate and up in one op, multiplying line by line, op checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packed_formats import DTYPES, FORMATS
from products import assert_as_good_as_eager
from prunekernels.sparse.two_four import expand as expand24
from prunekernels.sparse.two_four.format import Sparse24, sparse24_pack
from prunekernels.sparse.two_four.linear import sparse24_gate_up, sparse24_linear

FORM = FORMATS[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 16, 64), (5, 33, 300)])
def test_gate_up_values(dtype, tokens, rows, columns):
    gate, up = FORM.values(rows, columns, dtype), FORM.values(rows, columns, dtype)
    x = torch.randn(tokens, columns).to(dtype)
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    eager = F.silu(F.linear(x, gate)) * F.linear(x, up)
    got = sparse24_gate_up(x, sparse24_pack(gate), sparse24_pack(up))
    assert_as_good_as_eager(got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [96, 103])
def test_a_cpu_multiplies_some_lines_at_a_time(monkeypatch, dtype, rows):
    weight, bias = FORM.values(rows, 330, dtype), torch.randn(rows).to(dtype)
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


def test_gradient_of_gate_up():
    gate, up = FORM.values(20, 44, torch.float16), FORM.values(20, 44, torch.float16)
    x = torch.randn(6, 44).to(torch.float16).requires_grad_()
    seed = torch.randn(6, 20).to(torch.float16)
    sparse24_gate_up(x, sparse24_pack(gate), sparse24_pack(up)).backward(seed)
    x2 = x.detach().requires_grad_()
    (F.silu(F.linear(x2, gate)) * F.linear(x2, up)).backward(seed)
    x3 = x.detach().double().requires_grad_()
    (F.silu(F.linear(x3, gate.double())) * F.linear(x3, up.double())).backward(seed.double())
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)


def test_ops_pass_opcheck():
    packed = sparse24_pack(FORM.values(20, 44, torch.bfloat16))
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


def test_gate_up_compiles_as_one_graph():
    packed = sparse24_pack(FORM.values(20, 44, torch.bfloat16))

    def layer(x):
        return sparse24_gate_up(x, packed, packed) + sparse24_linear(x, packed, activation="relu")

    x = torch.randn(3, 44).to(torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(x1).float().sum().backward()
    layer(x2).float().sum().backward()
    assert torch.equal(x1.grad, x2.grad)


def test_tensor_cores_are_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    packed = sparse24_pack(torch.zeros(8, 12, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        sparse24_linear(torch.zeros(2, 12, dtype=torch.bfloat16), packed, impl="mma_sp")


def test_gate_and_up_must_match():
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    gate = sparse24_pack(torch.zeros(8, 8, dtype=torch.bfloat16))
    up = sparse24_pack(torch.zeros(4, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(8, 8\) and \(4, 8\)"):
        sparse24_gate_up(x, gate, up)
    with pytest.raises(ValueError, match="up"):
        sparse24_gate_up(x, gate, Sparse24(up.packed, up.shape, torch.float16))
