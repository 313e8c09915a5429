"""The Hopper kernel: what it compiles to, and its machine code run by the NumPy machine.

The machine executes `wgmma` when it is issued, so it cannot show a missing wait or proxy fence; how
hardware reads the sparse operand is taken from the PTX ISA. The kernel stays out of `impl="auto"`.
"""

from __future__ import annotations

import ptx
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from prunekernels.compilation import compile_case, compile_ptx
from prunekernels.runtime import interpreting
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.linear import ACTIVATIONS

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    groups = -(-columns // 4)
    rank = torch.rand(rows, groups, 4).argsort(2).argsort(2)
    kept = rank < torch.randint(0, 3, (rows, groups, 1))
    return (torch.randn(rows, groups, 4) * kept).view(rows, -1)[:, :columns].to(dtype)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_it_compiles_to_sparse_warpgroup_instructions(number):
    from prunekernels.sparse.two_four import wgmma as wgmma24

    case = wgmma24.compile_cases()[number]
    report = compile_case(case, 90)
    assert report.missing == [] and report.spills == 0 and report.fits
    assert report.loop_opcodes["HGMMA"] == 2
    # nothing but the ring is in shared memory, so it stands where the descriptor says
    assert report.shared_bytes == wgmma24.STAGES * wgmma24.TOKENS * 128
    ptx, _ = compile_ptx(case, 90)
    assert ptx.index("fence.proxy.async") < ptx.index("wgmma.fence")
    assert ptx.rindex("wgmma.mma_async") < ptx.index("wgmma.wait_group")


@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "columns", "activation"),
    [
        (torch.bfloat16, 20, 150, 320, "silu"),
        pytest.param(torch.float16, 131, 40, 250, "none", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1, 16, 64, "gelu", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 128, 128, 1024, "none", marks=pytest.mark.slow),
    ],
)
def test_machine_values(monkeypatch, dtype, tokens, rows, columns, activation):
    from prunekernels.sparse.two_four import wgmma as wgmma24

    weight, x = two_of_four(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if activation != "none" else None
    act = ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    results = []
    for lazy in (True, False):
        with monkeypatch.context() as patch:
            ptx.Machine(90, lazy).take_over(patch)
            packed = sparse24_pack(weight).packed
            results.append(wgmma24.forward(x, packed, None, rows, bias, activation))
    got = results[0]
    assert torch.equal(*results)
    error = (got.double() - exact).abs().max()
    eager = (act(F.linear(x, weight, bias)).double() - exact).abs().max()
    assert error <= 2 * eager + 1e-6 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_its_self_test_passes_and_notices(monkeypatch, broken):
    from prunekernels.sparse.two_four import wgmma as wgmma24

    ptx.Machine(90).take_over(monkeypatch)
    if broken:
        real = ptx.tensor_cores.mma_sp_m16n8k32

        def swapped(a, b, c, e, selector, kind):
            return real(a, b, c, e, 1 - selector, kind)

        monkeypatch.setattr(ptx.tensor_cores, "mma_sp_m16n8k32", swapped)
    problem = wgmma24.self_test(torch.device("cpu"))
    assert (problem is not None and "results differ" in problem) if broken else problem is None
