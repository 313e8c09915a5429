"""The compiled kernel for e4m3 weights and activations, run by a NumPy machine (see `ptx`).

Small integers come out exactly, also where the adder of e4m3 products keeps 13 bits; random values
within what float32 sums leave, or within the bound for such an adder.
"""

from __future__ import annotations

import ptx
import pytest
import quantized
import torch

pytest.importorskip("triton")
from prunekernels import quantize_tokens
from prunekernels.compilation import compile_case
from prunekernels.runtime import interpreting
from prunekernels.sparse.layer import ACTIVATIONS
from prunekernels.sparse.two_four.tuning import MmaConfig

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
#: Bits behind the point that sm_89's adder is known to keep, at least.
BITS = 13


@pytest.fixture
def machine(monkeypatch):
    """Make the kernel's `launch` run on a machine; returns a function that does so."""
    from prunekernels.sparse import launching
    from prunekernels.sparse.two_four.quantized.fp8 import mma

    counter = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launching, "counters", lambda count, device: counter[:count])
    # the kernel that rounds tokens is tested in the interpreter
    monkeypatch.setattr(mma, "ordered_tokens", quantized.ordered_tokens)

    def launch(x, packed, bias, activation, config, order, lazy=True, mantissa=None):
        target = ptx.Machine(89 if order == "e4m3" else 90, lazy, mantissa=mantissa)
        target.take_over(monkeypatch)
        rest = packed.shape[0], bias, activation, config, order
        y = mma.launch(x, packed.packed, packed.scales, *rest)
        assert len(target.launches) == 1
        assert not counter.any(), "the counter must be zero again"
        return y

    return launch


def exactly(x, weight, scales, bias, act):
    """Float64: the product of what x is rounded to."""
    codes, token = quantize_tokens(x)
    y = codes.double() @ weight.T * token.double()[:, None]
    return act(y if bias is None else y + bias.double())


CASES = [
    # order, dtype, tokens, rows, columns, config, activation, bias
    ("e4m3", BF16, 3, 150, 832, MmaConfig(2, 1, 2, 2), "none", True),
    ("f16", BF16, 3, 150, 832, MmaConfig(2, 1, 2, 2), "none", True),
]
MORE = [
    (order, *case)
    for order in ("e4m3", "f16")
    for case in (
        (F16, 9, 40, 1344, MmaConfig(2, 2, 4, 2), "silu", True),
        (F32, 13, 70, 300, MmaConfig(1, 2, 4, 1), "relu", False),
        (BF16, 33, 33, 1600, MmaConfig(1, 4, 2, 3), "gelu", True),
        (BF16, 1, 16, 64, MmaConfig(2, 1, 2, 1), "none", False),
        (F16, 8, 128, 2048, MmaConfig(2, 1, 2, 8), "gelu_tanh", True),
        (BF16, 17, 20, 448, MmaConfig(2, 4, 2, 1), "none", False),
    )
]
PARAMETERS = [pytest.param(*c) for c in CASES]
PARAMETERS += [pytest.param(*c, marks=pytest.mark.slow) for c in MORE]


@pytest.mark.parametrize(
    ("order", "dtype", "tokens", "rows", "columns", "config", "activation", "has_bias"), PARAMETERS
)
def test_linear(machine, order, dtype, tokens, rows, columns, config, activation, has_bias):
    act = ACTIVATIONS[activation]
    packed, weight = quantized.made(rows, columns, "2:4-fp8", 0, False, dtype)
    # sums stay where the activations tell them apart, and float16 holds them
    x = (torch.randn(tokens, columns) / weight.std() / 30).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    got = machine(x, packed, bias, activation, config, order)
    truth = exactly(x, weight, packed.scales, bias, act)
    # float32 sums, and one rounding
    rounding = torch.finfo(dtype).eps / 2 if dtype != F32 else 0.0
    assert got.dtype == dtype
    assert ((got.double() - truth).abs() <= rounding * truth.abs() + 1e-5 * truth.abs().max()).all()
    # other order of programs, copies at once instead of as late as allowed: the same bits
    assert torch.equal(got, machine(x, packed, bias, activation, config, order, lazy=False))


@pytest.mark.parametrize("order", ["e4m3", "f16"])
def test_small_integers_are_multiplied_exactly(machine, order):
    packed, weight = quantized.made(40, 832, "2:4-fp8", 0, False, F32, whole=True)
    x = torch.randint(-7, 8, (5, 832)).float()
    # 448 is 64 times 7: every token then counts in steps of 1/64, which is exact
    x[:, 5] = 7
    config = MmaConfig(2, 1, 2, 2)
    got = machine(x, packed, None, "none", config, order, mantissa=BITS)
    assert torch.equal(got.double(), x.double() @ weight.T)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)])
def test_an_adder_of_13_bits_stays_within_the_bound(machine, dtype):
    packed, weight = quantized.made(64, 1024, "2:4-fp8", 0, False, F32)
    x = torch.randn(8, 1024).to(dtype).float()
    got = machine(x, packed, None, "none", MmaConfig(2, 1, 2, 1), "e4m3", mantissa=BITS)
    truth = exactly(x, weight, packed.scales, None, lambda z: z)
    # an instruction cuts 33 addends, each of at most its unit's Σ|x·w|; a unit has four
    codes, token = quantize_tokens(x)
    sizes = codes.double().abs() @ weight.abs().T * token.double()[:, None]
    off = (got.double() - truth).abs()
    assert (off <= 4 * 33 * 2.0**-BITS * sizes).all()
    # and typically a thousandth of the result
    assert off.square().mean().sqrt() <= 1e-3 * truth.square().mean().sqrt()


@pytest.mark.parametrize("order", ["e4m3", pytest.param("f16", marks=pytest.mark.slow)])
def test_tokens_that_are_not_finite_give_nan_and_zeros_give_zero(machine, order):
    packed, weight = quantized.made(20, 320, "2:4-fp8", 0, False, BF16)
    x = torch.randn(6, 320).to(BF16)
    x[1], x[2, 7], x[4, 100] = 0, torch.inf, torch.nan
    got = machine(x, packed, None, "none", MmaConfig(2, 1, 2, 1), order)
    assert got[[2, 4]].isnan().all() and got[[0, 1, 3, 5]].isfinite().all()
    assert not got[1].any()
    truth = exactly(x[[0, 3, 5]], weight, packed.scales, None, lambda z: z)
    torch.testing.assert_close(got[[0, 3, 5]].double(), truth, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["e4m3", "f16"])
def test_every_column_and_code_and_scales_of_any_size(machine, order):
    from prunekernels import quantized24_pack

    # one value a row and column, so that nothing else can stand in for it
    columns, rows = 320, 80
    place, row = torch.arange(columns), torch.arange(rows)[:, None]
    mask = (place // 4 % 16 == row % 16) & (place % 4 == row // 20)
    codes = (torch.arange(rows * columns).view(rows, columns) * 7 % 256).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1
    powers = torch.tensor([2.0**-126, 2.0**-140, 2.0**100, 0.0, -1.0, 2.0**-20])
    scales = powers[torch.randint(0, 6, (rows, 1))]
    values = codes.view(torch.float8_e4m3fn)
    packed = quantized24_pack(values, mask, scales, kind="2:4-fp8", dtype=F32)
    x = torch.eye(columns)[::13] * 3
    got = machine(x, packed, None, "none", MmaConfig(2, 1, 2, 1), order)
    want = x.double() @ packed.to_dense().double().T
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def _cases():
    from prunekernels.sparse.two_four.quantized.fp8 import mma, tokens_triton

    listed = [] if interpreting() else mma.compile_cases() + tokens_triton.compile_cases()
    return [pytest.param(c, arch, id=f"{c.name}-{arch}") for c in listed for arch in c.archs]


#: Most instructions for each weight of the dense matrix at up to 8 tokens.
MOST = {"e4m3": 0.55, "f16": 0.75}
QUICK = ("e4m3/bf16/t8/split-89", "f16/bf16/t8/split-90")


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        pytest.param(*p.values, id=p.id, marks=[] if p.id.endswith(QUICK) else [pytest.mark.slow])
        for p in _cases()
    ],
)
def test_kernels_compile_to_few_sparse_instructions(case, arch):
    report = compile_case(case, arch)
    assert (report.missing, report.spills, report.fault) == ([], 0, "")
    if "/t8" in case.name:
        assert report.instructions_per_element <= MOST[case.name.split("/")[2]]


def test_an_a100_has_no_such_instruction():
    from prunekernels.sparse.two_four.quantized.fp8 import mma

    assert not {(8, 0), (8, 6)} & set(mma.CAPABILITIES)
    with pytest.raises(Exception, match=r"requires \.target sm_89 or higher"):
        compile_case(mma.compile_cases()[0], 80)
