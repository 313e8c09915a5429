"""The portable bitmap kernel in the interpreter, and what all bitmap kernels compile to."""

from __future__ import annotations

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
    parts = packed.bitmap, packed.starts, packed.values, 20, bias, activation, splits
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
            dense = expand(packed.bitmap, packed.starts, packed.values, rows, columns)
            assert torch.equal(dense.view(kind), packed.to_dense().view(kind))


@interpreted
def test_full_lanes_do_not_run_over():
    # 31 full lanes before the last one: the largest counts that the packed sums must hold
    from prunekernels.sparse.bitmap.portable import expand

    weight = torch.arange(1, 16 * 128 + 1).view(16, 128).to(torch.int16).view(torch.float16)
    for cut in (0, 1, 7):
        weight[15, 14 : 14 + cut] = 0
        packed = bitmap_pack(weight)
        dense = expand(packed.bitmap, packed.starts, packed.values, 16, 128)
        assert torch.equal(dense, weight)


def _cases(module: str):
    if interpreting():
        return []
    from prunekernels.sparse.bitmap import mma as mma_bitmap
    from prunekernels.sparse.bitmap import portable as portable_bitmap

    listed = {"portable": portable_bitmap, "mma": mma_bitmap}[module].compile_cases()
    return [pytest.param(c, arch, id=f"{c.name}-{arch}") for c in listed for arch in c.archs]


def _check(case, arch):
    report = compile_case(case, arch)
    assert report.missing == []
    assert report.spills == 0
    assert report.fits
    return report


QUICK = ("bf16/t8/split-80", "bf16/t8/split-89", "bf16/t8/split-90")
MMA = [
    pytest.param(*p.values, id=p.id, marks=[] if p.id.endswith(QUICK) else [pytest.mark.slow])
    for p in _cases("mma")
]


@compiled
@pytest.mark.parametrize(("case", "arch"), MMA)
def test_tensor_core_kernel_compiles_and_lanes_count_nothing_one_by_one(case, arch):
    from prunekernels.sparse.bitmap.mma import ring_bytes
    from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig

    report = _check(case, arch)
    print(f"{case.name} on {arch}: {report.instructions_per_element:.3f} instructions per weight")
    assert report.loop_opcodes["HMMA"] == case.per_iteration[1]
    assert "POPC" not in report.loop_opcodes and "SHFL" not in report.loop_opcodes
    # where the values are: products, whose assembler does not stand in for what is missing
    counted = {"BMMA": 10, "IMMA": 8} if case.constants["COUNT"] else {"IMMA": 22}
    assert {k: n for k, n in report.loop_opcodes.items() if k in ("BMMA", "IMMA")} == counted
    # a branch out of the loop is a call on some
    assert report.loop_opcodes.get("CALL", 0) <= 1
    # one conditional load for each of the 64 weights that a lane has in a stage
    assert report.loop_opcodes["LDS"] in range(64, 68)
    # inline assembly takes the rings to start at the first byte: there is nothing else
    sizes = (case.constants[name] for name in ("MT", "NT", "RING"))
    assert report.shared_bytes == ring_bytes(BitmapMmaConfig(*sizes, splits=1))
    if "/t8" in case.name:
        assert report.instructions_per_element <= (5.0 if case.constants["COUNT"] else 5.8)


@compiled
@pytest.mark.parametrize(("case", "arch"), _cases("portable")[:1])
def test_portable_kernel_compiles(case, arch):
    _check(case, arch)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), _cases("portable")[1:])
def test_portable_kernel_compiles_everywhere(case, arch):
    _check(case, arch)
