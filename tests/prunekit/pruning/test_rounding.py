"""Rounding of kept weights against a float64 walk, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from pruned_models import correlated_inputs, hessian_of
from torch import nn

from prunekit.pruning import admm, patterns, rounding, sparsegpt

DAMPING = 0.01


def damped(hessian):
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


def error(weight, dense, hessian):
    change = weight.double() - dense.double()
    return float(((change @ damped(hessian).double()) * change).sum())


def layer(width=160, rows=48, pattern="2:4"):
    inputs = correlated_inputs(4 * width, width)
    inputs[:, 3] *= 20
    hessian = hessian_of(inputs)
    dense = torch.randn(rows, width)
    upper = sparsegpt.inverse_factor(hessian, DAMPING).upper
    ((walked, mask),) = sparsegpt.sparsify([dense], upper, patterns.parse(pattern), 32)
    return hessian, dense, walked, mask, upper


def rounded(bits, group, weights, mask, upper, hessian, dense):
    found = rounding.Rounded.empty(tuple(dense.shape), bits, group, "cpu")
    rounding.round_(found, weights, mask, upper, damped(hessian), dense)
    return found


def nearest(weights, bits, group):
    """Every weight to the nearest multiple of its group's largest / limit."""
    limit = 2 ** (bits - 1) - 1
    parts = []
    for part in weights.split(group, dim=1):
        scale = part.abs().amax(1, keepdim=True).clamp_min(1e-30) / limit
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, dim=1)


def by_hand(weights, mask, hessian, scales, group, limit):
    """The walk in float64 with a dense inverse, from given scales."""
    hessian = damped(hessian).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, integers = weights.double().clone(), torch.zeros(weights.shape)
    for column in range(weights.shape[1]):
        scale = scales[:, column // group].double()
        value = (left[:, column] / scale).round().clamp(-limit, limit) * mask[:, column]
        integers[:, column] = value.float()
        missed = (left[:, column] - value * scale) / upper[column, column]
        left[:, column + 1 :] -= missed[:, None] * upper[column, column + 1 :]
    return integers


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 128), (4, 64), (4, 24), (4, None)])
def test_integers_scales_and_masks(bits, group):
    hessian, dense, walked, mask, upper = layer()
    found = rounded(bits, group, walked, mask, upper, hessian, dense)
    limit = 2 ** (bits - 1) - 1
    used = group or (160 if bits == 8 else 128)
    assert found.group == used and found.scales.shape == (48, -(-160 // used))
    assert found.integers.dtype == torch.int8 and int(found.integers.abs().max()) <= limit
    assert not found.integers[~mask].any()
    assert bool((found.scales > 0).all() and found.scales.isfinite().all())
    by_columns = [found.scales[:, column // used] for column in range(160)]
    assert torch.equal(found.to_dense(), found.integers * torch.stack(by_columns, dim=1))


def test_the_walk_equals_one_in_float64(monkeypatch):
    hessian, dense, walked, mask, upper = layer()
    monkeypatch.setattr(rounding, "_fit_scales_", lambda *_: None)
    found = rounded(4, 24, walked, mask, upper, hessian, dense)
    exact = by_hand(walked, mask, hessian, found.scales, 24, 7)
    assert (found.integers != exact).float().mean() < 0.002  # values half-way between two integers


@pytest.mark.parametrize(("bits", "group", "share"), [(8, 160, 0.7), (4, 32, 0.7)])
def test_it_errs_less_than_rounding_to_nearest(bits, group, share):
    hessian, dense, walked, mask, upper = layer()
    best = admm.refit(admm.system(hessian, DAMPING), dense, walked, mask, steps=500)
    found = rounded(bits, group, best, mask, upper, hessian, dense)
    floor = error(best, dense, hessian)
    joint = error(found.to_dense(), dense, hessian) - floor
    plain = error(nearest(best, bits, group), dense, hessian) - floor
    assert joint < share * plain


def test_fitted_scales_are_the_least_squares_ones(monkeypatch):
    hessian, dense, walked, mask, upper = layer(width=96)
    fitted = rounded(4, 32, walked, mask, upper, hessian, dense)
    monkeypatch.setattr(rounding, "_fit_scales_", lambda *_: None)
    walk = rounded(4, 32, walked, mask, upper, hessian, dense)
    assert torch.equal(walk.integers, fitted.integers)
    root = torch.linalg.cholesky(damped(hessian).double()).t()
    for row in range(4):
        columns = torch.zeros(96, 3, dtype=torch.float64)
        for group in range(3):
            span = slice(32 * group, 32 * group + 32)
            columns[span, group] = fitted.integers[row, span].double()
        exact = torch.linalg.lstsq(root @ columns, root @ dense[row].double()).solution
        assert torch.allclose(fitted.scales[row].double(), exact, rtol=1e-4)
    assert error(fitted.to_dense(), dense, hessian) < error(walk.to_dense(), dense, hessian)


def test_rows_and_groups_without_weights():
    hessian, dense, walked, mask, upper = layer(width=96)
    mask[0], mask[1, :32] = False, False
    walked = walked * mask
    found = rounded(4, 32, walked, mask, upper, hessian, dense)
    assert not found.integers[0].any() and not found.integers[1, :32].any()
    assert bool((found.scales > 0).all() and found.scales.isfinite().all())


def test_what_is_attached_is_forgotten_when_the_weight_changes():
    hessian, dense, walked, mask, upper = layer(width=96)
    found = rounded(4, 32, walked, mask, upper, hessian, dense)
    module = nn.Linear(96, 48, dtype=torch.bfloat16)
    assert rounding.attached(module) is None
    rounding.attach_(module, found)
    assert rounding.attached(module) is None
    module.weight.data.copy_(found.to_dense())
    assert rounding.attached(module) is found
    module.weight.data[0, 0] += 1
    assert rounding.attached(module) is None
