"""Tables of the 2:4 kernels, and the counters that split products share."""

from __future__ import annotations

import itertools
import threading
import types

import pytest
import torch
from prunekernels.sparse import launching
from prunekernels.sparse.two_four.tuning import sparse24_mma, sparse24_order, sparse24_portable


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

    idle = types.SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: idle)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "current_stream", lambda index: state.number)
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
