"""vector_stats against the float64 reference and hand-made geometry."""

from __future__ import annotations

import math

import pytest
import torch
from prunekernels import reference, vector_stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 576, 100_003])
def test_matches_reference(width: int, dtype: torch.dtype) -> None:
    base = torch.randn(7, width)
    for noise in (2.0, 0.1, 1e-4):
        pair = base.to(dtype), (base + noise * torch.randn(7, width)).to(dtype)
        found = vector_stats(*pair).as_dict()
        truth = reference.vector_stats(pair[0].double(), pair[1].double())
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            torch.testing.assert_close(
                found[name].double(), value, rtol=2e-7, atol=1e-7 * (width == 1) + 1e-15, msg=name
            )


def test_tiny_angles_survive() -> None:
    """1−cos of 5e-13, where float32 cosines are all 1."""
    base, other = torch.zeros(1, 64), torch.zeros(1, 64)
    base[0, 0] = other[0, 0] = 1.0
    other[0, 1] = 1e-6
    stats = vector_stats(base, other)
    assert float(stats.cosine) == 1.0
    assert float(stats.one_minus_cosine) == pytest.approx(5e-13, rel=1e-6)
    assert float(stats.one_minus_cosine_estimate) == pytest.approx(5e-13, rel=1e-6)


def test_parallel_and_orthogonal_parts_by_hand() -> None:
    base = torch.tensor([[3.0, 4.0]])
    other = base + 0.5 * base + 0.2 * torch.tensor([[-4.0, 3.0]])
    stats = vector_stats(base, other)
    assert float(stats.alpha) == pytest.approx(0.5)
    assert float(stats.parallel_ratio) == pytest.approx(0.5)
    assert float(stats.orthogonal_ratio) == pytest.approx(0.2)
    assert float(stats.norm_base) == pytest.approx(5.0)
    assert float(stats.cosine) == pytest.approx(1.5 / math.hypot(1.5, 0.2))
    assert float(stats.one_minus_cosine_estimate) == pytest.approx(0.02)
    shorter = vector_stats(base, 0.25 * base)
    assert float(shorter.alpha) == pytest.approx(-0.75)
    assert float(shorter.parallel_ratio) == pytest.approx(0.75)
    assert float(shorter.cosine) == 1.0


def test_identical_zero_and_opposite_vectors() -> None:
    base = torch.randn(3, 50)
    base[1] = 0
    same = vector_stats(base, base.clone())
    assert same.cosine.tolist() == [1.0, 1.0, 1.0]
    for name in ("one_minus_cosine", "alpha", "parallel_ratio", "orthogonal_ratio"):
        assert same.as_dict()[name].tolist() == [0.0, 0.0, 0.0], name
    opposite = vector_stats(base, -base)
    assert opposite.cosine.tolist() == [-1.0, 1.0, -1.0]
    assert opposite.one_minus_cosine.tolist() == [2.0, 0.0, 2.0]
    gone = vector_stats(base[:1], torch.zeros(1, 50))
    assert float(gone.cosine) == 0.0 and float(gone.alpha) == -1.0
    assert float(gone.orthogonal_ratio) == pytest.approx(0.0, abs=1e-7)
    born = vector_stats(torch.zeros(1, 50), base[:1])
    assert float(born.cosine) == 0.0 and math.isnan(float(born.alpha))


def test_a_choice_of_fields_gives_the_same_and_nothing_else() -> None:
    base = torch.randn(2, 300, 70)
    other = base + 0.1 * torch.randn_like(base)
    other[0, :5], base[0, 5:9] = base[0, :5], 0.0
    whole = vector_stats(base, other).as_dict()
    for fields in (("cosine",), ("norm_other", "alpha"), ("orthogonal_ratio",), tuple(whole)):
        found = vector_stats(base, other, fields=fields).as_dict()
        assert set(found) == set(fields)
        for name, value in found.items():
            torch.testing.assert_close(value, whole[name], rtol=0, atol=0, equal_nan=True, msg=name)
    with pytest.raises(AttributeError, match="fields="):
        _ = vector_stats(base, other, fields=("cosine",)).alpha
    for wrong in ((), "cosine", ("angle",)):
        with pytest.raises(ValueError, match="fields"):
            vector_stats(base, other, fields=wrong)
