"""The benchmark of a decoder block: what is compared is the same function."""

from __future__ import annotations

import pytest
import torch

from bench import bench_block
from bench.harness import Absent


@pytest.fixture
def block():
    torch.manual_seed(0)
    return bench_block.Block(bench_block.SMALL, torch.bfloat16, torch.device("cpu"))


def test_packed_layers_compute_what_dense_ones_do(block):
    x = torch.randn(5, 64).bfloat16()
    exact = block.run_dense(x.double(), torch.float64)
    error = (block.run_dense(x).double() - exact).abs().max()
    assert (block.run_packed(x, "eager").double() - exact).abs().max() <= 2 * error
    assert exact.shape == (5, 64) and exact.abs().max() > 0.01


def test_every_implementation_is_a_contender_or_says_why_not(block):
    found = {c.provider: c for c in bench_block.contenders(block, 16)}
    assert {"dense", "2:4 expand", "2:4 auto", "2:4 mma_sp", "2:4 wgmma_tma"} <= set(found)
    dense, packed = found["dense"].prepare(), found["2:4 expand"].prepare()
    assert packed.held < 0.6 * dense.held and dense.items == packed.items == 0.5
    for prepared in (dense, packed):
        result = prepared.runs[0]()
        assert prepared.check(result).right
        assert not prepared.check(result + 1).right
    with pytest.raises(Absent, match="NVIDIA GPU"):
        found["2:4 wgmma_tma"].prepare()
