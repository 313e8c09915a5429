"""SparseGPT's mathematics against a float64 reference, column by column."""

from __future__ import annotations

import pytest
import torch
from pruned_models import correlated_inputs, hessian_of

from prunekit.errors import PrunekitError
from prunekit.pruning import (
    importance,
    patterns,
    sparsegpt,
)


def sparsegpt_by_hand(weight, hessian, damping, block, pattern):
    """Algorithm 1 in float64, one column at a time, with a dense inverse."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    rows, width = weight.shape
    hessian += damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    keep = torch.ones(rows, width, dtype=torch.bool)
    for column in range(width):
        if pattern.structured and column % pattern.of == 0:
            span = slice(column, column + pattern.of)
            saliency = (weight[:, span] / upper.diagonal()[span]) ** 2
            worst = saliency.argsort(dim=1)[:, : pattern.of - pattern.keep]
            keep[:, span] = keep[:, span].scatter(1, worst, False)
        elif not pattern.structured and column % block == 0:
            end = min(column + block, width)
            saliency = (weight[:, column:end] / upper.diagonal()[column:end]) ** 2
            wanted = [int(pattern.sparsity * rows * c + 1e-9) for c in (column, end)]
            worst = saliency.flatten().argsort()[: wanted[1] - wanted[0]]
            flat = torch.ones(saliency.numel(), dtype=torch.bool)
            flat[worst] = False
            keep[:, column:end] = flat.view(saliency.shape)
        error = torch.where(keep[:, column], 0.0, weight[:, column]) / upper[column, column]
        weight[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
        weight[:, column] = torch.where(keep[:, column], weight[:, column], 0.0)
    return weight, keep


@pytest.mark.parametrize("width", [1, 40, 300, 520])
def test_hessian_in_triangles_equals_the_product(width):
    inputs = correlated_inputs(700, width)
    hessian = torch.zeros(width, width)
    for part in inputs.split(300):
        sparsegpt.accumulate_(hessian, part)
    sparsegpt.mirror_(hessian)
    exact = inputs.double().t() @ inputs.double()
    assert torch.equal(hessian, hessian.t())
    assert (hessian - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("width", [1, 7, 130, 400])
def test_inverse_factor(width):
    hessian = hessian_of(correlated_inputs(width + 5, width))
    factor = sparsegpt.inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(width)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert factor.damping == 0.01
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "1:4", "3:4"])
@pytest.mark.parametrize(("width", "block"), [(48, 128), (160, 128), (96, 36), (200, 1)])
def test_sparsegpt_equals_columns_one_by_one_in_float64(pattern, width, block):
    parsed = patterns.parse(pattern)
    inputs = correlated_inputs(400, width)
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(1))
    hessian = hessian_of(inputs)
    factor = sparsegpt.inverse_factor(hessian, 0.01)
    [(pruned, mask)] = sparsegpt.sparsify([weight], factor.upper, parsed, block)
    expected, expected_mask = sparsegpt_by_hand(weight, hessian, 0.01, block, parsed)
    assert torch.equal(mask, expected_mask)
    assert (pruned - expected).norm() <= 1e-4 * expected.norm()
    assert bool((pruned[~mask] == 0).all())


def test_sparsegpt_stacks_matrices_without_mixing_them():
    inputs = correlated_inputs(300, 64)
    upper = sparsegpt.inverse_factor(hessian_of(inputs), 0.01).upper
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(rows, 64, generator=generator) * rows for rows in (3, 8, 5)]
    kept = [weight.clone() for weight in weights]
    for pattern in (patterns.parse("unstructured", 0.37), patterns.parse("2:4")):
        together = sparsegpt.sparsify(weights, upper, pattern, 24)
        for weight, (pruned, mask) in zip(weights, together, strict=True):
            [(alone, alone_mask)] = sparsegpt.sparsify([weight], upper, pattern, 24)
            assert torch.equal(mask, alone_mask)
            torch.testing.assert_close(pruned, alone, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, weights, kept)), "the originals were changed"


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.7, 0.999])
def test_sparsegpt_counts_add_up_over_blocks(sparsity):
    upper = sparsegpt.inverse_factor(hessian_of(correlated_inputs(90, 50)), 0.01).upper
    weight = torch.randn(7, 50)
    pattern = patterns.parse("unstructured", sparsity)
    [(pruned, mask)] = sparsegpt.sparsify([weight], upper, pattern, 16)
    assert int((~mask).sum()) == int(sparsity * 350 + 1e-9) == int((pruned == 0).sum())


def test_sparsegpt_loses_less_than_masks_alone_on_correlated_inputs():
    inputs = correlated_inputs(600, 96)
    weight = torch.randn(64, 96)
    mean_square = inputs.double().square().mean(0)
    upper = sparsegpt.inverse_factor(hessian_of(inputs), 0.01).upper

    def loss(pruned):
        return float((inputs @ (pruned - weight).t()).norm())

    for name in ("unstructured", "2:4"):
        pattern = patterns.parse(name)
        [(updated, _)] = sparsegpt.sparsify([weight], upper, pattern, 128)
        wanda = importance.select(importance.wanda(weight, mean_square), pattern, per_row=True)
        magnitude = importance.select(importance.magnitude(weight), pattern, per_row=False)
        assert loss(updated) < 0.9 * loss(weight * wanda) < 0.9 * loss(weight * magnitude)


def test_saliency_is_not_the_weight_alone():
    # column 1 is nearly a copy of column 0: the rest makes up for it, so its large weight goes
    first = torch.randn(500)
    inputs = torch.stack([first, first + 0.05 * torch.randn(500), torch.randn(500)], dim=1)
    inputs = torch.cat([inputs, torch.randn(500, 1)], dim=1)
    weight = torch.tensor([[3.0, 2.0, 1.0, 1.5]])
    upper = sparsegpt.inverse_factor(hessian_of(inputs), 1e-4).upper
    pattern = patterns.parse("unstructured", 0.25)
    [(pruned, mask)] = sparsegpt.sparsify([weight], upper, pattern, 128)
    assert mask.tolist() == [[False, True, True, True]]
    assert abs(float(pruned[0, 1]) - 5) < 0.1  # took over column 0's part


def test_inputs_that_are_always_zero_are_pruned_first_and_nothing_more():
    inputs = correlated_inputs(200, 20)
    inputs[:, 3] = 0
    upper = sparsegpt.inverse_factor(hessian_of(inputs), 0.01).upper
    weight = torch.ones(4, 20)
    pattern = patterns.parse("unstructured", 0.1)
    [(pruned, mask)] = sparsegpt.sparsify([weight], upper, pattern, 128)
    assert int((~mask).sum()) == 8 == int((pruned == 0).sum())
    assert not bool(mask[:, 3].any())


def test_damping_is_raised_in_stated_steps_and_reported():
    hessian = torch.diag(
        torch.tensor([1.0, 1.0, 1.0, -0.05])
    )  # indefinite, as rounding can leave it
    factor = sparsegpt.inverse_factor(hessian, 0.01)
    assert factor.damping == pytest.approx(0.1)
    added = 0.1 * float(hessian.diagonal().mean())
    expected = (hessian.diagonal() + added) ** -0.5
    torch.testing.assert_close(factor.upper.diagonal(), expected)
    hopeless = torch.diag(torch.tensor([1.0, -0.9]))
    with pytest.raises(PrunekitError, match=r"not positive definite even with damping 0\.1"):
        sparsegpt.inverse_factor(hopeless, 0.0001)
