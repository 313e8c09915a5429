"""Bitmap kernels alone on a real NVIDIA GPU: every density and configuration, the self-test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from products import assert_as_good_as_eager, ragged
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.linear import OP, bitmap_linear
from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.bfloat16, torch.float16]


def test_the_self_test_passes():
    assert OP.self_test(torch.device("cuda", torch.cuda.current_device()), "mma") is None


@pytest.mark.parametrize("impl", ["triton", "mma"])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.3, 0.5, 0.9, 1.0])
def test_every_sparsity(impl, density):
    kept = torch.rand(512, 1024, device="cuda") < density
    weight = (torch.randn(512, 1024, device="cuda") * kept).to(torch.bfloat16)
    x = torch.randn(3, 1024, device="cuda").to(torch.bfloat16)
    got = bitmap_linear(x, bitmap_pack(weight), impl=impl)
    assert_as_good_as_eager(got, F.linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("warps", "token_tiles"), [(4, 1), (1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("option", [None, "bulk", "dependent"])
def test_every_configuration_of_the_tensor_core_kernel(option, slots, warps, token_tiles, splits):
    from prunekernels.sparse.bitmap import mma

    if option is not None and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"{option} needs compute capability 9.0")
    weight = ragged(700, 4160, torch.bfloat16, "cuda")
    x = torch.randn(50, 4160, device="cuda").to(torch.bfloat16)
    packed = bitmap_pack(weight)
    config = BitmapMmaConfig(warps, token_tiles, slots, splits)
    if option is not None:
        config = config._replace(**{option: True})
    arguments = (x, packed.records, packed.starts, packed.chunks, 700, None, "none", config)
    got = mma.launch(*arguments)
    assert_as_good_as_eager(got, F.linear(x, weight), x.double() @ weight.double().T)
    for _ in range(20):
        assert torch.equal(mma.launch(*arguments), got)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_packing_on_the_gpu_writes_what_a_cpu_packs(dtype, density):
    weight = ragged(333, 1000, torch.float32) * (torch.rand(333, 1000) < density)
    weight = weight.to(dtype)
    here, there = bitmap_pack(weight), bitmap_pack(weight.cuda())
    assert torch.equal(there.records.cpu(), here.records)
    assert torch.equal(there.starts.cpu(), here.starts) and there.chunks == here.chunks


def test_a_record_that_does_not_fit_makes_its_results_nan():
    from prunekernels.sparse.bitmap import mma

    weight = torch.zeros(32, 768, dtype=torch.bfloat16, device="cuda")
    weight[16:, 128:256] = 1.0
    packed = bitmap_pack(weight)
    x = torch.ones(2, 768, dtype=torch.bfloat16, device="cuda")
    config = BitmapMmaConfig(2, 1, 2, 1)
    y = mma.launch(x, packed.records, packed.starts, 8, 32, None, "none", config)
    assert (y[:, :16] == 0).all() and y[:, 16:].isnan().all()
