"""Which bitmap implementation runs, and what happens when the tensor-core kernel is wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
from fake_gpu import FakeActivations, fake_gpu
from prunekernels.runtime import Choice
from prunekernels.sparse import dispatch
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.linear import DISPATCH
from prunekernels.sparse.bitmap.tuning import (
    bitmap_mma,
    bitmap_order,
    bitmap_portable,
    bitmap_splits,
)


@pytest.fixture
def hopper(monkeypatch):
    return fake_gpu(monkeypatch, DISPATCH)


def test_few_tokens_use_the_tensor_cores_after_one_self_test(hopper):
    for _ in range(3):
        choice = hopper.dispatch.select(FakeActivations(4, 4096), 4096)
        assert choice.name == "mma" and "predicted" in choice.reason
    assert hopper.runs == 1
    assert hopper.dispatch.select(FakeActivations(4096, 4096), 4096).name == "eager"
    assert hopper.dispatch.select(FakeActivations(4, 4096, torch.float32), 4096).name == "eager"
    with pytest.raises(ValueError, match=r"bfloat16 and float16 values, not torch\.float32"):
        hopper.dispatch.select(FakeActivations(4, 4096, torch.float32), 4096, "mma")


@pytest.mark.parametrize("problem", ["3 of 5 results differ", RuntimeError("ptxas died\nlog")])
def test_a_failing_self_test_warns_once_and_falls_back(hopper, problem):
    hopper.problem = problem
    with pytest.warns(RuntimeWarning, match="bitmap .* failed its self-test on cuda:0") as caught:
        choice = hopper.dispatch.select(FakeActivations(4, 4096), 4096)
    assert choice.name == "triton"
    assert "not mma: " in choice.reason and "\n" not in choice.reason
    assert str(problem).splitlines()[0] in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper.dispatch.select(FakeActivations(4, 4096), 4096).name == "triton"
    assert hopper.runs == 1
    with pytest.raises(ValueError, match="impl='mma' cannot run"):
        hopper.dispatch.select(FakeActivations(4, 4096), 4096, "mma")


def test_other_architectures_and_capture_before_the_self_test(hopper):
    hopper.capturing = True
    with pytest.warns(RuntimeWarning, match="captured with slower"):
        choice = hopper.dispatch.select(FakeActivations(4, 4096), 4096)
    assert choice.name == "triton" and "call the layer once before" in choice.reason
    hopper.capturing = False
    assert hopper.dispatch.select(FakeActivations(4, 4096), 4096).name == "mma"
    hopper.capability = (7, 5)
    choice = hopper.dispatch.select(FakeActivations(4, 4096), 4096)
    assert choice.name == "triton" and "compute capability 7.5" in choice.reason


def test_on_a_cpu_the_weight_is_expanded_and_the_reason_says_so(monkeypatch):
    choice = DISPATCH.select(torch.zeros(1, 8), 8)
    assert choice.name == "eager" and "cpu" in choice.reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = DISPATCH.describe()
    assert row["op"] == "bitmap_linear" and row["impl"] == "eager"
    assert "not faster" in row["reason"]


def test_without_the_tensor_cores_a_layer_is_expected_to_be_slower(monkeypatch):
    w = bitmap_pack(torch.zeros(64, 64, dtype=torch.bfloat16))
    for impl, faster in (("mma", True), ("triton", False), ("eager", False)):
        choice = Choice(impl, "as on a GPU")
        monkeypatch.setattr(dispatch.Dispatch, "select", lambda *_, choice=choice: choice)
        speedup, chosen, reason = DISPATCH.expected(1, w)
        assert (chosen, reason) == choice and (speedup > 1) == faster


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4096, 4096), (28672, 8192), (576, 1536)])
def test_tables_give_configurations_that_cover_the_work(tokens, rows, columns):
    config = bitmap_mma(tokens, rows, columns, 132, (9, 0))
    # what the tile does, and not how tensor cores find the values, is the same on Blackwell
    blackwell = bitmap_mma(tokens, rows, columns, 132, (12, 0))
    assert config.count_bits and blackwell == config._replace(count_bits=False)
    assert config.token_tiles & (config.token_tiles - 1) == 0
    assert config.token_tiles >= min(-(-tokens // 8), 8) and config.stages >= 2
    assert 1 <= config.splits <= max(1, columns // 512)
    assert bitmap_order(tokens, rows, columns, (9, 0))
    for itemsize in (2, 4):
        portable = bitmap_portable(tokens, itemsize)
        assert portable.block_m >= 16 and portable.block_n % 16 == 0
    blocks = -(-columns // 64)
    assert 1 <= bitmap_splits(-(-rows // 64), blocks) <= max(1, blocks // 8)
