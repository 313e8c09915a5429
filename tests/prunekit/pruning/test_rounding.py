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
    """Every weight to the nearest code times its group's largest / limit."""
    limit = {8: 127, 4: 7, "fp8": 448}[bits]
    to_code = nearest_e4m3 if bits == "fp8" else nearest_integer
    parts = []
    for part in weights.split(group, dim=1):
        scale = part.abs().amax(1, keepdim=True).clamp_min(1e-30) / limit
        parts.append(to_code(part / scale, limit) * scale)
    return torch.cat(parts, dim=1)


def nearest_integer(values, limit):
    return values.round().clamp(-limit, limit)


def nearest_e4m3(values, limit):
    """Three bits behind the leading one, none finer than 2^-9, ties to even."""
    step = torch.exp2(values.abs().clamp_min(1e-30).log2().floor().clamp_min(-6) - 3)
    return ((values / step).round() * step).clamp(-limit, limit)


def by_hand(weights, mask, hessian, scales, group, limit, to_code=nearest_integer):
    """The walk in float64 with a dense inverse, from given scales."""
    hessian = damped(hessian).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, integers = weights.double().clone(), torch.zeros(weights.shape)
    for column in range(weights.shape[1]):
        scale = scales[:, column // group].double()
        value = to_code(left[:, column] / scale, limit) * mask[:, column]
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
    assert found.codes.dtype == torch.int8 and int(found.codes.abs().max()) <= limit
    assert not found.codes[~mask].any()
    assert bool((found.scales > 0).all() and found.scales.isfinite().all())
    by_columns = [found.scales[:, column // used] for column in range(160)]
    assert torch.equal(found.to_dense(), found.codes * torch.stack(by_columns, dim=1))


def test_the_walk_equals_one_in_float64(monkeypatch):
    hessian, dense, walked, mask, upper = layer()
    monkeypatch.setattr(rounding, "_fit_scales_", lambda *_: None)
    found = rounded(4, 24, walked, mask, upper, hessian, dense)
    exact = by_hand(walked, mask, hessian, found.scales, 24, 7)
    assert (found.codes != exact).float().mean() < 0.002  # values half-way between two integers


def test_the_walk_to_fp8_equals_one_in_float64(monkeypatch):
    hessian, dense, walked, mask, upper = layer()
    walked[0] *= 1e-4  # most codes of a row are no finer than the smallest number
    walked[0, mask[0].nonzero()[0]] = 1.0
    monkeypatch.setattr(rounding, "_fit_scales_", lambda *_: None)
    found = rounded("fp8", None, walked, mask, upper, hessian, dense)
    assert found.codes.dtype == torch.float8_e4m3fn and found.scales.shape == (48, 1)
    codes = found.codes.float()
    assert not codes[~mask].any() and bool(codes.isfinite().all())
    exact = by_hand(walked, mask, hessian, found.scales, 160, 448, nearest_e4m3)
    assert (codes != exact).float().mean() < 0.002  # values half-way between two codes
    assert torch.equal(found.to_dense(), codes * found.scales)


@pytest.mark.parametrize(
    ("bits", "group", "share"), [(8, 160, 0.7), (4, 32, 0.7), ("fp8", 160, 0.7)]
)
def test_it_errs_less_than_rounding_to_nearest(bits, group, share):
    hessian, dense, walked, mask, upper = layer()
    best = admm.refit(admm.system(hessian, DAMPING), dense, walked, mask, steps=500)
    used = None if bits == "fp8" else group
    found = rounded(bits, used, best, mask, upper, hessian, dense)
    floor = error(best, dense, hessian)
    joint = error(found.to_dense(), dense, hessian) - floor
    plain = error(nearest(best, bits, group), dense, hessian) - floor
    assert joint < share * plain


def test_fitted_scales_are_the_least_squares_ones(monkeypatch):
    hessian, dense, walked, mask, upper = layer(width=96)
    fitted = rounded(4, 32, walked, mask, upper, hessian, dense)
    monkeypatch.setattr(rounding, "_fit_scales_", lambda *_: None)
    walk = rounded(4, 32, walked, mask, upper, hessian, dense)
    assert torch.equal(walk.codes, fitted.codes)
    root = torch.linalg.cholesky(damped(hessian).double()).t()
    for row in range(4):
        columns = torch.zeros(96, 3, dtype=torch.float64)
        for group in range(3):
            span = slice(32 * group, 32 * group + 32)
            columns[span, group] = fitted.codes[row, span].double()
        exact = torch.linalg.lstsq(root @ columns, root @ dense[row].double()).solution
        assert torch.allclose(fitted.scales[row].double(), exact, rtol=1e-4)
    assert error(fitted.to_dense(), dense, hessian) < error(walk.to_dense(), dense, hessian)


def test_rows_and_groups_without_weights():
    hessian, dense, walked, mask, upper = layer(width=96)
    mask[0], mask[1, :32] = False, False
    walked = walked * mask
    found = rounded(4, 32, walked, mask, upper, hessian, dense)
    assert not found.codes[0].any() and not found.codes[1, :32].any()
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
