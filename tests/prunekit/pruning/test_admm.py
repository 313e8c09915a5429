"""ADMM's weight update against the exact least squares of every row, in float64."""

from __future__ import annotations

import pytest
import torch
from pruned_models import correlated_inputs, hessian_of

from prunekit.pruning import admm, importance, patterns, sparsegpt

DAMPING = 0.01


def damped(hessian):
    hessian = hessian.double()
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


def errors(weight, dense, hessian):
    """tr((Z - W)·H·(Z - W)ᵀ) of each row."""
    change = weight.double() - dense.double()
    return ((change @ damped(hessian)) * change).sum(1)


def least_squares(dense, mask, hessian):
    """Each row's normal equations of its kept weights, solved directly."""
    hessian, dense = damped(hessian), dense.double()
    exact = torch.zeros_like(dense)
    for row, kept in enumerate(mask):
        exact[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (dense[row] @ hessian)[kept])
    return exact


def layer(pattern, width=96, rows=40, silent=True):
    inputs = correlated_inputs(4 * width, width)
    inputs[:, 0] *= 30  # an outlier, as language models have
    if silent:
        inputs[:, 5] = 0
    hessian = hessian_of(inputs)
    dense = torch.randn(rows, width)
    upper = sparsegpt.inverse_factor(hessian, DAMPING).upper
    ((walked, mask),) = sparsegpt.sparsify([dense], upper, patterns.parse(pattern), 32)
    return hessian, dense, walked, mask


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "8:16"])
def test_refit_beats_sparsegpt_at_its_own_mask_and_comes_close_to_the_optimum(pattern):
    hessian, dense, walked, mask = layer(pattern)
    found = admm.refit(admm.system(hessian, DAMPING), dense, walked, mask)
    assert torch.equal(found != 0, mask & (found != 0))
    least = errors(least_squares(dense, mask, hessian), dense, hessian)
    before, after = errors(walked, dense, hessian), errors(found, dense, hessian)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() - least.sum() <= 0.1 * (before.sum() - least.sum())
    assert (after >= least * (1 - 1e-5)).all()


def test_refit_converges_to_the_least_squares_answer():
    hessian, dense, walked, mask = layer("2:4")
    found = admm.refit(admm.system(hessian, DAMPING), dense, walked, mask, steps=2000)
    exact = least_squares(dense, mask, hessian)
    least = errors(exact, dense, hessian).sum()
    assert errors(found, dense, hessian).sum() <= least * (1 + 1e-5)


def test_a_row_that_keeps_all_or_nothing():
    hessian, dense, _, mask = layer("2:4")
    mask[0], mask[1] = True, False
    start = importance.magnitude(dense) * 0
    found = admm.refit(admm.system(hessian, DAMPING), dense, start, mask, steps=200)
    assert torch.allclose(found[0], dense[0], atol=1e-3)
    assert not found[1].any()


def test_no_row_gets_worse_than_it_starts():
    hessian, dense, _, mask = layer("2:4")
    start = least_squares(dense, mask, hessian).float()
    found = admm.refit(admm.system(hessian, DAMPING), dense, start, mask, steps=1)
    assert (errors(found, dense, hessian) <= errors(start, dense, hessian) * (1 + 1e-5)).all()


def chosen_by_hand(dense, hessian, pattern, steps=admm.STEPS):
    """`admm.choose`'s mask in float64, a step written as the source writes it."""
    hessian = damped(hessian)
    scale = hessian.diagonal().sqrt()
    scaled = hessian / scale / scale[:, None]
    inverse = torch.linalg.inv(scaled + admm.CHOOSING * torch.eye(len(scaled)))
    target = dense.double() * scale
    kept, dual = target.clone(), torch.zeros_like(target)
    for step in range(1, steps + 1):
        free = (target @ scaled + admm.CHOOSING * (kept - dual)) @ inverse
        scores = (free + dual).abs()
        mask = torch.zeros_like(scores, dtype=torch.bool)
        if pattern.structured:
            groups = scores.view(len(dense), -1, pattern.of)
            best = groups.topk(pattern.keep, dim=-1).indices
            mask.view(groups.shape).scatter_(-1, best, True)
        else:
            gone = pattern.sparsity * min(1.0, step / admm.RISING) ** (1 / 3)
            mask.view(-1)[scores.view(-1).argsort()[int(gone * scores.numel() + 1e-9) :]] = True
        kept = (free + dual) * mask
        dual = dual + free - kept
    return mask


@pytest.mark.parametrize("name", ["unstructured", "2:4", "8:16"])
def test_chosen_masks_equal_those_in_float64_and_err_less_than_sparsegpt(name):
    hessian, dense, walked, mask = layer(name)
    pattern = patterns.parse(name)
    alive = torch.ones_like(mask)
    found = admm.system(hessian, DAMPING, admm.CHOOSING)
    weights, chosen = admm.choose(found, dense, pattern, alive)
    exact = chosen_by_hand(dense, hessian, pattern)
    assert int(chosen.sum()) == int(exact.sum()) == int(mask.sum())
    assert (chosen != exact).float().mean() < 0.002
    assert not weights[~chosen].any()
    refitted = admm.refit(admm.system(hessian, DAMPING), dense, walked, mask)
    least = errors(refitted, dense, hessian).sum()
    assert errors(weights, dense, hessian).sum() < least < errors(walked, dense, hessian).sum()


def test_zeros_are_the_first_to_go():
    hessian, dense, _, _ = layer("unstructured")
    dense[:, ::4] = 0
    found = admm.system(hessian, DAMPING, admm.CHOOSING)
    weights, mask = admm.choose(found, dense, patterns.parse("unstructured", 0.5), dense != 0)
    assert not weights[:, ::4].any() and int(mask.sum()) == dense.numel() // 2
