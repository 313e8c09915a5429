"""The compiled kernel for quantised 2:4 weights, run by a NumPy machine (see `ptx`).

Small integers come out exactly; random values within what float32 sums leave, which is less than
an expanded 16-bit weight does.
"""

from __future__ import annotations

import ptx
import pytest
import quantized
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from products import assert_as_good_as_eager
from prunekernels.runtime import interpreting
from prunekernels.sparse.layer import ACTIVATIONS
from prunekernels.sparse.two_four.tuning import MmaConfig

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")


@pytest.fixture
def machine(monkeypatch):
    """Make the kernel's `launch` run on a machine; returns a function that does so."""
    from prunekernels.sparse import launching
    from prunekernels.sparse.two_four.quantized import mma

    counter = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launching, "counters", lambda count, device: counter[:count])

    def launch(x, packed, up, bias, activation, config, arch=80, lazy=True):
        target = ptx.Machine(arch, lazy)
        target.take_over(monkeypatch)
        parts = packed.packed, packed.scales, packed.zeros
        others = None if up is None else (up.packed, up.scales, up.zeros)
        rest = packed.shape[0], packed.format, bias, activation, config, arch >= 89
        y = mma.launch(x, parts, others, *rest)
        assert len(target.launches) == 1
        assert not counter.any(), "the counter must be zero again"
        return y

    return launch


BF16, F16 = torch.bfloat16, torch.float16
CASES = [
    # kind, group, zeros, dtype, tokens, rows, columns, config, activation, bias
    ("2:4-int4", 128, False, BF16, 3, 150, 832, MmaConfig(2, 1, 2, 2), "none", False),
    ("2:4-int8", 0, False, BF16, 1, 128, 512, MmaConfig(2, 1, 2, 1), "none", False),
    # five units: twice two, and one
    ("2:4-int8", 128, False, BF16, 2, 40, 1344, MmaConfig(1, 1, 2, 1), "none", True),
]
MORE = [
    ("2:4-int4", 128, False, BF16, 3, 150, 1344, MmaConfig(2, 1, 4, 2), "silu", True),
    ("2:4-int4", 64, True, F16, 8, 40, 832, MmaConfig(2, 1, 2, 1), "relu", True),
    ("2:4-int4", 64, True, BF16, 13, 100, 300, MmaConfig(1, 2, 4, 1), "none", True),
    ("2:4-int4", 128, True, BF16, 2, 33, 1600, MmaConfig(1, 1, 2, 3), "gelu", False),
    ("2:4-int4", 64, True, F16, 3, 30, 1600, MmaConfig(2, 1, 4, 1), "none", False),
    ("2:4-int4", 0, False, F16, 33, 80, 832, MmaConfig(1, 4, 2, 1), "silu", False),
    ("2:4-int4", 0, True, BF16, 5, 16, 320, MmaConfig(2, 1, 4, 1), "none", True),
    ("2:4-int8", 128, False, F16, 9, 33, 2048, MmaConfig(2, 2, 2, 8), "none", False),
    ("2:4-int8", 0, False, F16, 8, 70, 1088, MmaConfig(2, 1, 4, 3), "gelu_tanh", True),
    ("2:4-int8", 64, False, BF16, 40, 70, 832, MmaConfig(1, 8, 2, 2), "relu", True),
    ("2:4-fp8", 0, False, BF16, 4, 70, 1088, MmaConfig(2, 1, 2, 2), "none", True),
    ("2:4-fp8", 0, False, F16, 16, 70, 320, MmaConfig(2, 2, 2, 1), "none", True),
]
PARAMETERS = [pytest.param(*c) for c in CASES]
PARAMETERS += [pytest.param(*c, marks=pytest.mark.slow) for c in MORE]


@pytest.mark.parametrize(
    (
        *("kind", "group", "zeros", "dtype", "tokens", "rows"),
        *("columns", "config", "activation", "has_bias"),
    ),
    PARAMETERS,
)
def test_linear(
    machine, kind, group, zeros, dtype, tokens, rows, columns, config, activation, has_bias
):
    act = ACTIVATIONS[activation]
    packed, exact = quantized.made(rows, columns, kind, group, zeros, dtype)
    # sums stay where the activations tell them apart, and float16 holds them
    x = (torch.randn(tokens, columns) / exact.std() / 30).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    got = machine(x, packed, None, bias, activation, config)
    wide = None if bias is None else bias.double()
    truth = act(F.linear(x.double(), exact, wide))
    assert_as_good_as_eager(got, act(F.linear(x, exact.to(dtype), bias)), truth)
    # other order of programs, copies at once instead of as late as allowed: the same bits
    assert torch.equal(got, machine(x, packed, None, bias, activation, config, lazy=False))

    whole, exact = quantized.made(rows, columns, kind, group, zeros, dtype, whole=True)
    x = torch.randint(-1, 2, (tokens, columns)).to(dtype)
    got = machine(x, whole, None, None, "none", config)
    assert torch.equal(got, (x.double() @ exact.T).to(dtype))


@pytest.mark.parametrize(
    ("kind", "group", "zeros", "tokens", "config", "arch"),
    [
        ("2:4-int4", 128, True, 4, MmaConfig(2, 1, 2, 2), 90),
        pytest.param("2:4-int8", 0, False, 20, MmaConfig(2, 4, 2, 1), 80, marks=pytest.mark.slow),
        pytest.param("2:4-int4", 64, False, 9, MmaConfig(2, 2, 4, 3), 89, marks=pytest.mark.slow),
    ],
)
def test_gate_up(machine, kind, group, zeros, tokens, config, arch):
    gate, exact_gate = quantized.made(80, 832, kind, group, zeros)
    up, exact_up = quantized.made(80, 832, kind, group, zeros)
    x = (torch.randn(tokens, 832) / exact_gate.std() / 30).to(BF16)
    got = machine(x, gate, up, None, "silu", config, arch=arch)
    truth = F.silu(x.double() @ exact_gate.T) * (x.double() @ exact_up.T)
    eager = F.silu(F.linear(x, exact_gate.to(BF16))) * F.linear(x, exact_up.to(BF16))
    assert_as_good_as_eager(got, eager, truth)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2:4-int8", "2:4-fp8", "2:4-int4"])
@pytest.mark.parametrize(("dtype", "arch"), [(BF16, 80), (F16, 80), (F16, 90)])
def test_every_code_at_every_place_and_scales_of_any_size(machine, kind, dtype, arch):
    from prunekernels import quantized24_pack

    # one value a row and column, so that nothing else can stand in for it
    columns, rows = 256, 64
    given = (
        quantized.integers(rows, columns, kind, 64, False)
        if kind != "2:4-fp8"
        else (quantized.integers(rows, columns, kind, 0, False))
    )
    place = torch.arange(columns)
    mask = (place // 4 % 32 == torch.arange(rows)[:, None] % 32) & (
        place % 4 == torch.arange(rows)[:, None] // 16
    )
    codes = torch.arange(rows * columns).view(rows, columns) * 7 % 256
    if kind == "2:4-fp8":
        codes[codes & 0x7F == 0x7F] = 1
        values = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        values = (codes % 16 - 8 if kind == "2:4-int4" else codes % 255 - 127).to(torch.int8)
    powers = torch.tensor([2.0**-126, 2.0**-140, 2.0**100, 0.0, -1.0, 2.0**-20])
    scales = powers[torch.randint(0, 6, given.scales.shape)]
    packed = quantized24_pack(values, mask, scales, kind=kind, dtype=dtype)
    x = torch.eye(256)[::37].to(dtype)
    got = machine(x, packed, None, None, "none", MmaConfig(2, 1, 2, 1), arch=arch)
    wide = packed.to(dtype=torch.float32).to_dense()
    want = (x.double() @ wide.double().T).to(dtype)
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
