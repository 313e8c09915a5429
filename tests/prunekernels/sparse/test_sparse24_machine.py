"""The compiled tensor-core kernel, run by a NumPy machine: host code, machine code, reduction.

The launch is real up to the driver: the launcher's arguments go to Triton's compiler and the PTX
that comes out is executed with the memory the launcher allocated. What this cannot show is timing,
hardware that differs from the PTX ISA, and how warps interleave.
"""

from __future__ import annotations

import ptx
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from products import assert_as_good_as_eager
from prunekernels.runtime import interpreting
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.linear import ACTIVATIONS
from prunekernels.sparse.two_four.tuning import MmaConfig

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")


@pytest.fixture
def machine(monkeypatch):
    """Make `mma24.launch` run on a machine; returns a function that does so."""
    from prunekernels.sparse import launching
    from prunekernels.sparse.two_four import mma as mma24

    counter = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launching, "counters", lambda count, device: counter[:count])

    def launch(*arguments, arch=80, lazy=True):
        target = ptx.Machine(arch, lazy)
        target.take_over(monkeypatch)
        y = mma24.launch(*arguments)
        assert len(target.launches) == 1
        assert not counter.any(), "the counter must be zero again"
        return y

    return launch


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    groups = -(-columns // 4)
    rank = torch.rand(rows, groups, 4).argsort(2).argsort(2)
    kept = rank < torch.randint(0, 3, (rows, groups, 1))
    return (torch.randn(rows, groups, 4) * kept).view(rows, -1)[:, :columns].to(dtype)


CASES = [
    # dtype, tokens, rows, columns, config, activation, bias
    (torch.bfloat16, 3, 150, 1344, MmaConfig(2, 1, 4, 2), "silu", True),
    (torch.bfloat16, 1, 128, 512, MmaConfig(2, 1, 4, 1), "none", False),
]
MORE = [
    (torch.float16, 8, 16, 4, MmaConfig(2, 1, 4, 1), "relu", True),
    (torch.float16, 2, 33, 320, MmaConfig(2, 1, 4, 1), "gelu", True),
    (torch.float16, 13, 100, 300, MmaConfig(2, 2, 4, 1), "none", True),
    (torch.bfloat16, 40, 70, 1600, MmaConfig(2, 4, 2, 3), "gelu_tanh", True),
    (torch.bfloat16, 9, 33, 2048, MmaConfig(2, 1, 4, 8), "none", False),
    (torch.float16, 33, 257, 832, MmaConfig(2, 4, 2, 1), "silu", False),
    (torch.bfloat16, 70, 40, 832, MmaConfig(2, 8, 2, 3), "none", True),
    (torch.bfloat16, 64, 300, 832, MmaConfig(2, 8, 2, 2, warps=8), "relu", True),
    (torch.float16, 16, 200, 1088, MmaConfig(1, 2, 2, 4), "none", True),
]
PARAMETERS = [pytest.param(*c) for c in CASES]
PARAMETERS += [pytest.param(*c, marks=pytest.mark.slow) for c in MORE]


@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "columns", "config", "activation", "has_bias"), PARAMETERS
)
def test_linear(machine, dtype, tokens, rows, columns, config, activation, has_bias):
    weight, x = two_of_four(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    act = ACTIVATIONS[activation]
    arguments = (x, sparse24_pack(weight).packed, None, rows, bias, activation, config)
    got = machine(*arguments)
    wide = None if bias is None else bias.double()
    exact = act(F.linear(x.double(), weight.double(), wide))
    assert_as_good_as_eager(got, act(F.linear(x, weight, bias)), exact)
    # other order of programs, copies at once instead of as late as allowed: the same bits
    assert torch.equal(got, machine(*arguments, lazy=False))


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "config", "arch"),
    [
        (4, 80, 832, MmaConfig(2, 1, 4, 2), 90),
        pytest.param(20, 65, 576, MmaConfig(2, 4, 2, 1), 80, marks=pytest.mark.slow),
    ],
)
def test_gate_up(machine, tokens, rows, columns, config, arch):
    gate, up = (
        two_of_four(rows, columns, torch.bfloat16),
        two_of_four(rows, columns, torch.bfloat16),
    )
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    packed = sparse24_pack(gate).packed, sparse24_pack(up).packed
    got = machine(x, *packed, rows, None, "silu", config, arch=arch)
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert_as_good_as_eager(got, F.silu(F.linear(x, gate)) * F.linear(x, up), exact)


def test_strided_activations_and_repeated_launches(machine):
    weight = two_of_four(64, 512, torch.bfloat16)
    packed = sparse24_pack(weight).packed
    wide = torch.randn(5, 520).to(torch.bfloat16)
    arguments = (packed, None, 64, None, "none", MmaConfig(2, 1, 4, 2))
    want = machine(wide[:, 3:515].contiguous(), *arguments)
    assert torch.equal(machine(wide[:, 3:515], *arguments), want)
    assert_as_good_as_eager(
        want, F.linear(wide[:, 3:515], weight), wide[:, 3:515].double() @ weight.double().T
    )
