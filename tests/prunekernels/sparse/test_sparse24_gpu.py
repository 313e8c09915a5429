"""2:4 kernels alone on a real NVIDIA GPU: Hopper's, every configuration, the self-test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packed_formats import FORMATS
from products import assert_as_good_as_eager
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.linear import (
    ACTIVATIONS,
    OP,
    sparse24_gate_up,
    sparse24_linear,
)
from prunekernels.sparse.two_four.tuning import MmaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

FORM = FORMATS[0]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_the_self_test_passes():
    device = torch.device("cuda", torch.cuda.current_device())
    assert OP.self_test(device, "mma_sp") is None
    if torch.cuda.get_device_capability() == (9, 0):
        assert OP.self_test(device, "wgmma_tma") is None


HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Hopper only"
)


@HOPPER
@pytest.mark.parametrize("impl", ["wgmma_sp", "wgmma_tma"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (130, 61), (4096, 1216)])
def test_the_hopper_kernels_behind_their_names(impl, dtype, rows, columns):
    weight = FORM.values(rows, columns, dtype, "cuda")
    packed = sparse24_pack(weight)
    for tokens in (1, 33, 100, 128, 300, 1024):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        exact = F.linear(x.double(), weight.double())
        got = sparse24_linear(x, packed, impl=impl)
        assert_as_good_as_eager(got, F.linear(x, weight), exact)
        for _ in range(100):
            assert torch.equal(got, sparse24_linear(x, packed, impl=impl))


@HOPPER
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("tokens", [5, 60, 300])
def test_the_hopper_kernel_with_every_epilogue(dtype, tokens):
    gate, up = FORM.values(520, 2112, dtype, "cuda"), FORM.values(520, 2112, dtype, "cuda")
    packed = sparse24_pack(gate)
    bias = torch.randn(520, device="cuda").to(dtype)
    x = torch.randn(tokens, 2112, device="cuda").to(dtype)
    for name, act in ACTIVATIONS.items():
        exact = act(F.linear(x.double(), gate.double(), bias.double()))
        activation = None if name == "none" else name
        got = sparse24_linear(x, packed, bias, activation, impl="wgmma_tma")
        assert_as_good_as_eager(got, act(F.linear(x, gate, bias)), exact)
    exact = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
    eager = F.silu(F.linear(x, gate)) * F.linear(x, up)
    got = sparse24_gate_up(x, packed, sparse24_pack(up), impl="wgmma_tma")
    assert_as_good_as_eager(got, eager, exact)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
@pytest.mark.parametrize("token_tiles", [1, 2, 4, 8])
def test_every_configuration_of_the_tensor_core_kernel(token_tiles, splits):
    from prunekernels.sparse.two_four import mma as mma24

    weight = FORM.values(700, 4160, torch.bfloat16, "cuda")
    x = torch.randn(50, 4160, device="cuda").to(torch.bfloat16)
    config = MmaConfig(2, token_tiles, 2 if token_tiles > 2 else 4, splits)
    arguments = (x, sparse24_pack(weight).packed, None, 700, None, "none", config)
    got = mma24.launch(*arguments)
    assert_as_good_as_eager(got, F.linear(x, weight), x.double() @ weight.double().T)
    for _ in range(20):
        assert torch.equal(mma24.launch(*arguments), got)
