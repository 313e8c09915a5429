"""The pruning kernels in Triton's interpreter: a stable sort's masks, the reference's weights."""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted
from prunekernels import (
    nm_mask,
    nm_prune_,
    reference,
    rowwise_mask,
    rowwise_prune_,
    sparsegpt_update,
)
from prunekernels.pruning import tuning
from prunekernels.runtime import interpreting

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="already in the interpreter's process")

#: What makes selection hard: ties, ±0, subnormals, the ends of float32.
AWKWARD = torch.tensor(
    [-0.0, 0.0, 1e-45, 2e-45, -1e-45, 1e-40, 0.5, 1.0, 1.0, 2.0, -1.0, 3.4e38, -3.4e38, 1.2e-38]
)


def awkward(*shape):
    return AWKWARD[torch.randint(len(AWKWARD), shape)]


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@compiled
@pytest.mark.slow
def test_slow_ones_in_the_interpreter():
    run_interpreted(__file__, "-m", "slow")


def check_groups(keep, of):
    for scores in (
        torch.randn(5, of * 3),
        awkward(6, of * 3),
        awkward(2, 2, of).clamp(-3e38, 3e38).bfloat16(),
    ):
        found = nm_mask(scores, keep, of, impl="triton")
        assert torch.equal(found, reference.nm_mask(scores.double(), keep, of))


@interpreted
@pytest.mark.parametrize(("keep", "of"), [(1, 1), (2, 3), (2, 4), (7, 24)])
def test_groups(keep, of):
    check_groups(keep, of)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("of", range(2, 33))
def test_groups_of_every_size(of):
    for keep in {1, of // 3 or 1, of // 2, of - 1}:
        check_groups(keep, of)


@interpreted
@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_rows(sparsity):
    for scores in (torch.randn(4, 130), awkward(5, 130), torch.zeros(2, 50), awkward(2, 2, 9)):
        found = rowwise_mask(scores, sparsity, impl="triton")
        assert torch.equal(found, reference.rowwise_mask(scores.double(), sparsity))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sparsity", "impl"),
    [
        (0.03, "triton"),
        (0.6, "triton"),
        (0.6, "triton_words"),
        pytest.param(0.03, "triton_words", marks=pytest.mark.slow),
    ],
)
def test_rows_of_16_bits(sparsity, dtype, impl):
    """Their keys are searched without the low bits of float32, which are 0."""
    subnormal = torch.tensor(torch.finfo(dtype).smallest_normal / 4)
    for scores in (
        torch.randn(2, 700).mul(2).exp() * torch.tensor([[1.0], [-1.0]]),
        torch.randn(2, 700),
        subnormal * torch.randint(-3, 4, (2, 300)),
        torch.finfo(dtype).max * torch.randint(-1, 2, (2, 300)),
    ):
        check_16_bits(scores.to(dtype), sparsity, impl)


def check_16_bits(scores, sparsity, impl="triton_words"):
    found = rowwise_mask(scores, sparsity, impl=impl)
    assert torch.equal(found, reference.rowwise_mask(scores.double(), sparsity))
    weight = scores.clone()
    mask = rowwise_prune_(weight, sparsity, impl=impl)
    assert torch.equal(mask, reference.rowwise_mask(scores.double().abs(), sparsity))
    assert torch.equal(weight, scores.masked_fill(~mask, 0))


@pytest.fixture
def _narrow_parts(monkeypatch):
    """Have rows of words read in parts of 32, and all rows visited by one program."""
    monkeypatch.setattr(
        tuning, "words_tile", lambda words: tuning.WordsConfig(-(-words // 32), 32, 1)
    )
    monkeypatch.setattr(tuning, "rows_each", lambda rows, warps, processors: rows)


@interpreted
@pytest.mark.usefixtures("_narrow_parts")
@pytest.mark.parametrize("sparsity", [0.2, 0.6, 1.0])
def test_words_in_parts(sparsity):
    """Ties that end within a part, between two and in the last; rows unlike the one before."""
    scale = torch.tensor([1.0, 1e-30, -1e30])[:, None]
    for scores in (
        torch.randn(3, 66).abs() * scale,
        torch.randint(-1, 2, (3, 158)) * 1.0,
        torch.zeros(1, 130),
        torch.tensor([[0.0, -0.0, 1e-40, -1e-40, -1e-40, -2e-40]]).repeat(1, 12),
    ):
        check_16_bits(scores.bfloat16(), sparsity)


@interpreted
def test_words_leave_what_they_cannot_read_to_the_other_kernel():
    half = torch.randn(6, 40).bfloat16()
    for scores in (half[:, 1:], half[:, :39], half.t(), half[:, ::2], half.float(), half[:, 1:39]):
        check_16_bits(scores, 0.5)
    norms = torch.rand(40)
    found = rowwise_mask(half, 0.5, norms=norms, impl="triton_words")
    assert torch.equal(found, rowwise_mask(half.float().abs() * norms, 0.5))
    assert rowwise_mask(half[:0], 0.5, impl="triton_words").shape == (0, 40)
    assert bool(rowwise_mask(half, 0.0, impl="triton_words").all())


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.1, 0.3, 0.5, 0.7, 0.97])
def test_more_rows(sparsity):
    narrow = 1 + 1e-7 * torch.randint(0, 3, (9, 400))  # neighbouring floats
    wide = torch.randn(9, 700).mul(20).exp()
    for scores in (narrow, wide, -wide, awkward(20, 257), torch.randn(3, 2000).half()):
        found = rowwise_mask(scores, sparsity, impl="triton")
        assert torch.equal(found, reference.rowwise_mask(scores.double(), sparsity))


def check_long_rows(scores, sparsities):
    for sparsity in sparsities:
        found = rowwise_mask(scores, sparsity, impl="triton")
        assert torch.equal(found, reference.rowwise_mask(scores.double(), sparsity))
        weight = scores.clone()
        mask = rowwise_prune_(weight, sparsity, impl="triton")
        assert torch.equal(mask, reference.rowwise_mask(scores.double().abs(), sparsity))
        assert torch.equal(weight, scores.masked_fill(~mask, 0))


@pytest.fixture
def _short_parts(monkeypatch):
    """Have rows of 101 scores and more shared between programs of 128."""
    monkeypatch.setattr(tuning, "ROW_ON_CHIP", 100)
    monkeypatch.setattr(tuning, "LONG_ROW", tuning.RowConfig(128, 1))


@interpreted
@pytest.mark.usefixtures("_short_parts")
def test_long_rows():
    check_long_rows(awkward(2, 300), [0.5])


@interpreted
@pytest.mark.slow
@pytest.mark.usefixtures("_short_parts")
def test_more_long_rows():
    for scores in (torch.randn(1, 700), awkward(2, 513), torch.zeros(1, 300)):
        check_long_rows(scores, [0.01, 0.5, 0.9, 1.0])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_and_pruning_in_place(dtype):
    weight = torch.randn(12, 40).to(dtype).t()  # strided, as a Conv1D's weight
    norms = torch.rand(12) * torch.tensor([1.0, 0.0, 1e-42]).repeat(4)
    scores = weight.float().abs() * norms
    assert torch.equal(nm_mask(weight, 2, 4, norms=norms, impl="triton"), nm_mask(scores, 2, 4))
    pruned = weight.clone(memory_format=torch.preserve_format)
    mask = rowwise_prune_(pruned, 0.4, norms=norms, impl="triton")
    assert torch.equal(mask, rowwise_mask(scores, 0.4))
    assert torch.equal(pruned, weight.masked_fill(~mask, 0))
    mask = nm_prune_(weight, 1, 3, impl="triton")
    assert torch.equal(weight == 0, ~mask)


@interpreted
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_scores_without_an_order_are_refused(value, monkeypatch):
    scores = torch.ones(3, 64)
    scores[1, 5] = value
    for call in (nm_mask, rowwise_mask):
        with pytest.raises(ValueError, match=r"at index \(1, 5\)"):
            call(scores, *((2, 4) if call is nm_mask else (0.5,)), impl="triton")
    with pytest.raises(ValueError, match=r"at index \(1, 5\)"):
        rowwise_mask(scores.half(), 0.5, impl="triton_words")
    with pytest.raises(ValueError, match="overflows float32"):
        rowwise_mask(torch.full((1, 2), 3e38), 0.5, norms=torch.ones(2) * 2, impl="triton")
    monkeypatch.setattr(tuning, "ROW_ON_CHIP", 32)
    with pytest.raises(ValueError, match=r"at index \(1, 5\)"):
        rowwise_mask(scores, 0.5, impl="triton")


#: A program for some rows, and a thread for a row.
UPDATES = ("triton", "triton_thread")


def check_update(rows, width, mask, keep=0, of=0, impl="triton"):
    inputs = torch.randn(3 * width, width) @ (torch.eye(width) + torch.randn(width, width) / 8)
    hessian = inputs.double().t() @ inputs.double()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    weight = torch.randn(width, rows).t()
    exact = reference.sparsegpt_update(weight.double(), upper.double(), mask, keep, of)
    found = sparsegpt_update(weight, upper, mask, keep=keep, of=of, impl=impl)
    assert torch.equal(found.mask, exact[2])
    for got, want in zip(found[:2], exact[:2], strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
    assert bool((found.pruned[~found.mask] == 0).all())
    assert bool((found.errors[found.mask] == 0).all())


@interpreted
@pytest.mark.parametrize("impl", UPDATES)
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (5, 16)])
def test_update_chooses_groups(keep, of, impl):
    check_update(5, 48, None, keep, of, impl)


@interpreted
@pytest.mark.parametrize(
    ("impl", "rows", "width"),
    [("triton", 19, 21), ("triton_thread", 19, 21), ("triton_thread", 37, 32)],
)
def test_update_with_a_mask(rows, width, impl):
    check_update(rows, width, torch.rand(width, rows).t() < 0.5, impl=impl)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("impl", UPDATES)
@pytest.mark.parametrize(("keep", "of"), [(0, 0), (1, 2), (1, 1), (4, 8), (16, 32), (7, 24)])
def test_update_of_more_columns_than_a_program_visits(keep, of, impl):
    width = 168 if of == 24 else 160
    check_update(7, width, None if of else torch.rand(7, width) < 0.5, keep, of, impl)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("impl", UPDATES)
def test_ties_in_the_update_keep_the_lower_index(impl):
    found = sparsegpt_update(torch.ones(2, 4), torch.eye(4), keep=2, of=4, impl=impl)
    assert found.mask.tolist() == [[True, True, False, False]] * 2
    # of either sign, zeros of both, and scores that overflow, vanish or differ by one rounding
    near = 1 + torch.finfo(torch.float32).eps * torch.randint(0, 2, (5, 16))
    for weight in (AWKWARD[torch.randint(len(AWKWARD), (5, 16))], near, torch.zeros(5, 16)):
        for keep, of in ((1, 2), (5, 8)):
            found = sparsegpt_update(weight, torch.eye(16), keep=keep, of=of, impl=impl)
            exact = sparsegpt_update(weight, torch.eye(16), keep=keep, of=of, impl="eager")
            for got, want in zip(found, exact, strict=True):
                assert torch.equal(got, want)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("chosen", ["mask", "groups"])
def test_both_updates_take_the_same_sums(chosen):
    """In the same order: of any strides, to the last bit."""
    upper = (torch.eye(33) + torch.randn(33, 33) / 8).triu()[:32, :32]
    weight = torch.randn(5, 64)[:, ::2] * torch.tensor([1e-38, 1e-30, 1, 1e10, 1e30])[:, None]
    pattern = {"mask": torch.rand(5, 32) < 0.5} if chosen == "mask" else {"keep": 3, "of": 8}
    for factor in (upper, upper.t().contiguous().t()):
        plain, thread = (sparsegpt_update(weight, factor, **pattern, impl=i) for i in UPDATES)
        for left, right in zip(plain, thread, strict=True):
            assert torch.equal(left, right)
