"""The portable kernel for quantised 2:4 weights in the interpreter, and what kernels compile to."""

from __future__ import annotations

import pytest
import quantized
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from interpreter import run_interpreted
from products import assert_interpreted_as_good_as_eager
from prunekernels import quantized24_gate_up, quantized24_linear
from prunekernels.compilation import compile_case
from prunekernels.runtime import interpreting
from prunekernels.sparse.layer import ACTIVATIONS

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")
NAMES = "kind", "group", "zeros"
# a row's and a group's scales, all kinds of values; then the other combinations
FEW = [quantized.EVERY[i] for i in (0, 3, 8)]
every = pytest.mark.parametrize(
    NAMES,
    [*FEW, *(pytest.param(*c, marks=pytest.mark.slow) for c in quantized.EVERY if c not in FEW)],
)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@compiled
@pytest.mark.slow
def test_more_in_the_interpreter():
    run_interpreted(__file__, "-m", "slow")


@interpreted
@every
def test_portable_values(kind, group, zeros):
    rows, columns = 20, 330
    for dtype, tokens in ((torch.bfloat16, 3), (torch.float16, 1), (torch.float32, 0)):
        packed, exact = quantized.made(rows, columns, kind, group, zeros, dtype)
        x = torch.randn(tokens, columns).to(dtype)
        got = quantized24_linear(x, packed, impl="triton")
        assert got.shape == (tokens, rows)
        if tokens:
            eager = F.linear(x, exact.to(dtype))
            assert_interpreted_as_good_as_eager(got, eager, x.double() @ exact.T)


@interpreted
@every
def test_small_integers_are_multiplied_exactly(kind, group, zeros):
    packed, exact = quantized.made(17, 320, kind, group, zeros, torch.float32, whole=True)
    x = torch.randint(-3, 4, (2, 320)).float()
    assert torch.equal(quantized24_linear(x, packed, impl="triton").double(), x.double() @ exact.T)


@interpreted
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_portable_bias_activation_and_strides(activation):
    packed, exact = quantized.made(20, 68, "2:4-int4", 64, True, torch.float16)
    bias = torch.randn(20).to(torch.float16)
    x = torch.randn(68, 2, 3).to(torch.float16).permute(1, 2, 0)
    act = ACTIVATIONS[activation]
    truth = act(F.linear(x.double(), exact, bias.double()))
    got = quantized24_linear(x, packed, bias, activation, impl="triton")
    eager = act(F.linear(x, exact.to(x.dtype), bias))
    assert_interpreted_as_good_as_eager(got, eager, truth)


@interpreted
@every
def test_expanding_is_exact(kind, group, zeros):
    from prunekernels.sparse.two_four.quantized.portable import expand

    for rows, columns in ((17, 333), (3, 4)):
        packed, _ = quantized.made(rows, columns, kind, group, zeros, torch.float32)
        dense = torch.empty(rows, columns)
        expand((packed.packed, packed.scales, packed.zeros), kind, dense)
        assert torch.equal(dense, packed.to_dense())


@interpreted
@pytest.mark.parametrize(NAMES, FEW[1:])
def test_portable_gate_up(kind, group, zeros):
    gate, exact_gate = quantized.made(35, 200, kind, group, zeros, torch.float16)
    up, exact_up = quantized.made(35, 200, kind, group, zeros, torch.float16)
    x = (torch.randn(4, 200) / 100).to(torch.float16)
    truth = F.silu(x.double() @ exact_gate.T) * (x.double() @ exact_up.T)
    eager = F.silu(F.linear(x, exact_gate.half())) * F.linear(x, exact_up.half())
    got = quantized24_gate_up(x, gate, up, impl="triton")
    assert_interpreted_as_good_as_eager(got, eager, truth)


QUICK = ("int8/bf16/t8/split-90", "int4g128/bf16/t8/split-80", "int4g128/bf16/t8/split-90")


def _cases(module: str):
    """Cases on sm_90, and the quick ones; `prunekit doctor --kernels` prints all, minutes long."""
    if interpreting():
        return []
    from prunekernels.sparse.two_four.quantized import mma, portable

    listed = {"mma": mma, "portable": portable}[module].compile_cases()
    every = [pytest.param(c, arch, id=f"{c.name}-{arch}") for c in listed for arch in c.archs]
    return [p for p in every if p.values[1] == 90 or p.id.endswith(QUICK)]


MMA = [
    pytest.param(*p.values, id=p.id, marks=[] if p.id.endswith(QUICK) else [pytest.mark.slow])
    for p in _cases("mma")
]
#: Most instructions for each weight of the dense matrix, at up to 8 tokens, by the form's name and
#: the activations' type. More than was asked (0.9 and 1.3) take e4m3 values where no instruction
#: makes them what the tensor cores multiply: sign and magnitude do not stand together there.
MOST = {
    ("int8", "bf16"): 0.9,
    ("int8", "f16"): 0.6,
    ("int8g128", "bf16"): 0.9,
    ("int8g128", "f16"): 0.7,
    ("fp8", "bf16"): 1.25,
    ("fp8", "f16"): 1.0,
    ("fp8", "f16", "cvt"): 0.6,
    ("int4", "bf16"): 0.9,
    ("int4", "f16"): 0.8,
    ("int4g128", "bf16"): 1.0,
    ("int4g128", "f16"): 0.9,
    ("int4g64z", "bf16"): 1.2,
    ("int4g64z", "f16"): 1.2,
}


@compiled
@pytest.mark.parametrize(("case", "arch"), MMA)
def test_tensor_core_kernel_compiles_to_few_sparse_instructions(case, arch):
    report = compile_case(case, arch)
    assert (report.missing, report.spills, report.fault) == ([], 0, "")
    if "/t8" in case.name:
        _, _, name, kind, _, *more = case.name.split("/")
        form = (name, kind, "cvt") if "cvt" in more else (name, kind)
        assert report.instructions_per_element <= MOST[form]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), _cases("portable"))
def test_portable_kernel_compiles(case, arch):
    report = compile_case(case, arch)
    assert (report.missing, report.spills, report.fault) == ([], 0, "")
