"""All 2:4 kernels on a real NVIDIA GPU: values, repeatability, graph capture, the self-test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from products import assert_as_good_as_eager
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.linear import (
    ACTIVATIONS,
    OP,
    expand,
    sparse24_gate_up,
    sparse24_linear,
)
from prunekernels.sparse.two_four.tuning import MmaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

IMPLS = ["eager", "triton", "mma_sp", "auto"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    groups = -(-columns // 4)
    rank = torch.rand(rows, groups, 4, device="cuda").argsort(2).argsort(2)
    kept = rank < torch.randint(0, 3, (rows, groups, 1), device="cuda")
    weight = torch.randn(rows, groups, 4, device="cuda") * kept
    return weight.view(rows, -1)[:, :columns].to(dtype)


def test_the_self_test_passes():
    device = torch.device("cuda", torch.cuda.current_device())
    assert OP.self_test(device, "mma_sp") is None
    if torch.cuda.get_device_capability() == (9, 0):
        assert OP.self_test(device, "wgmma_tma") is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1024, 4096), (33, 576), (4096, 1216), (16, 4), (130, 61)]
)
def test_values_for_all_token_counts(impl, dtype, rows, columns):
    if impl == "mma_sp" and dtype == torch.float32:
        pytest.skip("the tensor cores multiply 16-bit values")
    weight = two_of_four(rows, columns, dtype)
    packed, bias = sparse24_pack(weight), torch.randn(rows, device="cuda").to(dtype)
    for tokens in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 300):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        got = sparse24_linear(x, packed, bias, impl=impl)
        assert_as_good_as_eager(got, F.linear(x, weight, bias), exact)
        assert torch.equal(got, sparse24_linear(x, packed, bias, impl=impl))


HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Hopper only"
)


@HOPPER
@pytest.mark.parametrize("impl", ["wgmma_sp", "wgmma_tma"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (130, 61), (4096, 1216)])
def test_the_hopper_kernels_behind_their_names(impl, dtype, rows, columns):
    weight = two_of_four(rows, columns, dtype)
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
    gate, up = two_of_four(520, 2112, dtype), two_of_four(520, 2112, dtype)
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(impl, activation):
    weight = two_of_four(512, 2048, torch.bfloat16)
    x = torch.randn(5, 2048, device="cuda").to(torch.bfloat16)
    act = ACTIVATIONS[activation]
    got = sparse24_linear(x, sparse24_pack(weight), None, activation, impl=impl)
    exact = act(x.double() @ weight.double().T)
    assert_as_good_as_eager(got, act(F.linear(x, weight)), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [1, 20, 64, 70])
def test_gate_up(impl, tokens):
    gate, up = (two_of_four(1000, 1600, torch.bfloat16) for _ in range(2))
    x = torch.randn(tokens, 1600, device="cuda").to(torch.bfloat16)
    got = sparse24_gate_up(x, sparse24_pack(gate), sparse24_pack(up), impl=impl)
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert_as_good_as_eager(got, F.silu(F.linear(x, gate)) * F.linear(x, up), exact)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
@pytest.mark.parametrize("token_tiles", [1, 2, 4, 8])
def test_every_configuration_of_the_tensor_core_kernel(token_tiles, splits):
    from prunekernels.sparse.two_four import mma as mma24

    weight = two_of_four(700, 4160, torch.bfloat16)
    x = torch.randn(50, 4160, device="cuda").to(torch.bfloat16)
    config = MmaConfig(2, token_tiles, 2 if token_tiles > 2 else 4, splits)
    arguments = (x, sparse24_pack(weight).packed, None, 700, None, "none", config)
    got = mma24.launch(*arguments)
    assert_as_good_as_eager(got, F.linear(x, weight), x.double() @ weight.double().T)
    for _ in range(20):
        assert torch.equal(mma24.launch(*arguments), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanding_is_exact(dtype):
    weight = two_of_four(130, 611, dtype)
    dense = expand(sparse24_pack(weight).packed, 130, 611, dtype)
    assert torch.equal(dense, weight)


@pytest.mark.parametrize("impl", ["triton", "mma_sp"])
def test_graphs_capture_and_replay_together(impl):
    weights = [sparse24_pack(two_of_four(4096, 4096, torch.bfloat16)) for _ in range(2)]
    x = torch.randn(4, 4096, device="cuda").to(torch.bfloat16)
    want = [sparse24_linear(x, w, impl=impl) for w in weights]
    graphs, results = [], []
    for w in weights:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(sparse24_linear(x, w, impl=impl))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_streams_do_not_disturb_each_other():
    packed = sparse24_pack(two_of_four(4096, 4096, torch.bfloat16))
    x = torch.randn(4, 4096, device="cuda").to(torch.bfloat16)
    want = sparse24_linear(x, packed, impl="mma_sp")
    torch.cuda.synchronize()
    results = []
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(sparse24_linear(x, packed, impl="mma_sp"))
    torch.cuda.synchronize()
    assert all(torch.equal(r, want) for r in results)


def test_gradient_and_one_graph_compile():
    weight = two_of_four(512, 768, torch.bfloat16)
    packed = sparse24_pack(weight)
    x = torch.randn(3, 768, device="cuda").to(torch.bfloat16).requires_grad_()
    y = torch.compile(lambda x: sparse24_linear(x, packed, activation="silu"), fullgraph=True)(x)
    y.float().sum().backward()
    x2 = x.detach().requires_grad_()
    F.silu(F.linear(x2, weight)).float().sum().backward()
    x3 = x.detach().double().requires_grad_()
    F.silu(F.linear(x3, weight.double())).sum().backward()
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)
