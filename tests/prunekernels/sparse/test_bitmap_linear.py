"""Linear layers with a bitmap weight alone: extreme densities, memory, gate and up, op checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from products import assert_as_good_as_eager, ragged
from prunekernels.sparse.bitmap.expand import product
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.linear import bitmap_gate_up, bitmap_linear


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
