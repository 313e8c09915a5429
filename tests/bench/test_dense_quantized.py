"""The quantised kernel without sparsity: packed and multiplied as float64 says, by a NumPy machine.

See `ptx`: the compiled kernel is executed without a GPU.
"""

from __future__ import annotations

import ptx
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from products import assert_as_good_as_eager
from prunekernels.compilation import compile_case
from prunekernels.runtime import interpreting
from prunekernels.sparse.two_four.quantized.packing import Rounded
from prunekernels.sparse.two_four.tuning import MmaConfig

from bench import bounds, dense_quantized
from bench.dense_quantized import exact, pack

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture
def machine(monkeypatch):
    """Make `linear` run on a machine; returns a function that does so."""
    from prunekernels.sparse import launching

    counter = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launching, "counters", lambda count, device: counter[:count])

    def multiply(x, w, config, arch=80):
        target = ptx.Machine(arch)
        target.take_over(monkeypatch)
        y = dense_quantized.linear(x, w, config)
        assert len(target.launches) == 1 and not counter.any()
        return y

    return multiply


def integers(rows: int, columns: int, kind: str, group: int, zeros: bool) -> Rounded:
    """Random codes over the whole range, with scales and zero points."""
    groups = -(-columns // group) if group else 1
    least, most = (-127, 127) if kind == "2:4-int8" else (0, 15) if zeros else (-8, 7)
    values = torch.randint(least, most + 1, (rows, columns), dtype=torch.int8)
    levels = torch.randint(0, 16, (rows, groups), dtype=torch.int8) if zeros else None
    return Rounded(values, torch.rand(rows, groups) + 0.5, levels)


CASES = [
    # kind, group, zeros, dtype, tokens, rows, columns, config, arch
    ("2:4-int4", 128, True, BF16, 3, 70, 416, MmaConfig(2, 1, 2, 2), 80),
    ("2:4-int8", 0, False, F16, 9, 40, 301, MmaConfig(1, 2, 2, 1), 80),
]
MORE = [
    ("2:4-int4", 64, False, BF16, 8, 150, 672, MmaConfig(2, 1, 4, 3), 90),
    ("2:4-int4", 64, True, F16, 13, 33, 95, MmaConfig(1, 2, 2, 1), 80),
    ("2:4-int4", 128, False, F16, 33, 80, 417, MmaConfig(1, 4, 2, 1), 89),
    ("2:4-int4", 128, False, BF16, 64, 40, 512, MmaConfig(1, 8, 2, 2), 90),
    ("2:4-int4", 0, True, BF16, 2, 16, 160, MmaConfig(2, 1, 4, 1), 80),
    ("2:4-int8", 128, False, BF16, 5, 33, 1056, MmaConfig(2, 1, 2, 4), 80),
    ("2:4-int8", 0, False, BF16, 1, 128, 256, MmaConfig(2, 1, 2, 1), 90),
]


@pytest.mark.parametrize(
    ("kind", "group", "zeros", "dtype", "tokens", "rows", "columns", "config", "arch"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_product(machine, kind, group, zeros, dtype, tokens, rows, columns, config, arch):
    given = integers(rows, columns, kind, group, zeros)
    weight = exact(given)
    # sums stay where float16 holds them
    x = (torch.randn(tokens, columns) / weight.std() / 30).to(dtype)
    got = machine(x, pack(given, kind), config, arch)
    assert_as_good_as_eager(got, F.linear(x, weight.to(dtype)), x.double() @ weight.T)

    whole = given._replace(scales=torch.ones_like(given.scales))
    x = torch.randint(-1, 2, (tokens, columns)).to(dtype)
    got = machine(x, pack(whole, kind), config, arch)
    assert torch.equal(got, (x.double() @ exact(whole).T).to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("kind", "group", "zeros"), dense_quantized.FORMS)
def test_product_on_a_gpu(kind, group, zeros, dtype):
    for rows, columns in ((1024, 4096), (130, 301)):
        given = integers(rows, columns, kind, group, zeros)
        given = Rounded(*(part if part is None else part.cuda() for part in given))
        packed, weight = pack(given, kind), exact(given)
        for tokens in (1, 9, 17, 64, 200):
            x = (torch.randn(tokens, columns, device="cuda") / weight.std() / 30).to(dtype)
            got = dense_quantized.linear(x, packed)
            eager = F.linear(x, weight.to(dtype))
            assert_as_good_as_eager(got, eager, x.double() @ weight.T)
            assert torch.equal(got, dense_quantized.linear(x, packed))


@pytest.mark.parametrize(("kind", "group", "zeros"), dense_quantized.FORMS)
def test_bytes_are_those_of_the_bounds(kind, group, zeros):
    for rows, columns in ((48, 416), (33, 95)):
        packed = pack(integers(rows, columns, kind, group, zeros), kind)
        bits = 8 if kind == "2:4-int8" else 4
        held = bounds.dense_quantized_bytes(rows, columns, bits, group, zeros=zeros)
        assert packed.nbytes == held


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if number == 4 else pytest.mark.slow, id=case.name)
        for number, case in enumerate(dense_quantized.compile_cases())
    ],
)
def test_compiled_without_spills_and_counted(case, request):
    slow = request.node.get_closest_marker("slow") is not None
    for arch in case.archs if slow else case.archs[-1:]:
        report = compile_case(case, arch)
        assert not report.fault
        assert list(report.tensor_core) == ["HMMA.16816.F32.BF16"]
    counted = bounds.compiled_slots()[case.name]
    assert report.instructions_per_element == pytest.approx(counted, rel=0.1)
