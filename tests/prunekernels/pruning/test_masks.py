"""nm_mask and rowwise_mask: exact counts, ties, and agreement with a stable sort."""

from __future__ import annotations

import pytest
import torch
from prunekernels import nm_mask, nm_prune_, reference, rowwise_mask, rowwise_prune_
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tied(*shape: int) -> Tensor:
    """Scores of which many are equal, ±0 among them."""
    values = torch.tensor([-0.0, 0.0, 0.5, 1.0, 1.0, 2.0])
    return values[torch.randint(len(values), shape)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("keep", "of"),
    [
        *((1, 1), (1, 2), (1, 4), (2, 4), (3, 4), (4, 4), (4, 8), (5, 16), (7, 24), (16, 32)),
        *((24, 25), (25, 25), (1, 40), (63, 64), (50, 200)),
    ],
)
def test_nm_matches_a_stable_sort(keep: int, of: int, dtype: torch.dtype) -> None:
    for scores in (torch.randn(13, of * 11), tied(13, of * 11), torch.randn(3, 2, of)):
        scores = scores.to(dtype)
        mask = nm_mask(scores, keep, of)
        assert mask.dtype == torch.bool and mask.shape == scores.shape
        assert torch.equal(mask, reference.nm_mask(scores.double(), keep, of))
        assert bool((mask.unflatten(-1, (-1, of)).sum(-1) == keep).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 0.5, 0.7, 0.99, 1.0])
def test_rowwise_matches_a_stable_sort(sparsity: float, dtype: torch.dtype) -> None:
    for scores in (torch.randn(9, 130), tied(9, 130), torch.zeros(3, 50), torch.randn(2, 3, 10)):
        scores = scores.to(dtype)
        mask = rowwise_mask(scores, sparsity)
        assert mask.dtype == torch.bool and mask.shape == scores.shape
        assert torch.equal(mask, reference.rowwise_mask(scores.double(), sparsity))


def test_ties_keep_the_lower_index() -> None:
    assert nm_mask(torch.zeros(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]
    scores = torch.tensor([[0.0, -0.0, 1.0, 0.0, 0.0, -1.0]])
    assert rowwise_mask(scores, 0.5).tolist() == [[True, True, True, False, False, False]]
    assert nm_mask(torch.tensor([[-0.0, 0.0, -0.0]]), 2, 3).tolist() == [[True, True, False]]


def test_counts_never_exceed_the_sparsity_asked_for() -> None:
    for width in (1, 3, 7, 10, 97, 1000):
        for sparsity in (0.05, 0.1, 0.3, 0.5, 0.7, 0.9):
            pruned = (~rowwise_mask(tied(4, width), sparsity)).sum(-1)
            assert bool((pruned == int(sparsity * width + 1e-9)).all()), (width, sparsity)
    assert int((~rowwise_mask(torch.randn(10), 0.7)).sum()) == 7  # 0.7·10 is 6.999…


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_scores_without_an_order_are_refused(value: float) -> None:
    """An infinite score is an overflow: it would tie with every other one."""
    word = "NaN" if value != value else "infinite"
    bad = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, value, 3.0, 4.0]])
    for call in (
        lambda: nm_mask(bad, 2, 4),
        lambda: rowwise_mask(bad, 0.5),
        lambda: rowwise_mask(bad, 0.0),
        lambda: nm_prune_(bad, 2, 4),
        lambda: rowwise_prune_(bad, 0.5, norms=torch.ones(4)),
    ):
        with pytest.raises(ValueError, match=rf"scores are {word} at index \(1, 1\)"):
            call()
    with pytest.raises(ValueError, match=rf"norms are {word} at index \(1,\)"):
        rowwise_mask(torch.ones(2, 2), 0.5, norms=torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match="overflows float32"):
        nm_mask(torch.full((1, 2), 3e38), 1, 2, norms=torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_score_as_the_matrix_of_scores_would(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 96).to(dtype)
    weight[3] = tied(96).to(dtype)
    norms = torch.rand(96) * torch.tensor([1.0, 0.0, 1e-30, 1e-44]).repeat(24)
    scores = weight.float().abs() * norms
    assert torch.equal(nm_mask(weight, 2, 4, norms=norms), nm_mask(scores, 2, 4))
    for sparsity in (0.3, 0.5, 0.9):
        mask = rowwise_mask(weight, sparsity, norms=norms)
        assert torch.equal(mask, reference.rowwise_mask(scores.double(), sparsity))
    assert not torch.equal(mask, rowwise_mask(weight.abs(), 0.9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_in_place_writes_zeros_where_the_mask_says(dtype: torch.dtype) -> None:
    norms = torch.rand(24)
    for norm in (None, norms):
        for call in (
            lambda w, norm=norm: nm_prune_(w, 3, 8, norms=norm),
            lambda w, norm=norm: rowwise_prune_(w, 0.6, norms=norm),
        ):
            weight = torch.randn(24, 9).to(dtype).t()  # strided, as a Conv1D's weight
            dense = weight.clone()
            mask = call(weight)
            assert torch.equal(weight, dense.masked_fill(~mask, 0))
            scores = dense.float().abs() * (1 if norm is None else norm)
            wanted = (
                reference.nm_mask(scores.double(), 3, 8)
                if int(mask.sum()) == 81
                else reference.rowwise_mask(scores.double(), 0.6)
            )
            assert torch.equal(mask, wanted)


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.999])
def test_long_rows_whatever_their_order(sparsity: float) -> None:
    """A sample brackets a long row's cut; where it misleads, the result is still exact."""
    width = 200_000
    rising = torch.arange(width, dtype=torch.float32)
    periodic = torch.zeros(width)
    periodic[:: width // (1 << 13)] = torch.rand(len(periodic[:: width // (1 << 13)]))
    for scores in (rising, rising.flip(0), periodic, torch.randn(width).bfloat16(), rising % 3):
        mask = rowwise_mask(scores[None], sparsity)
        assert torch.equal(mask, reference.rowwise_mask(scores[None].double(), sparsity))


def test_a_whole_matrix_as_one_row() -> None:
    """The per-matrix case: ten million scores, in float32 and with ties."""
    scores = torch.randn(1, 10_000_000)
    mask = rowwise_mask(scores, 0.5)
    assert int(mask.sum()) == 5_000_000
    assert float(scores[mask].min()) > float(scores[~mask].max())
    coarse = scores.bfloat16()
    mask = rowwise_mask(coarse, 0.3)
    assert int(mask.sum()) == 7_000_000
    cut = float(coarse[~mask].max())
    assert float(coarse[mask].min()) == cut
    equal = (coarse == cut)[0]
    kept, dropped = mask[0][equal], equal.nonzero().squeeze(1)
    assert bool(kept[: int(kept.sum())].all()) and dropped.numel() > kept.sum()


def test_strides_leading_dimensions_and_no_rows() -> None:
    scores = torch.randn(6, 8, 12)
    for view in (scores.transpose(0, 1), scores[:, ::2], scores.transpose(1, 2)[..., ::2]):
        assert torch.equal(nm_mask(view, 2, 4), reference.nm_mask(view.double(), 2, 4))
        assert torch.equal(rowwise_mask(view, 0.5), reference.rowwise_mask(view.double(), 0.5))
    assert nm_mask(torch.empty(0, 8), 2, 4).shape == (0, 8)
    assert rowwise_mask(torch.empty(0, 8), 0.5).shape == (0, 8)
    assert nm_mask(torch.empty(3, 0), 2, 4).shape == (3, 0)
    assert rowwise_mask(torch.empty(3, 0), 0.5).shape == (3, 0)
    assert rowwise_mask(torch.randn(7), 0.5).shape == (7,)


def test_opcheck_and_fullgraph_compile() -> None:
    scores = torch.randn(5, 24)
    ops, norms = torch.ops.prunekernels, torch.rand(24)
    for norm in (None, norms):
        torch.library.opcheck(ops.nm_mask.default, (scores, norm, 2, 4, "auto"))
        torch.library.opcheck(ops.rowwise_mask.default, (scores, norm, 12, "auto"))
        torch.library.opcheck(ops.nm_prune_.default, (scores.clone(), norm, 2, 4, "auto"))
        torch.library.opcheck(ops.rowwise_prune_.default, (scores.clone(), norm, 12, "auto"))
    compiled = torch.compile(
        lambda s: (nm_mask(s, 2, 4), rowwise_mask(s, 0.3)), fullgraph=True, backend="eager"
    )
    for found, wanted in zip(
        compiled(scores), (nm_mask(scores, 2, 4), rowwise_mask(scores, 0.3)), strict=True
    ):
        assert torch.equal(found, wanted)


NAN = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, float("nan"), 3.0, 4.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm_mask(torch.zeros(2, 6), 2, 4), r"\(2, 6\) is not a multiple of of=4; pad"),
        (lambda: nm_mask(torch.zeros(2, 8), 5, 4), "keep=5 of=4"),
        (lambda: nm_mask(torch.zeros(2, 8), 0, 4), "keep=0 of=4"),
        (lambda: nm_mask(torch.zeros(2, 8), 0, 0), "keep=0 of=0"),
        (lambda: nm_mask(torch.tensor(1.0), 2, 4), "multiple"),
        (lambda: nm_mask(NAN, 2, 4), r"NaN at index \(1, 1\)"),
        (lambda: nm_mask(torch.zeros(2, 8).long(), 2, 4), "got torch.int64"),
        (lambda: nm_mask(torch.zeros(2, 8), 2, 4, norms=torch.ones(4)), r"float32 of shape \(4,\)"),
        (lambda: rowwise_mask(torch.zeros(2, 8), 0.5, norms=torch.ones(8).half()), "torch.float16"),
        (lambda: rowwise_mask(NAN, 0.5), r"NaN at index \(1, 1\)"),
        (lambda: rowwise_mask(torch.zeros(2, 8), 50), "share between 0 and 1, got 50"),
        (lambda: rowwise_mask(torch.zeros(2, 8), -0.1), "got -0.1"),
        (lambda: rowwise_mask(torch.zeros(2, 8), float("nan")), "got nan"),
        (lambda: rowwise_mask(torch.tensor(1.0), 0.5), "scalar"),
        (lambda: rowwise_mask(torch.zeros(2, 8), 0.5, impl="gpu"), "auto, eager, triton"),
        (lambda: nm_mask(torch.zeros(2, 8), 2, 4, impl="triton"), "impl='triton' cannot run"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
