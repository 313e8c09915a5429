"""sparsegpt_update on a CPU: the formula in float64, layouts, contract, bad input."""

from __future__ import annotations

import pytest
import torch
from prunekernels import reference, sparsegpt_update
from torch import Tensor


def inverse_factor(width: int) -> Tensor:
    """U of a correlated Hessian, float32."""
    inputs = torch.randn(3 * width, width) @ (torch.eye(width) + torch.randn(width, width) / 8)
    hessian = inputs.double().t() @ inputs.double()
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()


PATTERNS = [(1, 2), (2, 4), (4, 8), (3, 4), (16, 32), (1, 1)]


def check(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Same mask; weights and errors to 1e-4, zeros exact."""
    (pruned, errors, mask), (want_pruned, want_errors, want_mask) = found, exact
    assert torch.equal(mask, want_mask)
    assert (pruned - want_pruned).norm() <= 1e-4 * want_pruned.norm()
    assert (errors - want_errors).norm() <= 1e-4 * want_errors.norm()
    assert bool((pruned[~mask] == 0).all()) and bool((errors[mask] == 0).all())


@pytest.mark.parametrize("width", [1, 5, 32, 33, 128, 160])
@pytest.mark.parametrize("rows", [1, 37])
def test_a_given_mask(width: int, rows: int) -> None:
    weight, upper = torch.randn(rows, width), inverse_factor(width)
    for density in (0.0, 0.5, 1.0):
        mask = torch.rand(rows, width) < density
        exact = reference.sparsegpt_update(weight.double(), upper.double(), mask)
        check(sparsegpt_update(weight, upper, mask), exact)


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
@pytest.mark.parametrize("width", [32, 96, 160])
def test_groups_chosen_inside(keep: int, of: int, width: int) -> None:
    weight, upper = torch.randn(23, width), inverse_factor(width)
    exact = reference.sparsegpt_update(weight.double(), upper.double(), None, keep, of)
    found = sparsegpt_update(weight, upper, keep=keep, of=of)
    check(found, exact)
    assert bool((found.mask.unflatten(1, (-1, of)).sum(-1) == keep).all())


def test_equal_scores_keep_the_lower_index() -> None:
    found = sparsegpt_update(torch.ones(1, 4), torch.eye(4), keep=2, of=4)
    assert found.mask.tolist() == [[True, True, False, False]]
    assert found.pruned.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_strides_leave_the_result_and_the_input_alone() -> None:
    weight, upper = torch.randn(19, 40), inverse_factor(40)
    mask = torch.rand(19, 40) < 0.4
    plain = sparsegpt_update(weight, upper, mask)
    kept = weight.clone()
    transposed = sparsegpt_update(weight.t().contiguous().t(), upper.t().contiguous().t(), mask)
    for left, right in zip(plain, transposed, strict=True):
        assert torch.equal(left, right)
    assert torch.equal(weight, kept)
    assert plain.pruned.shape == (19, 40) and sparsegpt_update(
        weight[:0], upper, mask[:0]
    ).pruned.shape == (0, 40)


def test_opcheck_and_fullgraph_compile() -> None:
    weight, upper, mask = torch.randn(6, 8), inverse_factor(8), torch.rand(6, 8) < 0.5
    op = torch.ops.prunekernels.sparsegpt_update.default
    torch.library.opcheck(op, (weight, upper, mask, 0, 0, "auto"))
    torch.library.opcheck(op, (weight, upper, None, 2, 4, "auto"))
    compiled = torch.compile(
        lambda w: sparsegpt_update(w, upper, keep=2, of=4).pruned, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(weight), sparsegpt_update(weight, upper, keep=2, of=4).pruned)


W, U = torch.zeros(2, 8), torch.eye(8)
MASK = torch.ones(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsegpt_update(W.half(), U, MASK), "must be float32, got torch.float16"),
        (lambda: sparsegpt_update(W, U[:4], MASK), r"\(2, 8\) and \(4, 8\)"),
        (lambda: sparsegpt_update(W, U, MASK[:1]), r"mask must be bool of shape \(2, 8\)"),
        (lambda: sparsegpt_update(W, U, MASK, keep=2, of=4), "contradict"),
        (lambda: sparsegpt_update(W, U), "got 0:0"),
        (lambda: sparsegpt_update(W, U, keep=2, of=3), "divide the 8 columns, got 2:3"),
        (lambda: sparsegpt_update(W, U, MASK, impl="triton"), "impl='triton' cannot run"),
        (
            lambda: sparsegpt_update(W, U, MASK, impl="thread"),
            "impl must be one of .*triton_thread",
        ),
        (
            lambda: sparsegpt_update(
                torch.zeros(2, 64), torch.eye(64), keep=32, of=64, impl="triton_thread"
            ),
            "impl='triton_thread' cannot run: its groups hold at most 32, got of=64",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
