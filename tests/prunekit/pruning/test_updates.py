"""`update="admm"` in the pipeline: any method's masks, better values, refusals."""

from __future__ import annotations

import pytest
import torch
from pruned_models import METHODS, prune, refs_of

from prunekit.errors import PrunekitError
from prunekit.pruning import ADMM, Magnitude, Recipe, SparseGPT, Wanda

METHODS_AND_PATTERNS = [
    (method, pattern)
    for method in METHODS
    for pattern in ("unstructured", "2:4")
    if method != "admm"  # which refits anyway
]


@pytest.fixture
def many_tokens():
    return torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(9))


def first_layer(recipe):
    """All of the model's first layer, whose inputs no pruning has changed yet."""
    return Recipe({"*.0.*": recipe})


@pytest.mark.parametrize(("method", "pattern"), METHODS_AND_PATTERNS)
def test_every_method_keeps_its_masks_and_errs_less(tiny, many_tokens, method, pattern):
    found = {}
    for update in (None, "admm"):
        model = tiny("llama")
        recipe = first_layer(METHODS[method](pattern=pattern, update=update))
        report = prune(model, recipe, many_tokens)
        masks = {ref.name: ref.matrix != 0 for ref in refs_of(model)}
        found[update] = (report, masks)
    (plain, masks), (refitted, same) = found[None], found["admm"]
    assert all(torch.equal(masks[name], same[name]) for name in masks)
    for before, after in zip(plain.matrices, refitted.matrices, strict=True):
        assert (after.kept, after.zeros) == (before.kept, before.zeros)
        assert after.relative_error < before.relative_error


def test_zeros_of_an_earlier_pruning_stay(tiny, many_tokens):
    model = tiny("llama")
    for ref in refs_of(model):
        ref.matrix[:, ::3] = 0  # more in some groups than 2:4 prunes
        ref.matrix[:, 1::4] = 0
    before = {ref.name: ref.matrix == 0 for ref in refs_of(model)}
    prune(model, Wanda(pattern="2:4", update="admm"), many_tokens)
    assert all(bool((ref.matrix[before[ref.name]] == 0).all()) for ref in refs_of(model))


def test_an_expert_that_few_tokens_reach_is_noted(tiny, many_tokens):
    model = tiny("mixtral")
    report = prune(model, Wanda(update="admm"), many_tokens[:2])
    few = [matrix for matrix in report.matrices if matrix.note]
    assert all("experts" in matrix.name for matrix in few)
    assert any("tokens reached it: not updated" in matrix.note for matrix in few)


@pytest.mark.parametrize(
    ("method", "tokens", "message"),
    [
        (Magnitude(update="admm"), None, "magnitude needs calibration"),
        (
            SparseGPT(update="admm"),
            (2, 12),
            "of .*down_proj: calibrate on at least 48 tokens, not 24",
        ),
        (ADMM(), (2, 12), "admm as set fits 48 weights a row"),
    ],
)
def test_refusals_leave_the_model_alone(tiny, method, tokens, message):
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = None if tokens is None else torch.full(tokens, 5)
    with pytest.raises(PrunekitError, match=message):
        prune(model, method, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
