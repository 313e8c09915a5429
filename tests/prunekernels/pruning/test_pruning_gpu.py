"""Selection and SparseGPT's update on a real NVIDIA GPU: values, repeatability, graph capture."""

from __future__ import annotations

import pytest
import torch
from prunekernels import (
    nm_mask,
    nm_prune_,
    reference,
    rowwise_mask,
    rowwise_prune_,
    sparsegpt_update,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def awkward(*shape, dtype):
    values = [-0.0, 0.0, 1e-45, -1e-45, 1e-40, 0.5, 1.0, 1.0, 2.0, -1.0, 6e4, -6e4]
    index = torch.randint(len(values), shape)
    return torch.tensor(values)[index].to(dtype).cuda()


def same(found, exact):
    assert torch.equal(found.cpu(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (4, 8), (5, 16), (7, 24), (16, 32)])
def test_groups(keep, of, dtype):
    for scores in (torch.randn(300, of * 37, device="cuda").to(dtype), awkward(9, of, dtype=dtype)):
        same(nm_mask(scores, keep, of), reference.nm_mask(scores.double().cpu(), keep, of))


@pytest.mark.parametrize("impl", ["auto", "triton_words"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 130, 4096, 14336, 16384, 16385, 70001])
def test_rows(width, dtype, impl):
    for scores in (torch.randn(17, width, device="cuda").to(dtype), awkward(5, width, dtype=dtype)):
        for sparsity in (0.01, 0.5, 0.97, 1.0):
            found = rowwise_mask(scores, sparsity, impl=impl)
            same(found, reference.rowwise_mask(scores.double().cpu(), sparsity))
            assert torch.equal(found, rowwise_mask(scores, sparsity, impl=impl))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [130, 5120, 14336])
def test_many_rows_by_words(width, dtype):
    """A program visits several rows, each unlike the one before."""
    scale = torch.rand(4500, 1, device="cuda") * 4 + 0.01
    scores = (torch.randn(4500, width, device="cuda") * scale).to(dtype)
    scores[::7] = awkward(1, width, dtype=dtype)
    for sparsity in (0.3, 0.5):
        found = rowwise_mask(scores, sparsity, impl="triton_words")
        assert torch.equal(found, rowwise_mask(scores, sparsity, impl="eager"))
        pruned = scores.clone()
        mask = rowwise_prune_(pruned, sparsity, impl="triton_words")
        assert torch.equal(mask, rowwise_mask(scores.abs(), sparsity, impl="eager"))
        assert torch.equal(pruned, scores.masked_fill(~mask, 0))


def test_a_whole_matrix_as_one_row():
    scores = torch.randn(1, 50_000_000, device="cuda").bfloat16()
    mask = rowwise_mask(scores, 0.3)
    assert int(mask.sum()) == 35_000_000
    same(mask, rowwise_mask(scores.cpu(), 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_in_place_and_strides(dtype):
    weight = torch.randn(512, 200, device="cuda").to(dtype).t()
    norms = torch.rand(512, device="cuda") * 3
    scores = (weight.float().abs() * norms).cpu()
    for call, exact in (
        (lambda w: rowwise_prune_(w, 0.6, norms=norms), rowwise_mask(scores, 0.6)),
        (lambda w: nm_prune_(w, 2, 4, norms=norms), nm_mask(scores, 2, 4)),
    ):
        pruned = weight.clone(memory_format=torch.preserve_format)
        mask = call(pruned)
        same(mask, exact)
        assert torch.equal(pruned, weight.masked_fill(~mask, 0))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("width", [64, 40000])
def test_scores_without_an_order_are_refused(value, width):
    scores = torch.ones(3, width, device="cuda")
    scores[1, 5] = value
    with pytest.raises(ValueError, match=r"at index \(1, 5\)"):
        rowwise_mask(scores, 0.5)
    with pytest.raises(ValueError, match=r"at index \(1, 5\)"):
        nm_mask(scores, 2, 4)


def test_graphs_capture_and_replay():
    scores = torch.randn(128, 4096, device="cuda")
    rowwise_mask(scores, 0.5), nm_mask(scores, 2, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, groups = rowwise_mask(scores, 0.5), nm_mask(scores, 2, 4)
    scores.copy_(torch.randn_like(scores))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(rows, rowwise_mask(scores, 0.5))
    assert torch.equal(groups, nm_mask(scores, 2, 4))


@pytest.mark.parametrize(("keep", "of"), [(0, 0), (2, 4), (4, 8), (16, 32), (7, 24)])
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (333, 128), (64, 400), (64, 408)])
@pytest.mark.parametrize("impl", ["auto", "triton_thread"])
def test_the_update(impl, rows, width, keep, of):
    width -= width % (of or 1)
    inputs = torch.randn(3 * width, width) @ (torch.eye(width) + torch.randn(width, width) / 8)
    hessian = inputs.double().t() @ inputs.double()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    weight = torch.randn(rows, width)
    mask = None if of else torch.rand(rows, width) < 0.5
    exact = reference.sparsegpt_update(weight.double(), upper.double(), mask, keep, of)
    on_gpu = (weight.cuda(), upper.cuda(), None if mask is None else mask.cuda())
    found = sparsegpt_update(*on_gpu, keep=keep, of=of, impl=impl)
    same(found.mask, exact[2])
    for got, want in zip(found[:2], exact[:2], strict=True):
        assert (got.cpu() - want).norm() <= 1e-4 * want.norm()
    again = sparsegpt_update(*on_gpu, keep=keep, of=of, impl=impl)
    assert all(torch.equal(left, right) for left, right in zip(found, again, strict=True))
