"""Patterns and recipes: what is refused, which rule a matrix gets, plain data."""

from __future__ import annotations

import json

import pytest

from prunekit.errors import PrunekitError
from prunekit.pruning import (
    DEFAULT_IGNORE,
    Magnitude,
    Recipe,
    SparseGPT,
    Wanda,
    method_from_dict,
    patterns,
)


def test_patterns():
    assert patterns.parse("unstructured") == patterns.Pattern("unstructured", 0.5)
    assert patterns.parse("unstructured", 0.7).sparsity == 0.7
    assert patterns.parse("2:4") == patterns.Pattern("2:4", 0.5, 2, 4)
    assert patterns.parse("1:4", 0.75).sparsity == 0.75
    assert patterns.parse("3:32").sparsity == 1 - 3 / 32


@pytest.mark.parametrize(
    ("pattern", "sparsity", "message"),
    [
        ("5:4", None, "keeps 5 of 4: use N:M with 0 < N < M"),
        ("0:4", None, "keeps 0 of 4"),
        ("4:4", None, "keeps 4 of 4"),
        ("2:-4", None, "'2:-4' is unknown"),
        ("half", None, "use 'unstructured', or 'N:M'"),
        ("unstructured", 0.0, r"sparsity 0.0 is outside \(0, 1\)"),
        ("unstructured", 1.0, "outside"),
        ("unstructured", float("nan"), "outside"),
        ("2:4", 0.6, "sparsity 0.6 contradicts pattern '2:4', which prunes 0.5"),
    ],
)
@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
def test_impossible_patterns(method, pattern, sparsity, message):
    with pytest.raises(PrunekitError, match=message):
        method(pattern=pattern, sparsity=sparsity)


@pytest.mark.parametrize(
    "settings", [{"block": 0}, {"damping": 0.0}, {"damping": float("inf")}], ids=str
)
def test_impossible_sparsegpt_settings(settings):
    with pytest.raises(PrunekitError, match="use for example"):
        SparseGPT(**settings)


def test_recipes_assign_the_first_rule_that_matches():
    names = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("up", "gate")]
    recipe = Recipe({"*.1.mlp.up": Magnitude(), "*": Wanda()}, ignore=("*.0.mlp.up",))
    assert recipe.assign(names) == {
        "model.layers.0.mlp.gate": Wanda(),
        "model.layers.1.mlp.up": Magnitude(),
        "model.layers.1.mlp.gate": Wanda(),
    }
    assert Recipe.of(Wanda()) == Recipe({"*": Wanda()}, DEFAULT_IGNORE)
    assert Recipe.of(recipe) is recipe
    routers = ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"]
    assert list(Recipe.of(Wanda()).assign([*names, *routers, "a.b.gate_proj"])) == [
        "model.layers.0.mlp.up",
        "model.layers.1.mlp.up",
        "a.b.gate_proj",
    ]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe({"*.q": Wanda()}),
            r"'\*.q' matches no matrix: names look like l.0.a, l.0.b, l.1.a",
        ),
        (Recipe({"*": Wanda(), "*.a": Magnitude()}), r"'\*.a' matches only what earlier rules"),
        (Recipe({"*.a": Wanda()}, ignore=("*",)), r"'\*.a' matches only ignored"),
    ],
    ids=str,
)
def test_rules_without_a_matrix(recipe, message):
    with pytest.raises(PrunekitError, match=message):
        recipe.assign(["l.0.a", "l.0.b", "l.1.a", "l.1.b"])


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.of(Magnitude(0.3, update="admm")),
        Recipe({"*.q": Wanda(variant=True), "*": SparseGPT(pattern="2:4", block=64)}, ("*.v",)),
    ],
    ids=str,
)
def test_recipes_survive_plain_data(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_one_method_as_plain_data():
    settings = {"method": "wanda", "pattern": "2:4", "ignore": ["*.0.*"]}
    assert Recipe.from_dict(settings) == Recipe({"*": Wanda(pattern="2:4")}, ("*.0.*",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "wandah"},
            "'wandah' is unknown: use one of magnitude, wanda, ria, sparsegpt, admm",
        ),
        ({}, "method 'None' is unknown"),
        ({"method": "wanda", "blok": 3}, "wanda has no setting 'blok': use sparsity, pattern"),
        ({"method": "wanda", "sparsity": "half"}, "'sparsity' can't be 'half'"),
        ({"method": "wanda", "pattern": 124}, "'pattern' can't be 124"),
        ({"method": "wanda", "update": 1}, "'update' can't be 1"),
        ({"method": "wanda", "update": "adam"}, "update 'adam' is unknown: use admm"),
        ({"method": "sparsegpt", "block": True}, "'block' can't be True"),
        ({"rules": {}}, "no rules"),
        ({"rules": ["wanda"]}, "must map name patterns to methods"),
        ({"rules": {"*": "wanda"}}, "a method must be a mapping"),
        ({"rules": {"*": {"method": "wanda"}}, "pattern": "2:4"}, "no setting 'pattern': put it"),
        ({"method": "wanda", "ignore": "lm_head"}, "ignore must be a list"),
    ],
    ids=str,
)
def test_unusable_plain_data(settings, message):
    with pytest.raises(PrunekitError, match=message):
        Recipe.from_dict(settings)


def test_settings_from_a_file_reach_the_method():
    settings = {"method": "sparsegpt", "sparsity": 0.25, "block": 32, "damping": 1}
    assert method_from_dict(settings) == SparseGPT(0.25, block=32, damping=1)
