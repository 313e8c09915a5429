"""Adapters of other people's code, with stand-ins for what a CPU or this machine lacks."""

from __future__ import annotations

import functools
import os
import sys
import types

import pytest
import torch
from prunekernels import nm_mask
from torch import Tensor

from bench import bench_sparse, metric_peers, peers
from bench.harness import Absent


def pruned(rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns)
    return (weight * nm_mask(weight.abs(), 2, 4)).bfloat16()


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without a code generator: dynamo alone."""

    def compile_(function, *, mode, **options):
        return plain(function, backend="eager", **options)

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    peers.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    peers.compiled.cache_clear()
    torch._dynamo.reset()


def test_compiled_code_raises_where_dynamo_would_run_eager_code_instead(quick_compile):
    def twice(x: Tensor) -> Tensor:
        return x + x

    run = peers.compiled(twice)
    limit = torch._dynamo.config.recompile_limit
    for size in range(2, limit + 2):
        assert run(torch.ones(size)).tolist() == [2.0] * size
    with pytest.raises(Exception, match="fullgraph"):
        run(torch.ones(limit + 2))
    torch._dynamo.reset()
    assert peers.compiled(twice)(torch.ones(limit + 2)).sum() == 2 * limit + 4


def test_statistics_compile_as_a_whole_and_only_where_they_are_measured(quick_compile):
    rows, vocabulary = metric_peers.COMPILED_ROWS, metric_peers.COMPILED_VOCABULARIES[0]
    small = metric_peers.Inputs(torch.randn(2, 50), torch.randn(2, 50), torch.arange(2))
    for function in (metric_peers.statistics, metric_peers.kl_only):
        with pytest.raises(Absent, match=f"{rows} rows or more of {vocabulary}"):
            metric_peers._compiled(function, small)
        found = peers.compiled(function)(small.base, small.other)
        torch.testing.assert_close(found, function(small.base, small.other), rtol=1e-5, atol=1e-6)


@pytest.fixture
def cusparselt(monkeypatch):
    """cuSPARSELt's operations as dense products; what was searched for, and how it multiplied."""
    calls = types.SimpleNamespace(searches=[], products=[])

    def search(packed, dense, *rest, **options):
        calls.searches.append(tuple(dense.shape))
        return 7

    def product(packed, dense, bias, alpha, dtype, transposed, *algorithm):
        assert transposed
        calls.products.append(algorithm)
        return (packed @ dense).t()

    monkeypatch.setattr(peers, "need_gpu", lambda weight: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    monkeypatch.setattr(torch._C, "_cusparselt", types.SimpleNamespace(), raising=False)
    monkeypatch.setattr(peers, "_searched", {})
    return calls


def test_cusparselt_searches_once_for_all_copies_of_a_shape(cusparselt):
    copies = [pruned(32, 64) for _ in range(3)]
    layers = [peers._cusparselt_best(copy, 3) for copy in copies]
    for tokens in (3, 16, 100, 3):
        x = torch.randn(tokens, 64).bfloat16()
        for layer, copy in zip(layers, copies, strict=True):
            verdict = bench_sparse.check(layer, copy, x)(layer.apply(x))
            assert verdict.right and verdict.note.endswith(", cuSPARSELt 801")
    assert cusparselt.searches == [(64, 16), (64, 104)]
    assert set(cusparselt.products) == {(7,)}


def test_cusparselt_splits_k_as_found_where_torch_tells(cusparselt):
    torch._C._cusparselt.mm_search = lambda packed, dense, *rest: (5, 4, 1, 9)
    weight, x = pruned(32, 64), torch.randn(16, 64).bfloat16()
    peers._cusparselt_best(weight, 16).apply(x)
    assert cusparselt.products == [(5, 4, 1)] and not cusparselt.searches


def test_macko_multiplies_float16_and_is_judged_by_its_own_weight(monkeypatch):
    # its published interface: values, deltas, row indices, rows, columns; all contiguous

    def compress(weight):
        assert weight.is_contiguous() and weight.dtype == torch.float16
        rows, columns = weight.shape
        indices = torch.zeros(rows + 1, dtype=torch.int32)
        deltas = torch.zeros(columns, dtype=torch.uint8)
        return weight.clone(), deltas, indices, rows, columns

    def multiply(packed, x):
        values, _, _, rows, columns = packed
        assert x.is_contiguous() and x.shape == (columns,) and values.shape == (rows, columns)
        return values @ x  # fails unless both have one type

    macko = types.SimpleNamespace(compress=compress, multiply=multiply)
    monkeypatch.setitem(sys.modules, "macko_spmv", macko)
    monkeypatch.setattr(peers, "need_gpu", lambda weight: None)
    monkeypatch.setenv("MACKO_SPMV_BUILD_DIRECTORY", "")  # so that it is taken away afterwards
    monkeypatch.delenv("MACKO_SPMV_BUILD_DIRECTORY")
    case = bench_sparse.Case(
        "linear", "unstructured", "bfloat16", {"M": 1, "N": 32, "K": 64, "sparsity": 0.5}
    )
    weights = bench_sparse.Weights(case, torch.bfloat16, torch.device("cpu"), lambda held: 2)
    made = {c.provider: c for c in bench_sparse.contenders(weights, case, torch.bfloat16)}
    prepared = made["MACKO"].prepare()
    assert os.environ["MACKO_SPMV_BUILD_DIRECTORY"]
    for run in prepared.runs:
        assert run().dtype == torch.float16
    assert prepared.check(prepared.runs[0]()).right
    assert not prepared.check(functools.reduce(torch.add, [run() for run in prepared.runs])).right


def test_2_of_4_instead_is_judged_by_the_weight_it_has():
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    layer = peers._two_four(weight, 4)
    assert layer.held < 0.6 * peers.size(weight)
    assert bench_sparse.check(layer, weight, x)(layer.apply(x)).right
    assert not bench_sparse.check(layer._replace(exact=None), weight, x)(layer.apply(x)).right


def test_activations_in_e4m3_are_judged_by_what_they_are_rounded_to():
    weight, x = pruned(32, 256), torch.randn(4, 256).bfloat16()
    layer = peers._packed("2:4-fp8 x fp8", "eager", weight, 4)
    layer = layer._replace(rounds=peers.rounded_tokens)
    assert bench_sparse.check(layer, weight, x)(layer.apply(x)).right
    assert not bench_sparse.check(layer._replace(rounds=None), weight, x)(layer.apply(x)).right
    with pytest.raises(Absent, match="need an NVIDIA GPU"):
        peers._fp8_tokens(weight, 4)


def test_tilelang_is_absent_where_it_cannot_run(monkeypatch):
    with pytest.raises(Absent, match="NVIDIA GPU"):
        peers._tilelang(pruned(128, 64), 1)
    monkeypatch.setattr(peers, "need_gpu", lambda weight: None)
    monkeypatch.setitem(sys.modules, "tilelang", None)
    with pytest.raises(Absent, match="tilelang: not installed; pip install tilelang"):
        peers._tilelang(pruned(128, 64), 1)


@pytest.mark.parametrize(
    ("capability", "shape", "dtype", "why"),
    [
        ((12, 0), (128, 64), torch.bfloat16, r"\(12, 0\)"),
        ((9, 0), (130, 64), torch.bfloat16, "130 × 64"),
        ((9, 0), (128, 64), torch.float32, "float32"),
    ],
)
def test_tilelang_says_what_it_does_not_take(monkeypatch, capability, shape, dtype, why):
    from bench.tilelang_peer import Product

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(Absent, match=why):
        Product(None, pruned(*shape).to(dtype))


@pytest.mark.parametrize(
    ("tokens", "padded", "tile"), [(1, 16, 16), (100, 128, 128), (300, 384, 128)]
)
def test_tilelang_gets_whole_tiles_of_tokens(monkeypatch, tokens, padded, tile):
    from bench.tilelang_peer import Product

    weight, x = pruned(128, 64), torch.randn(tokens, 64).bfloat16()
    library = types.SimpleNamespace(compress=lambda weight, **options: (weight, torch.zeros(3)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "tilelang.utils.sparse", library)
    asked = []

    def kernel(self, count, size):
        asked.append((count, size))
        return lambda values, indices, wide: values @ wide.t()

    monkeypatch.setattr(Product, "_kernel", kernel)
    product = Product(None, weight)
    assert torch.equal(
        product(x),
        (weight @ torch.nn.functional.pad(x, (0, 0, 0, padded - tokens)).t()).t()[:tokens],
    )
    assert asked == [(padded, tile)] and product.held == weight.nbytes + 12
