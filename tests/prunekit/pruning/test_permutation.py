"""RIA's score by hand; orders of channels that keep more and leave what a model computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from pruned_models import prune, refs_of

from prunekit.errors import PrunekitError
from prunekit.pruning import RIA, Recipe, SparseGPT, Wanda, importance, permutation


def test_relative_importance_by_hand():
    matrix = torch.tensor([[1.0, -3.0], [2.0, 2.0], [0.0, 0.0]])
    mean_square = torch.tensor([16.0, 1.0], dtype=torch.float64)
    found = importance.relative(matrix, mean_square, 0.5)
    rows = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2], [0, 0]])
    columns = torch.tensor([[1 / 3, 3 / 5], [2 / 3, 2 / 5], [0, 0]])
    assert torch.allclose(found, (rows + columns) * torch.tensor([2.0, 1.0]))
    # Wanda would rank the first column's weights the other way round
    assert found[0, 0] < found[0, 1] and importance.wanda(matrix, mean_square)[0, 0] == 4.0


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (3, 4), (4, 8), (8, 16)])
def test_orders_keep_more(keep, of):
    scores = torch.rand(24, 64).pow(4) * torch.rand(64).pow(3)
    order = permutation.permutation(scores, keep, of)
    assert torch.equal(order.sort().values, torch.arange(64))
    before = permutation.kept_score(scores, keep, of)
    assert permutation.kept_score(scores[:, order], keep, of) > before


def test_an_order_is_as_good_as_the_best_of_all():
    scores = torch.rand(5, 4).pow(3)
    orders = itertools.permutations(range(4))
    best = max(permutation.kept_score(scores[:, list(order)], 1, 2) for order in orders)
    order = permutation.permutation(scores, 1, 2)
    assert permutation.kept_score(scores[:, order], 1, 2) == pytest.approx(best)


def test_what_a_channel_adds_is_what_its_group_then_keeps():
    scores = torch.rand(7, 16)
    groups = torch.randperm(16).view(4, 4)
    gains = permutation._gains(scores, groups[:, 1:], groups[:, 0], 2)
    for group in range(4):
        for column in range(4):
            columns = torch.cat((groups[column, :1], groups[group, 1:]))
            kept = permutation.kept_score(scores[:, columns], 2, 4)
            without = scores[:, groups[group, 1:]].topk(2).values.sum()
            assert float(gains[group, column]) == pytest.approx(kept - float(without), abs=1e-4)


def test_an_order_never_keeps_less():
    scores = torch.tensor([[4.0, 3.0, 0.0, 0.0, 4.0, 3.0, 0.0, 0.0]])
    assert torch.equal(permutation.permutation(scores, 2, 4), torch.arange(8))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_model_computes_the_same(tiny, token_ids, monkeypatch, name):
    model = tiny(name)
    before = model(token_ids).logits
    down = [ref.matrix.clone() for ref in refs_of(model) if "down" in ref.name]
    keep_all = lambda scores, pattern, per_row: torch.ones_like(scores, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(importance, "select", keep_all)
    prune(model, RIA(pattern="2:4", permute=True), token_ids)
    after = [ref.matrix for ref in refs_of(model) if "down" in ref.name]
    assert not any(torch.equal(*pair) for pair in zip(down, after, strict=True))
    assert torch.allclose(model(token_ids).logits, before, atol=2e-5)


def test_permuted_groups_err_less(tiny, token_ids):
    errors = []
    for permute in (False, True):
        recipe = Recipe({"*.0.mlp.*": RIA(pattern="2:4", permute=permute)})
        report = prune(tiny("llama"), recipe, token_ids)
        errors.append(report.matrices[-1].relative_error)
        assert "down" in report.matrices[-1].name
    assert errors[1] < errors[0]


def test_a_killed_run_goes_on_to_the_same_model(tiny, token_ids, tmp_path):
    # gate and up stay dense, and still get the order
    recipe = Recipe({"*.down_proj": RIA(pattern="2:4", permute=True), "*.q_proj": SparseGPT()})
    whole, again = tiny("llama"), tiny("llama")
    prune(whole, recipe, token_ids, journal=tmp_path / "journal")
    for block in (2, 3):
        (tmp_path / "journal" / f"block-000{block}.safetensors").unlink()
    prune(again, recipe, token_ids, journal=tmp_path / "journal")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize(("name", "rule"), [("llama", "*.q_proj"), ("opt", "*"), ("mixtral", "*")])
def test_what_can_not_be_folded_is_refused(tiny, token_ids, name, rule):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = Recipe({rule: RIA(pattern="2:4", permute=True), "*": Wanda()})
    recipe = recipe if rule != "*" else Recipe({rule: RIA(pattern="2:4", permute=True)})
    with pytest.raises(PrunekitError, match="RIA can't permute the inputs of"):
        prune(model, recipe, token_ids)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"power": -1.0}, "power -1.0 is negative"), ({"permute": True}, "use N:M, such as 2:4")],
)
def test_impossible_settings(settings, message):
    with pytest.raises(PrunekitError, match=message):
        RIA(**settings)
