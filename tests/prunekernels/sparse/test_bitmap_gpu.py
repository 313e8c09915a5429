"""All bitmap kernels on a real NVIDIA GPU: values, repeatability, graph capture, the self-test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from products import assert_as_good_as_eager, ragged
from prunekernels.sparse.bitmap.format import bitmap_pack
from prunekernels.sparse.bitmap.linear import OP, bitmap_gate_up, bitmap_linear, expand
from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig
from prunekernels.sparse.layer import ACTIVATIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

IMPLS = ["eager", "triton", "mma", "auto"]
DTYPES = [torch.bfloat16, torch.float16]


def test_the_self_test_passes():
    assert OP.self_test(torch.device("cuda", torch.cuda.current_device()), "mma") is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1024, 4096), (33, 576), (4096, 1216), (16, 4), (130, 61)]
)
def test_values_for_all_token_counts(impl, dtype, rows, columns):
    weight = ragged(rows, columns, dtype, "cuda")
    packed, bias = bitmap_pack(weight), torch.randn(rows, device="cuda").to(dtype)
    for tokens in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 300):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        got = bitmap_linear(x, packed, bias, impl=impl)
        assert_as_good_as_eager(got, F.linear(x, weight, bias), exact)
        assert torch.equal(got, bitmap_linear(x, packed, bias, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(impl, activation):
    weight = ragged(512, 2048, torch.bfloat16, "cuda")
    x = torch.randn(5, 2048, device="cuda").to(torch.bfloat16)
    act = ACTIVATIONS[activation]
    got = bitmap_linear(x, bitmap_pack(weight), None, activation, impl=impl)
    exact = act(x.double() @ weight.double().T)
    assert_as_good_as_eager(got, act(F.linear(x, weight)), exact)


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


@pytest.mark.parametrize("tokens", [1, 12, 40])
def test_gate_and_up(tokens):
    gate, up = (ragged(704, 2048, torch.bfloat16, "cuda") for _ in range(2))
    x = torch.randn(tokens, 2048, device="cuda").to(torch.bfloat16)
    packed = bitmap_pack(gate), bitmap_pack(up)
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    eager = F.silu(F.linear(x, gate)) * F.linear(x, up)
    for impl in ("mma", "auto", "eager"):
        assert_as_good_as_eager(bitmap_gate_up(x, *packed, impl=impl), eager, exact)


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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_expanding_is_exact(dtype):
    weight = ragged(130, 611, dtype, "cuda")
    packed = bitmap_pack(weight)
    dense = expand(packed.records, packed.starts, dtype, 130, 611)
    assert torch.equal(dense, weight)


@pytest.mark.parametrize("impl", ["triton", "mma"])
def test_graphs_capture_and_replay_together(impl):
    weights = [bitmap_pack(ragged(4096, 4096, torch.bfloat16, "cuda")) for _ in range(2)]
    x = torch.randn(4, 4096, device="cuda").to(torch.bfloat16)
    want = [bitmap_linear(x, w, impl=impl) for w in weights]
    graphs, results = [], []
    for w in weights:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(bitmap_linear(x, w, impl=impl))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_gradient_and_one_graph_compile():
    weight = ragged(512, 768, torch.bfloat16, "cuda")
    packed = bitmap_pack(weight)
    x = torch.randn(3, 768, device="cuda").to(torch.bfloat16).requires_grad_()
    y = torch.compile(lambda x: bitmap_linear(x, packed, activation="silu"), fullgraph=True)(x)
    y.float().sum().backward()
    x2 = x.detach().requires_grad_()
    F.silu(F.linear(x2, weight)).float().sum().backward()
    x3 = x.detach().double().requires_grad_()
    F.silu(F.linear(x3, weight.double())).sum().backward()
    assert_as_good_as_eager(x.grad, x2.grad, x3.grad)
