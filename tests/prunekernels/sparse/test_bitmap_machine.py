"""The compiled tensor-core bitmap kernel, run by a NumPy machine: launcher, machine code, sums.

The launch is real up to the driver, as in `test_sparse24_machine`. What this cannot show is timing,
hardware that differs from the PTX ISA, and how warps interleave.
"""

from __future__ import annotations

import ptx
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from products import assert_as_good_as_eager, ragged
from prunekernels.runtime import interpreting
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig
from prunekernels.sparse.layer import ACTIVATIONS

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")


@pytest.fixture
def machine(monkeypatch):
    """Make `mma_bitmap.launch` run on a machine; returns a function that does so."""
    from prunekernels.sparse import launching
    from prunekernels.sparse.bitmap import mma as mma_bitmap

    counter = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launching, "counters", lambda count, device: counter[:count])

    def launch(x, weight, bias, activation, config, arch=80, lazy=True):
        target = ptx.Machine(arch, lazy)
        target.take_over(monkeypatch)
        packed = bitmap_pack(weight)
        parts = packed.bitmap, packed.starts, packed.values, weight.shape[0]
        y = mma_bitmap.launch(x, *parts, bias, activation, config)
        assert len(target.launches) == 1
        assert not counter.any(), "the counter must be zero again"
        return y

    return launch


CASES = [
    # dtype, tokens, rows, columns, config, activation, bias
    (torch.bfloat16, 3, 80, 832, BitmapMmaConfig(1, 1, 3, 2), "silu", True),
    (torch.float16, 1, 33, 61, BitmapMmaConfig(1, 1, 3, 1), "none", False),
    (torch.bfloat16, 3, 80, 320, BitmapMmaConfig(1, 1, 3, 2, count_bits=False), "none", True),
]
MORE = [
    (torch.bfloat16, 1, 64, 1024, BitmapMmaConfig(1, 1, 3, 1), "none", False),
    (torch.float16, 8, 1, 1, BitmapMmaConfig(1, 1, 3, 1), "relu", True),
    (torch.float16, 13, 100, 300, BitmapMmaConfig(1, 2, 3, 1), "gelu", True),
    (torch.bfloat16, 40, 70, 704, BitmapMmaConfig(1, 4, 3, 3), "gelu_tanh", True),
    (torch.bfloat16, 9, 33, 1024, BitmapMmaConfig(1, 1, 3, 8), "none", False),
    (torch.bfloat16, 70, 40, 320, BitmapMmaConfig(1, 8, 3, 1), "none", True),
    (torch.float16, 13, 100, 300, BitmapMmaConfig(1, 2, 3, 1, count_bits=False), "gelu", True),
    (torch.bfloat16, 4, 200, 200, BitmapMmaConfig(2, 1, 3, 1), "none", False),
]
PARAMETERS = [pytest.param(*c) for c in CASES]
PARAMETERS += [pytest.param(*c, marks=pytest.mark.slow) for c in MORE]


@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "columns", "config", "activation", "has_bias"), PARAMETERS
)
def test_linear(machine, dtype, tokens, rows, columns, config, activation, has_bias):
    weight, x = ragged(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    act = ACTIVATIONS[activation]
    got = machine(x, weight, bias, activation, config)
    exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    assert_as_good_as_eager(got, act(F.linear(x, weight, bias)), exact)
    # other order of programs, copies at once instead of as late as allowed: the same bits
    assert torch.equal(got, machine(x, weight, bias, activation, config, lazy=False))


@pytest.mark.parametrize("count_bits", [True, False])
@pytest.mark.parametrize(
    "kind", ["full", pytest.param("empty", marks=pytest.mark.slow), "one row", "one block"]
)
def test_extreme_weights(machine, kind, count_bits):
    weight = torch.zeros(64, 320)
    if kind == "full":
        # the largest counts that the packed sums must hold
        weight = torch.randn(64, 320)
    elif kind == "one row":
        weight[37] = torch.randn(320)
    elif kind == "one block":
        weight[:, 128:192] = torch.randn(64, 64)
    weight, x = weight.to(torch.bfloat16), torch.randn(2, 320).to(torch.bfloat16)
    config = BitmapMmaConfig(1, 1, 3, 1, count_bits)
    got = machine(x, weight, None, "none", config, arch=90)
    assert_as_good_as_eager(got, F.linear(x, weight), x.double() @ weight.double().T)


def test_strided_activations(machine):
    weight, wide = ragged(16, 128, torch.bfloat16), torch.randn(5, 136).to(torch.bfloat16)
    config = BitmapMmaConfig(1, 1, 3, 1)
    want = machine(wide[:, 3:131].contiguous(), weight, None, "none", config)
    assert torch.equal(machine(wide[:, 3:131], weight, None, "none", config), want)
