"""The portable bitmap kernel in the interpreter, and what all bitmap kernels compile to."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from interpreter import run_interpreted
from products import assert_interpreted_as_good_as_eager, ragged
from prunekernels.compilation import compile_case
from prunekernels.runtime import interpreting
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.linear import bitmap_linear
from prunekernels.sparse.layer import ACTIVATIONS

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(0, 16, 64), (1, 1, 1), (18, 70, 61), (3, 20, 330)]
)
def test_portable_values(dtype, tokens, rows, columns):
    weight, x = ragged(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    got = bitmap_linear(x, bitmap_pack(weight), impl="triton")
    assert got.shape == (tokens, rows)
    if tokens:
        assert_interpreted_as_good_as_eager(
            got, F.linear(x, weight), x.double() @ weight.double().T
        )


@interpreted
@pytest.mark.parametrize(
    ("activation", "splits"), list(zip(ACTIVATIONS, (2, 1, 7, 1, 4), strict=True))
)
def test_portable_bias_activation_strides_and_splits(activation, splits):
    from prunekernels.sparse.bitmap.portable import launch

    weight = ragged(20, 450, torch.float16)
    bias = torch.randn(20).to(torch.float16)
    x = torch.randn(450, 5).to(torch.float16).T
    act, packed = ACTIVATIONS[activation], bitmap_pack(weight)
    exact = act(F.linear(x.double(), weight.double(), bias.double()))
    parts = packed.records, packed.starts, 20, bias, activation, splits
    got = launch(x, *parts)
    assert_interpreted_as_good_as_eager(got, act(F.linear(x, weight, bias)), exact)
    assert torch.equal(got, launch(x, *parts))


@interpreted
@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
def test_expanding_is_exact(density):
    from prunekernels.sparse.bitmap.portable import expand

    for rows, columns in ((17, 133), (70, 64), (1, 1)):
        for dtype in (torch.bfloat16, torch.float32):
            kept = torch.rand(rows, columns) < density
            packed = bitmap_pack((torch.randn(rows, columns) * kept).to(dtype))
            kind = torch.int16 if dtype.itemsize == 2 else torch.int32
            dense = expand(packed.records, packed.starts, dtype, rows, columns)
            assert torch.equal(dense.view(kind), packed.to_dense().view(kind))


@interpreted
def test_full_lanes_do_not_run_over():
    # 31 full lanes before the last one: the largest counts that the packed sums must hold
    from prunekernels.sparse.bitmap.portable import expand

    weight = torch.arange(1, 16 * 128 + 1).view(16, 128).to(torch.int16).view(torch.float16)
    for cut in (0, 1, 7):
        weight[15, 14 : 14 + cut] = 0
        packed = bitmap_pack(weight)
        dense = expand(packed.records, packed.starts, torch.float16, 16, 128)
        assert torch.equal(dense.view(torch.int16), weight.view(torch.int16))


@interpreted
@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_packing_kernels_write_what_torch_packs(dtype, density):
    from prunekernels.sparse.bitmap.packing_triton import pack

    for rows, columns in ((17, 133), (40, 64), (1, 1)):
        weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
        # a negative zero is none
        weight[0, 0] = -0.0
        weight = weight.to(dtype)
        packed = bitmap_pack(weight)
        for given in (weight, weight.t().contiguous().t()):
            records, starts = pack(given)
            assert torch.equal(records, packed.records) and torch.equal(starts, packed.starts)


def _cases(module: str):
    if interpreting():
        return []
    listed = importlib.import_module(f"prunekernels.sparse.bitmap.{module}").compile_cases()
    return [pytest.param(c, arch, id=f"{c.name}-{arch}") for c in listed for arch in c.archs]


def _check(case, arch):
    report = compile_case(case, arch)
    assert report.missing == []
    assert report.spills == 0
    assert report.fits
    return report


QUICK = ("bf16/t8-80", "bf16/t8-90", "bf16/t16-90")
MMA = [
    pytest.param(*p.values, id=p.id, marks=[] if p.id.endswith(QUICK) else [pytest.mark.slow])
    for p in _cases("mma")
]
#: Bytes of shared memory and 32-bit registers of a multiprocessor of compute capability 9.0, and
#: bytes that the driver keeps for each program.
SHARED, REGISTERS, RESERVED = 228 << 10, 1 << 16, 1 << 10


@compiled
@pytest.mark.parametrize(("case", "arch"), MMA)
def test_tensor_core_kernel_compiles_and_lanes_count_nothing_one_by_one(case, arch):
    from prunekernels.sparse.bitmap.tuning import bitmap_shared_bytes

    report = _check(case, arch)
    constants = case.constants
    # inline assembly takes the rings to start at the first byte: there is nothing else
    sizes = (constants[name] for name in ("NW", "NT", "RING", "CHUNKS"))
    assert report.shared_bytes == bitmap_shared_bytes(*sizes)
    if constants["BULK"]:
        # its copies are a loop of their own, which the report takes for the hot one
        return
    print(f"{case.name} on {arch}: {report.loop_instructions} instructions a stage")
    assert report.loop_opcodes["HMMA"] == case.per_iteration[1]
    # where the values are: products, and one count of the whole of block 0
    counted = {k: n for k, n in report.loop_opcodes.items() if k in ("BMMA", "IMMA", "POPC")}
    assert counted == {"BMMA": 10, "IMMA": 6, "POPC": 1}
    assert "SHFL" not in report.loop_opcodes and "BAR" not in report.loop_opcodes
    # one conditional load for each of the 64 weights that a lane has in a stage; 5 for the words
    assert report.loop_opcodes["LDS"] in range(64, 70)
    if arch == 90 and case.name.endswith("/t8"):
        assert report.loop_instructions <= 275
        programs = REGISTERS // (report.registers * 32 * constants["NW"])
        assert programs >= 7 and SHARED // (report.shared_bytes + RESERVED) >= 7


@compiled
@pytest.mark.parametrize(("case", "arch"), _cases("portable")[:1])
def test_portable_kernel_compiles(case, arch):
    _check(case, arch)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), [*_cases("portable")[1:], *_cases("packing_triton")])
def test_plain_kernels_compile_everywhere(case, arch):
    _check(case, arch)
