"""Bad input of prune_: nothing is changed, and the message names the fix."""

from __future__ import annotations

import pytest
import torch
from pruned_models import prune, refs_of

from prunekit.data.calibration import Calibration
from prunekit.errors import PrunekitError
from prunekit.models import blocks
from prunekit.models import dropped as modeling
from prunekit.pruning import (
    Magnitude,
    Recipe,
    Wanda,
)


def test_missing_calibration(tiny):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match=r"wanda needs calibration for model.layers.0.mlp"):
        prune(model, Recipe({"*.mlp.*": Wanda(), "*": Magnitude()}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("llama", float("nan"), "layers.3.mlp.down_proj holds NaN or infinite weights"),
        ("mixtral", float("inf"), "layers.3.mlp.experts.down_proj.3 holds NaN or infinite"),
    ],
)
def test_broken_weights_are_refused_before_anything_changes(tiny, token_ids, name, value, message):
    model = tiny(name)
    refs_of(model)[-1].matrix[0, 0] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(PrunekitError, match=message):
        prune(model, Wanda(), token_ids)
    for key, tensor in model.state_dict().items():
        assert (
            torch.equal(tensor, before[key]) or key.endswith("down_proj.weight") or "expert" in key
        )


def test_patterns_that_do_not_divide_a_matrix(tiny, token_ids):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match=r"q_proj has 32 inputs, which is no multiple of 5"):
        prune(model, Magnitude(pattern="2:5"))
    assert all(bool((ref.matrix != 0).all()) for ref in refs_of(model))


def test_overflowing_activations_name_where(tiny, token_ids):
    model = tiny("llama").half()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(60000.0)
    with pytest.raises(PrunekitError, match=r"inf or NaN at the input of .*1.mlp.*wider dtype"):
        prune(model, Wanda(), token_ids)


def test_everything_dropped(tiny, token_ids):
    model = tiny("llama")
    modeling.drop_sublayers_(model, attn=range(4), mlp=range(4))
    with pytest.raises(PrunekitError, match="nothing is left to prune"):
        prune(model, Wanda(), token_ids)


def test_interrupted_runs_leave_later_layers_dense(tiny, token_ids, monkeypatch):
    model = tiny("llama")
    original = blocks.run_layer

    def interrupt(arch, index, *args):
        if index == 2:
            raise KeyboardInterrupt
        return original(arch, index, *args)

    monkeypatch.setattr(blocks, "run_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, Wanda(), token_ids)
    zeros = [int((ref.matrix == 0).sum()) > 0 for ref in refs_of(model)]
    assert zeros == [True] * 14 + [False] * 14
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibration_descriptions_are_resolved(tiny):
    report = prune(tiny("llama"), Wanda(), Calibration(samples=3, length=9))
    assert (report.sequences, report.tokens) == (3, 27)
