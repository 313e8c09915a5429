"""OWL: outliers counted by hand, sums that are exact, and the pass over the dense model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_models import inputs_of, prune, refs_of

from prunekit.errors import PrunekitError
from prunekit.pruning import OWL, Magnitude, Recipe, SparseGPT, Wanda, budgets
from prunekit.pruning.budgets import Part


def test_outliers_are_counted_over_the_layer():
    first = torch.tensor([[1.0, 1.0, 1.0, 20.0]])  # the layer's mean is 3
    second = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert budgets.outlier_share([first, second], 5.0) == 1 / 8
    assert budgets.outlier_share([first, second], 7.0) == 0.0


def test_sparsities_spread_over_twice_lambda_around_the_mean():
    found = budgets.sparsities([0.0, 0.01, 0.04], [10, 10, 10], 0.7, 0.08)
    assert found[0] - found[2] == pytest.approx(0.16)
    assert found[0] - found[1] == pytest.approx(0.04)
    assert sum(found) / 3 == pytest.approx(0.7)


def test_sparsities_of_unequal_layers_and_at_the_ends():
    found = budgets.sparsities([0.0, 1.0], [30, 10], 0.6, 0.08)
    assert (30 * found[0] + 10 * found[1]) / 40 == pytest.approx(0.6)
    found = budgets.sparsities([0.0, 1.0], [10, 10], 0.96, 0.08)
    assert found == pytest.approx([1.0, 0.92])
    assert budgets.sparsities([0.5, 0.5], [10, 20], 0.3, 0.08) == pytest.approx([0.3, 0.3])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.floats(0, 1)),
        min_size=1,
        max_size=8,
    ),
    st.integers(2, 30),
)
def test_apportioned_steps_add_up(described, most):
    parts = [
        Part({f"{index}.{place}": unit for place, unit in enumerate(units)}, share * most, most)
        for index, (units, share) in enumerate(described)
    ]
    total = int(sum(part.wanted * part.unit for part in parts))
    steps = budgets.apportion(parts, total)
    units = {name: unit for part in parts for name, unit in part.units.items()}
    found = sum(steps[name] * unit for name, unit in units.items())
    room = [unit for name, unit in units.items() if steps[name] < most]
    assert found <= total and all(0 <= count <= most for count in steps.values())
    assert total - found < min(room, default=1)


def zeros(model):
    return {ref.name: int((ref.matrix == 0).sum()) for ref in refs_of(model)}


@pytest.mark.parametrize(
    "method", [Wanda(0.6), Wanda(0.6, variant=True), SparseGPT(0.6), Magnitude(0.6)], ids=str
)
def test_layers_differ_and_the_total_is_exact(tiny, token_ids, method):
    model = tiny("llama")
    report = prune(model, Recipe({"*": method}, budget=OWL(spread=0.2)), token_ids)
    counts = zeros(model)
    size = sum(matrix.size for matrix in report.matrices)
    wanted = int(0.6 * size + 1e-9)
    rows = min(ref.matrix.shape[0] for ref in refs_of(model))
    by_rows = isinstance(method, Wanda) and not method.variant
    assert 0 <= wanted - sum(counts.values()) < (rows if by_rows else 1)
    by_layer = [
        sum(matrix.zeros for matrix in report.matrices if matrix.layer == layer)
        / sum(matrix.size for matrix in report.matrices if matrix.layer == layer)
        for layer in range(len(model.model.layers))
    ]
    assert max(by_layer) - min(by_layer) == pytest.approx(0.4, abs=0.03)


def test_the_layer_with_most_outliers_keeps_most(tiny, token_ids):
    model = tiny("llama")
    inputs = inputs_of(model, token_ids)  # of the dense model
    shares = []
    for layer in range(len(model.model.layers)):
        scores = [
            ref.matrix.abs() * inputs[ref.name].double().square().mean(0).sqrt().float()
            for ref in refs_of(model)
            if ref.layer == layer
        ]
        shares.append(budgets.outlier_share(scores, 3.0))
    report = prune(model, Recipe({"*": SparseGPT()}, budget=OWL(3.0, 0.2)), token_ids)
    left = [
        sum(matrix.kept for matrix in report.matrices if matrix.layer == layer)
        for layer in range(len(shares))
    ]
    assert len(set(shares)) == len(shares)
    order = sorted(range(len(shares)), key=shares.__getitem__)
    assert order == sorted(range(len(shares)), key=left.__getitem__)


def test_mixed_patterns_keep_n_of_eight(tiny, token_ids):
    model = tiny("llama")
    recipe = Recipe({"*": Wanda(pattern="6:8")}, budget=OWL(spread=0.3))
    report = prune(model, recipe, token_ids)
    patterns = {matrix.layer: matrix.pattern for matrix in report.matrices}
    assert len(set(patterns.values())) > 1
    for ref in refs_of(model):
        matrix = next((part for part in report.matrices if part.name == ref.name), None)
        kept = 8 if matrix is None else int(matrix.pattern.partition(":")[0])
        groups = (ref.matrix != 0).view(-1, 8).sum(1)
        assert bool((groups == kept).all()) and (ref.name in report.left_dense) == (kept == 8)
    assert sum(zeros(model).values()) * 4 == sum(ref.matrix.numel() for ref in refs_of(model))


def test_rules_keep_their_own_totals(tiny, token_ids):
    model = tiny("llama")
    rules = {"*.mlp.*": SparseGPT(0.7), "*": SparseGPT(0.3)}
    prune(model, Recipe(rules, budget=OWL(spread=0.2)), token_ids)
    for part, share in (("mlp", 0.7), ("attn", 0.3)):
        refs = [ref for ref in refs_of(model) if ref.sublayer == part]
        size = sum(ref.matrix.numel() for ref in refs)
        assert sum(int((ref.matrix == 0).sum()) for ref in refs) == int(share * size + 1e-9)


def test_a_killed_run_goes_on_to_the_same_model(tiny, token_ids, tmp_path):
    recipe = Recipe({"*": Wanda(0.6)}, budget=OWL())
    whole, again = tiny("llama"), tiny("llama")
    prune(whole, recipe, token_ids, journal=tmp_path / "journal")
    (tmp_path / "journal" / "block-0003.safetensors").unlink()
    prune(again, recipe, token_ids, journal=tmp_path / "journal")
    for first, second in zip(refs_of(whole), refs_of(again), strict=True):
        assert torch.equal(first.matrix, second.matrix)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("owl", OWL()),
        ("uniform", None),
        (None, None),
        ({"outlier": 3, "spread": 0.1}, OWL(3, 0.1)),
    ],
)
def test_budgets_as_plain_data(setting, found):
    recipe = Recipe.from_dict({"method": "wanda", "budget": setting})
    assert recipe.budget == found and Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fair", "budget can't be 'fair': use uniform, owl, or numbers for outlier, spread"),
        ({"lambda": 1}, "budget can't be"),
        ({"outlier": "5"}, "budget can't be"),
        ({"spread": 1.5}, "spread 1.5: use an outlier above 0"),
    ],
)
def test_unusable_budgets(setting, message):
    with pytest.raises(PrunekitError, match=message):
        Recipe.from_dict({"method": "wanda", "budget": setting})


def test_budgets_in_python_are_owl_itself():
    for budget in ("owl", {"spread": 0.1}, OWL):
        with pytest.raises(PrunekitError, match=r"budget can't be .*: give OWL\(\), or leave"):
            Recipe({"*": Wanda()}, budget=budget)
    for fields in ({"outlier": None}, {"spread": "0.1"}):
        with pytest.raises(PrunekitError, match="use an outlier above 0"):
            OWL(**fields)


def test_owl_needs_calibration(tiny):
    with pytest.raises(PrunekitError, match="OWL needs calibration"):
        prune(tiny("llama"), Recipe({"*": Magnitude()}, budget=OWL()))
