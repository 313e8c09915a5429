"""Which 2:4 implementation runs, and what happens when the tensor-core kernel is wrong."""

from __future__ import annotations

import itertools
import threading
import types
import warnings

import pytest
import torch
from fake_gpu import FakeActivations, fake_gpu
from prunekernels.sparse import launching
from prunekernels.sparse.two_four import dispatch as dispatch24
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.tuning import sparse24_mma, sparse24_order, sparse24_portable


@pytest.fixture
def hopper(monkeypatch):
    state = fake_gpu(monkeypatch, dispatch24.DISPATCH)
    monkeypatch.setattr(dispatch24, "DISPATCH", state.dispatch)
    return state


def test_few_tokens_use_the_tensor_cores_after_one_self_test(hopper):
    for _ in range(3):
        assert dispatch24.DISPATCH.select(FakeActivations(4, 4096), 4096).name == "mma_sp"
    assert hopper.runs == 1
    assert dispatch24.DISPATCH.select(FakeActivations(4096, 4096), 4096).name == "eager"


@pytest.mark.parametrize("problem", ["3 of 5 results differ", RuntimeError("ptxas died\nlog")])
def test_a_failing_self_test_warns_once_and_falls_back(hopper, problem):
    hopper.problem = problem
    with pytest.warns(RuntimeWarning, match="failed its self-test on cuda:0") as caught:
        choice = dispatch24.DISPATCH.select(FakeActivations(4, 4096), 4096)
    assert choice.name == "triton"
    assert "not mma_sp: " in choice.reason and "\n" not in choice.reason
    assert str(problem).splitlines()[0] in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch24.DISPATCH.select(FakeActivations(4, 4096), 4096).name == "triton"
    assert hopper.runs == 1
    with pytest.raises(ValueError, match="impl='mma_sp' cannot run"):
        dispatch24.DISPATCH.select(FakeActivations(4, 4096), 4096, "mma_sp")


def test_float32_values_never_reach_the_tensor_cores(hopper):
    choice = dispatch24.DISPATCH.select(FakeActivations(4, 4096, torch.float32), 4096)
    assert choice.name == "eager" and "float32" in choice.reason
    with pytest.raises(ValueError, match=r"mma_sp.*float16 values, not torch\.float32"):
        dispatch24.DISPATCH.select(FakeActivations(4, 4096, torch.float32), 4096, "mma_sp")
    assert hopper.runs == 0


def test_between_few_and_many_tokens_a_failure_means_expanding(hopper):
    hopper.problem = "wrong"
    with pytest.warns(RuntimeWarning):
        assert dispatch24.DISPATCH.select(FakeActivations(128, 4096), 4096).name == "eager"


def test_other_architectures_and_capture_before_the_self_test(hopper):
    hopper.capturing = True
    with pytest.warns(RuntimeWarning, match="captured with slower.*call the layer once before"):
        choice = dispatch24.DISPATCH.select(FakeActivations(4, 4096), 4096)
    assert choice.name == "triton" and "call the layer once before" in choice.reason
    hopper.capturing = False
    assert dispatch24.DISPATCH.select(FakeActivations(4, 4096), 4096).name == "mma_sp"
    hopper.capability = (7, 5)
    choice = dispatch24.DISPATCH.select(FakeActivations(4, 4096), 4096)
    assert choice.name == "triton" and "compute capability 7.5" in choice.reason


def test_on_a_cpu_the_weight_is_expanded_and_the_reason_says_so():
    choice = dispatch24.DISPATCH.select(torch.zeros(1, 8), 8)
    assert choice.name == "eager" and "cpu" in choice.reason


def test_on_a_cpu_no_gain_is_expected():
    w = sparse24_pack(torch.zeros(512, 512))
    for tokens in (1, 4096):
        speedup, impl, reason = dispatch24.sparse24_expected(tokens, w)
        assert speedup < 1 and impl == "eager" and "cpu" in reason


def test_describe_says_on_a_cpu_that_it_is_not_faster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = dispatch24.DISPATCH.describe()
    assert row["impl"] == "eager" and "not faster" in row["reason"]


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 64, 65, 256, 257, 4096])
@pytest.mark.parametrize(("rows", "columns"), [(16, 4), (4096, 4096), (28672, 8192), (576, 1536)])
def test_tables_give_configurations_that_cover_the_work(tokens, rows, columns):
    for gated in (False, True):
        config = sparse24_mma(tokens, rows, columns, gated, 132)
        assert config.stages & (config.stages - 1) == 0 and config.stages >= 2
        assert config.token_tiles & (config.token_tiles - 1) == 0
        assert 1 <= config.splits <= max(1, columns // 512)
    assert sparse24_order(tokens, rows, columns, (9, 0))
    portable = sparse24_portable(tokens)
    assert portable.block_m >= min(tokens, 64) and portable.block_n % 16 == 0


@pytest.fixture
def streams(monkeypatch):
    """A stream whose number the test sets, capturing or not, on the CPU; an arena of 72 numbers."""
    state = types.SimpleNamespace(number=7, capturing=False)

    def current_stream(device):
        return types.SimpleNamespace(
            device_index=0, cuda_stream=state.number, synchronize=lambda: None
        )

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    for name, value in {
        "_ARENA": 72,
        "_PER_STREAM": 20,
        "_by_stream": {},
        "_arenas": {},
    }.items():
        monkeypatch.setattr(launching, name, value)
    return state


def test_counters_are_shared_on_a_stream_and_never_between_captured_launches(streams):
    cpu = torch.device("cpu")
    first = launching.counters(10, cpu)
    assert launching.counters(20, cpu).data_ptr() == first.data_ptr()
    assert first.dtype == torch.int32 and first.numel() == 20 and not first.any()
    streams.number = 8
    other = launching.counters(10, cpu)
    assert other.data_ptr() != first.data_ptr()
    # more than are left: zeros for this launch only
    big = launching.counters(10_000, cpu)
    assert big.numel() >= 10_000 and not big.any()
    assert launching.counters(10, cpu).data_ptr() == other.data_ptr()
    streams.capturing = True
    taken = [first, other, *(launching.counters(10, cpu) for _ in range(8))]
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in taken)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert all(t.data_ptr() % 16 == 0 and not t.any() for t in taken)
    assert len(launching._by_stream) == 2


def test_the_arena_is_not_allocated_by_a_thread_whose_memory_is_pooled(streams, monkeypatch):
    made, real = [], torch.zeros

    def zeros(*args, **kwargs):
        made.append(threading.get_ident())
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", zeros)
    launching.counters(10, torch.device("cpu"))
    assert len(made) == 1 and made[0] != threading.get_ident()
    streams.number = 8
    launching.counters(10, torch.device("cpu"))
    assert len(made) == 1
