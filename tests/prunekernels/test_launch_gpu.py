"""Launches on a real NVIDIA GPU: by handle, from prepared calls, captured, and warmed up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import prunekernels
import pytest
import torch
from prunekernels import runtime, warm_up
from prunekernels.launch import calls, warming
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

Layer = Callable[..., Tensor]


@pytest.fixture(params=["sparse24_linear", "bitmap_linear"])
def layer(request: pytest.FixtureRequest) -> Iterator[tuple[Layer, Callable[..., Tensor]]]:
    """A layer of 512 × 4096 whose columns are split, and its product as the op's wrapper has it."""
    weight = torch.randn(512, 4096, device="cuda").bfloat16()
    weight *= torch.tensor([1.0, 0.0, 0.0, 1.0], device="cuda").repeat(1024)
    if request.param == "sparse24_linear":
        w: Any = prunekernels.sparse24_pack(weight)
        tensors = (w.packed,)
    else:
        w = prunekernels.bitmap_pack(weight)
        tensors = tuple(t for name, t in w.state_dict().items() if name != "header")
    op = getattr(torch.ops.prunekernels, request.param)

    def wrapped(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return op(x, *tensors, *w.shape, bias, "none", "auto")

    yield functools.partial(getattr(prunekernels, request.param), w=w), wrapped
    runtime.ops()[request.param].forget()


def test_a_prepared_call_is_the_call(layer: Any) -> None:
    linear, wrapped = layer
    for tokens in (1, 8, 16):
        bias = torch.randn(512, device="cuda").bfloat16()
        for _ in range(3):
            x = torch.randn(tokens, 4096, device="cuda").bfloat16()
            assert torch.equal(linear(x), wrapped(x))
            assert torch.equal(linear(x, bias=bias), wrapped(x, bias))
        # an unaligned x, and one whose rows are not side by side
        line = torch.randn(tokens * 4096 + 1, device="cuda").bfloat16()
        loose = torch.randn(tokens, 8192, device="cuda").bfloat16()[:, :4096]
        for x in (line[1:].view(tokens, 4096), loose, loose.contiguous()):
            assert torch.equal(linear(x), wrapped(x))


def test_streams_do_not_share_what_a_call_works_in(layer: Any) -> None:
    linear, wrapped = layer
    x = torch.randn(8, 4096, device="cuda").bfloat16()
    want = wrapped(x)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results: list[Tensor] = []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(linear(x))
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got in results)


def test_a_warmed_up_call_is_captured_and_another_is_an_error(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, wrapped = layer
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    assert warm_up([lambda: linear(x)]) >= 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, wrapped(x))
    monkeypatch.setattr(calls, "_compiled", {})
    for op in runtime.ops().values():
        op.forget()
    with (
        pytest.raises(RuntimeError, match=r"first needed inside the capture .*warm_up"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        linear(x)
    torch.cuda.synchronize()
    assert torch.equal(linear(x), wrapped(x))


def test_workers_compile_all_that_is_launched(
    layer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, _ = layer
    x = torch.randn(2, 4096, device="cuda").bfloat16()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calls, "_compiled", {})
    for op in runtime.ops().values():
        op.forget()
        op.tested.clear()
    found: list[set[str]] = []

    def apart(*given: Any) -> None:
        real(*given)
        found.append({path.name for path in tmp_path.rglob("*.cubin")})

    real = warming.compile_apart
    monkeypatch.setattr(warming, "compile_apart", apart)
    # Triton keeps what this process has compiled; a kernel that it does not hold is looked up
    compiled = warm_up([lambda: linear(x)])
    assert compiled >= 1 and len(found[0]) >= 1
    assert {path.name for path in tmp_path.rglob("*.cubin")} == found[0]


def test_calls_cost_the_host_little() -> None:
    from bench import bench_host

    costs = {cost.name: cost for cost in bench_host.measure(rounds=10)}
    for name, goal in bench_host.GOALS.items():
        assert costs[name].ratio <= goal, costs[name]
