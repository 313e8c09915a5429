"""What pruning and dropping entail beyond the model itself is kept right, or said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import prunekit as pk
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.pruning import sparsegpt
from prunekit.pruning.patterns import parse


@pytest.mark.parametrize(
    ("name", "layers", "gone", "moved"),
    [
        ("gemma2", 4, [1], True),
        ("gemma2", 4, [0, 1], False),  # a whole period
        ("gemma2", 4, [3], False),  # the end
        ("gemma3_text", 7, [2], True),
        ("gemma3_text", 7, [6], False),
        ("mistral", 4, [1], False),  # every layer alike
        ("qwen2", 4, [1], False),
        ("llama", 4, [0, 2], False),
    ],
)
def test_a_moved_pattern_of_attentions_is_said(tiny, token_ids, name, layers, gone, moved):
    model = tiny(name, num_hidden_layers=layers, layer_types=None)
    calibrated = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        notes = drop_blocks_(model, gone)
    told = [str(warning.message) for warning in seen if "own pattern" in str(warning.message)]
    assert told == notes and bool(notes) == moved
    if moved:
        assert name in notes[0] and "llama.cpp" in notes[0] and "whole periods" in notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = pk.drop_(calibrated, pk.Drop("block", 1), token_ids, progress=False)
    assert (
        ("own pattern" in report.table()) == bool(report.notes) == bool(report.to_dict()["notes"])
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_attentions_have_an_entry_per_layer(tiny, token_ids, name):
    model = tiny(name)
    model.set_attn_implementation("eager")
    want = model(token_ids, output_attentions=True).attentions
    drop_sublayers_(model, attn=[1, 2])
    found = model(token_ids, output_attentions=True)
    assert [a is None for a in found.attentions] == [False, True, True, False]
    assert torch.equal(found.attentions[0], want[0])  # nothing before it was dropped
    assert found.attentions[3].shape == want[3].shape
    assert model(token_ids).get("attentions") is None
    steps = model.generate(
        token_ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
    ).attentions
    assert all([a is None for a in step] == [False, True, True, False] for step in steps)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("asked", ["call", "configuration"])
def test_a_mixture_without_experts_has_no_router_loss(tiny, token_ids, name, asked):
    model = tiny(name, output_router_logits=asked == "configuration")
    drop_sublayers_(model, mlp=range(4))
    options = {"output_router_logits": True} if asked == "call" else {}
    with pytest.warns(UserWarning, match="no expert is left"):
        out = model(token_ids, labels=token_ids, **options)
    plain = model(token_ids, labels=token_ids, output_router_logits=False)
    assert torch.equal(out.loss, plain.loss) and not out.aux_loss
    out.loss.backward()


RECIPES = {
    "sparsegpt 2:4": pk.SparseGPT(pattern="2:4"),
    "sparsegpt 4:8": pk.SparseGPT(pattern="4:8", block=20),
    "sparsegpt": pk.SparseGPT(0.5, block=16),
    "wanda 2:4": pk.Wanda(pattern="2:4"),
    "wanda variant": pk.Wanda(0.4, variant=True),
    "magnitude": pk.Magnitude(0.5),
}


def zeros_of(model):
    refs = (
        r for i in range(len(Architecture(model).layers)) for r in Architecture(model).weights(i)
    )
    return {ref.name: ref.matrix == 0 for ref in refs}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_zeros_of_an_earlier_pruning_stay(tiny, token_ids, recipe, name):
    model = tiny(name)
    pk.prune_(model, pk.Wanda(0.7), token_ids, progress=False)
    before = zeros_of(model)
    report = pk.prune_(model, RECIPES[recipe], token_ids, progress=False)
    after = zeros_of(model)
    assert all(bool(after[key][zeros].all()) for key, zeros in before.items())
    assert report.zeros >= sum(int(zeros.sum()) for zeros in before.values())
    assert not any("again" in matrix.note for matrix in report.matrices)


def test_zeros_that_come_back_are_counted(tiny, token_ids):
    model = tiny("llama")
    pk.prune_(model, pk.Wanda(0.7), token_ids, progress=False)
    before = zeros_of(model)
    recipe = pk.SparseGPT(pattern="2:4", keep_zeros=False)
    report = pk.prune_(model, recipe, token_ids, progress=False)
    after = zeros_of(model)
    for matrix in report.matrices:
        alive = int((before[matrix.name] & ~after[matrix.name]).sum())
        assert alive and matrix.note == f"{alive} zeros are weights again"
    assert "zeros are weights again" in report.table()


@pytest.mark.parametrize(("pattern", "block"), [("2:4", 8), ("4:8", 16), ("unstructured", 8)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_held_zeros_take_part_in_the_update(pattern, block, share):
    rows, columns = 12, 32
    x = torch.randn(200, columns, dtype=torch.float64)
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) >= share)
    factor = sparsegpt.inverse_factor((x.T @ x).float(), 0.01).upper
    target = parse(pattern, 0.5 if pattern == "unstructured" else None)
    [(got, mask)] = sparsegpt.sparsify([weight], factor, target, block, keep_zeros=True)
    assert not got[weight == 0].any() and not mask[weight == 0].any()
    # algorithm 1 with that mask, column by column
    upper, want = factor.double(), weight.double()
    for i in range(columns):
        error = torch.where(mask[:, i], 0.0, want[:, i]) / upper[i, i]
        want[:, i:] -= error[:, None] * upper[i, i:]
        want[:, i] = torch.where(mask[:, i], want[:, i], 0.0)
    assert (got - want).abs().max() <= 1e-5 * weight.abs().max()
    if pattern == "unstructured":
        pruned = (~mask).sum() - (weight == 0).sum()
        assert int((~mask).sum()) >= rows * columns // 2
        assert (share > 0.5) <= (int(pruned) < rows * columns // 8)
    else:
        assert int(mask.view(rows, -1, target.of).sum(2).max()) <= target.keep
    if not share:
        [(usual, same)] = sparsegpt.sparsify([weight], factor, target, block)
        assert torch.equal(mask, same) and torch.equal(got, usual)


def test_a_loaded_model_can_be_trained(tiny, word_tokenizer, token_ids, tmp_path):
    loaded, _ = pk.load(pk.save(tiny("llama"), word_tokenizer, tmp_path / "m"))
    assert not loaded.training
    loaded.train()
    loaded(token_ids, labels=token_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
