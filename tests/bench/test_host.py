"""What a call of an op costs the host is bounded; addresses of packed layers' launches."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import prunekernels
import pytest
import torch
from prunekernels import runtime
from prunekernels.launch import calls as launch
from prunekernels.sparse import launching
from recorded_graph import RecordedGraph

from bench import bench_host

pytestmark = pytest.mark.skipif(
    not runtime.triton_installed() or runtime.interpreting(), reason="binds compiled kernels"
)

#: Calls of functions in one call of a packed layer: 26 to 29 when this was written, of a module 41.
LIMITS = {"sparse24_linear": 27, "sparse24_gate_up": 30, "bitmap_linear": 29, "PackedLinear": 43}
#: Statistics have one launch or two: 27, 38 (a field is read) and 34 when this was written.
LIMITS |= {"vector_stats": 30, "pair_stats KL": 42, "pair_stats core": 38}


@pytest.fixture
def idle() -> Iterator[pytest.MonkeyPatch]:
    # what the test itself replaces is undone before the GPU goes
    with torch.inference_mode(), bench_host.idle_gpu(), pytest.MonkeyPatch.context() as patch:
        for name in ("_by_stream", "_rooms", "_arenas"):
            patch.setattr(launching, name, {})
        patch.setattr(launching, "_lasting_rooms", [])
        yield patch


@pytest.mark.parametrize("name", LIMITS)
def test_a_call_of_a_known_shape_makes_few_calls(idle: pytest.MonkeyPatch, name: str) -> None:
    calls = bench_host.count_calls(bench_host.cases(torch.device("cpu"))[name])
    assert 10 < calls <= LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_a_captured_call_neither_waits_for_the_device_nor_copies_to_it(
    idle: pytest.MonkeyPatch, name: str
) -> None:
    call = bench_host.cases(torch.device("cpu"))[name]
    call()  # compiles
    idle.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with RecordedGraph():
        call()


def test_a_known_shape_is_checked_no_more_and_every_other_one_is(idle: pytest.MonkeyPatch) -> None:
    dense = torch.zeros(64, 512, dtype=torch.bfloat16)
    w, x = prunekernels.sparse24_pack(dense), torch.ones(2, 512, dtype=torch.bfloat16)
    for _ in range(2):
        assert prunekernels.sparse24_linear(x, w).shape == (2, 64)
    assert prunekernels.sparse24_linear(x[None], w).shape == (1, 2, 64)
    bias = torch.zeros(64, dtype=torch.bfloat16)
    assert prunekernels.sparse24_linear(x, w, bias).shape == (2, 64)
    for wrong, message in (
        (dict(x=x.half()), "x is torch.float16"),
        (dict(x=x[:, :256].contiguous()), "does not end in the 512 columns"),
        (dict(bias=bias[:32].clone()), "bias must have shape"),
        (dict(bias=bias.float()), "bias is torch.float32"),
        (dict(activation="tanh"), "activation must be one of"),
        (dict(impl="fast"), "impl must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            prunekernels.sparse24_linear(**{"x": x, "w": w, **wrong})


def test_a_kept_call_gets_the_addresses_of_its_tensors(idle: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    compiled = types.SimpleNamespace(
        function=1, packed_metadata=(), run=lambda *given: launched.append(given[9:])
    )
    idle.setattr(launch.Launch, "_compile", lambda *_, **__: compiled)
    w = prunekernels.sparse24_pack(torch.zeros(64, 2048, dtype=torch.bfloat16))
    bias = torch.zeros(64, dtype=torch.bfloat16)
    for _ in range(3):
        x = torch.ones(1, 2048, dtype=torch.bfloat16)
        y = prunekernels.sparse24_linear(x, w, bias)
    at, packed = launched[-1], w.packed.data_ptr()
    assert at[:5] == (x.data_ptr(), packed, packed, bias.data_ptr(), y.data_ptr())
    (room,) = launching._rooms.values()
    assert at[5:7] == room[2:]
    # the same kernel by the general way: all but the addresses agrees
    padded = torch.ones(1, 2056, dtype=torch.bfloat16)[:, :2048]
    prunekernels.sparse24_linear(padded, w, bias)
    assert launched[-1][8:] == at[8:]


def test_a_kept_call_is_launched_on_the_device_of_its_tensors(idle: pytest.MonkeyPatch) -> None:
    w, x = (
        prunekernels.sparse24_pack(torch.zeros(64, 512).bfloat16()),
        torch.ones(1, 512).bfloat16(),
    )
    prunekernels.sparse24_linear(x, w)
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        yield

    # another device is current until the right one is entered
    idle.setattr(launching, "current_device", lambda: 0 if entered else 1)
    idle.setattr(torch.cuda, "device", device)
    assert prunekernels.sparse24_linear(x, w).shape == (1, 64)
    assert entered == [0]


def test_unaligned_tensors_take_the_general_way(idle: pytest.MonkeyPatch) -> None:
    w = prunekernels.bitmap_pack(torch.eye(64, 512).bfloat16())
    line = torch.ones(513, dtype=torch.bfloat16)
    for x in (line[:512][None], line[1:][None], line[:512][None]):
        assert prunekernels.bitmap_linear(x, w).shape == (1, 64)


def test_room_for_parts_grows_and_keeps_what_is_in_use(idle: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    small = launching._room(10, 4, cpu, 0)
    assert launching._room(20, 8, cpu, 0) == small
    large = launching._room(launching._PARTS + 1, 4, cpu, 0)
    held = [(parts.data_ptr(), zeros.data_ptr()) for parts, zeros in launching._lasting_rooms]
    assert held == [small, large] and small[0] != large[0]
    assert launching._lasting_rooms[1][0].numel() == 2 * launching._PARTS
    # a graph keeps its counters for good, and its parts are its own
    idle.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first, second = launching._room(10, 4, cpu, 0), launching._room(10, 4, cpu, 0)
    assert first[1] != second[1] and {first[1], second[1]}.isdisjoint({small[1], large[1]})
