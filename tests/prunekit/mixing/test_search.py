"""The search over a model's sublayers: mixes are what they say, budgets hold, nothing is lost."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import prunekit as pk
from prunekit.data import calibration as calibrating
from prunekit.divergence.windows import of_text
from prunekit.mixing import fitness, measuring
from prunekit.mixing.copies import DROP, Mixture, cost_of, parameters_of, parts_of
from prunekit.mixing.fitness import Fitness
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_sublayers_
from tests.prunekit.conftest import make_tiny

CHOICES = {"2:4": pk.Magnitude(pattern="2:4"), "70%": pk.Magnitude(sparsity=0.7), DROP: None}


def _search(model, tokenizer, folder, **options):
    settings = {"bytes": 0.8, "context": 16, "generations": 3, "offspring": 4, "progress": False}
    text = " ".join(f"w{3 + 7 * n % 89}" for n in range(200))
    choices = options.pop("choices", CHOICES)
    given = {"text": [text], **settings, **options}
    return pk.search(model, tokenizer, choices, folder, **given)


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in now)


def _mixture(model, folder):
    """The model as a mixture with a copy whose every weight of the layers is changed."""
    mixture = Mixture(model, folder, "dense")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in Architecture(other).layers:
            for parameter in layer.parameters():
                parameter.mul_(0.5)
    mixture.write("half", other, "half")
    mixture.add("half")
    mixture.add(DROP)
    return mixture, other


def test_a_mix_is_its_parts_whatever_came_before(architecture, tmp_path):
    model = make_tiny(architecture)
    dense = _state(model)
    mixture, half = _mixture(model, tmp_path)
    ids = torch.arange(3, 19)[None]
    draw = np.random.default_rng(0)
    for _ in range(4):
        mix = tuple(draw.integers(0, 3, len(mixture.parts)).tolist())
        mixture.apply_(mix)
        expected = copy.deepcopy(half)
        state = {name: dense[name].clone() for name in dense}
        gone = {"attn": [], "mlp": []}
        for part, choice in zip(mixture.parts, mix, strict=True):
            for name, tensor in _named(half, part):
                if choice == 1:
                    state[name] = tensor.clone()
            if choice == 2:
                gone[part.sublayer].append(part.layer)
        expected.load_state_dict(state)
        drop_sublayers_(expected, **gone)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    mixture.apply_((0,) * len(mixture.parts))
    assert _same(model, dense)
    mixture.apply_((2,) * len(mixture.parts))
    mixture.restore_()
    assert _same(model, dense)


def _named(model, part):
    return [(name, p.data) for name, p in parameters_of(Architecture(model), part)]


def test_kl_is_the_float64_mean_over_all_scored_tokens(word_tokenizer):
    model = make_tiny("llama")
    text = " ".join(f"w{3 + 7 * n % 89}" for n in range(100))
    windows = of_text(word_tokenizer, [text], kind="strided", context=16)
    measured = Fitness(model, windows, 64)
    assert measured.kl([0, 2, 3]) < 1e-12  # batches of other sizes round otherwise
    dense = copy.deepcopy(model)
    pk.prune_(model, pk.Magnitude(sparsity=0.5), progress=False)
    found = measured.kl([0, 2, 3])
    rows = []
    for index in (0, 2, 3):
        ids = torch.tensor(windows.ids[index][:-1])[None]
        with torch.no_grad():
            p, q = (log_softmax(m.double()(ids).logits[0], -1) for m in (dense, model))
        model.float(), dense.float()
        rows.append(kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert found == pytest.approx(float(torch.cat(rows).mean()), rel=1e-4)


def test_the_found_model_keeps_the_budget_and_is_what_was_measured(word_tokenizer, tmp_path):
    model = make_tiny("llama", intermediate_size=64)
    dense = copy.deepcopy(model)
    result = _search(model, word_tokenizer, tmp_path / "out")
    size = sum(p.nbytes for p in dense.parameters())
    assert result.found.within and result.found.bytes <= 0.8 * size
    start = next(p for p in result.points if p.name in ("additive model", "found"))
    assert result.found.kl <= start.kl
    assert all(p.kl > 0 or set(p.mix) == {0} for p in result.points)
    assert all(p.held_out is not None for p in result.front)
    # the model in memory is the mix: dropped sublayers gone, the others masked
    for layer, sublayer in ((p.layer, p.sublayer) for p in result.parts):
        part = next(p for p in result.parts if (p.layer, p.sublayer) == (layer, sublayer))
        assert Architecture(model).is_dropped(layer, sublayer) == (result.choice_of(part) == DROP)
    pk.save(model, word_tokenizer, tmp_path / "best")
    loaded, _ = pk.load(tmp_path / "best")
    text = " ".join(f"w{3 + 7 * n % 89}" for n in range(200))
    windows = of_text(word_tokenizer, [text], kind="strided", context=16)
    searched = [i for i in range(len(windows)) if i % 4 != 3]
    measured = Fitness(dense, windows, 64)
    measured._model = loaded
    assert measured.kl(searched) == pytest.approx(result.found.kl, rel=1e-4)
    # and the budget is that of the packed model in memory
    report = pk.swap_(loaded, min_speedup=0.0)
    packed = sum(p.nbytes for p in loaded.parameters()) + report.bytes
    assert packed == result.found.bytes
    told = json.loads((tmp_path / "out" / "search.json").read_text())
    assert told["found"]["kl"] == result.found.kl and len(told["layers"]) == 8
    assert (tmp_path / "out" / "search.png").stat().st_size > 1000


def test_a_killed_search_goes_on_and_ends_the_same(word_tokenizer, tmp_path, monkeypatch):
    whole = _search(make_tiny("llama"), word_tokenizer, tmp_path / "whole")
    calls = []
    kl = fitness.Fitness.kl

    def dying(self, indices):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return kl(self, indices)

    monkeypatch.setattr(fitness.Fitness, "kl", dying)
    model = make_tiny("llama")
    dense = _state(model)
    with pytest.raises(KeyboardInterrupt):
        _search(model, word_tokenizer, tmp_path / "killed")
    assert _same(model, dense)
    with (tmp_path / "killed" / "measured.jsonl").open("a") as file:
        file.write('{"mix": [0, ')  # the line that was being written
    again = _search(make_tiny("llama"), word_tokenizer, tmp_path / "killed")
    assert again == whole
    lines = (tmp_path / "whole" / "measured.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines) == len(calls) - 1
    before = len(calls)
    assert _search(make_tiny("llama"), word_tokenizer, tmp_path / "killed") == whole
    assert len(calls) == before
    other = _search(make_tiny("llama"), word_tokenizer, tmp_path / "killed", bytes=0.6)
    assert other.found.bytes < whole.found.bytes and len(other.points) > len(whole.points)


def test_a_speed_budget_counts_what_decoding_reads(word_tokenizer, tmp_path):
    result = _search(make_tiny("llama"), word_tokenizer, tmp_path, bytes=None, speed=1.3)
    assert result.found.within and result.found.speed >= 1.3
    # on a CPU packed layers are no faster, so that only dropping helps
    gone = sum(result.choices[c] == DROP for c in result.found.mix)
    assert gone > 0


def test_a_packed_copy_costs_its_own_bytes(word_tokenizer, tmp_path):
    model = make_tiny("llama", intermediate_size=64)
    other = copy.deepcopy(model)
    pk.prune_(other, pk.Magnitude(pattern="2:4"), progress=False)
    pk.save(other, word_tokenizer, tmp_path / "masked")
    arch = Architecture(other)
    costs = sum(cost_of(arch, part, 1).bytes for part in parts_of(arch))
    norms = sum(p.nbytes for layer in arch.layers for p in layer.parameters() if p.ndim == 1)
    assert pk.swap_(other, min_speedup=0.0).bytes + norms == costs
    pk.save(other, word_tokenizer, tmp_path / "packed")
    choices = {"a": tmp_path / "masked", "b": tmp_path / "packed"}
    result = _search(model, word_tokenizer, tmp_path / "out", choices=choices, bytes=0.9)
    named = {point.name: point for point in result.points}
    assert named["all a"].bytes == named["all b"].bytes and named["all a"].kl == named["all b"].kl


REFUSED = {
    "no budget": ({"bytes": None}, "one budget"),
    "two budgets": ({"speed": 1.5}, "one budget"),
    "percent as a number": ({"bytes": 60}, "such as 60% or 0.6"),
    "slower": ({"bytes": None, "speed": 0.5}, "more than 1"),
    "nothing": ({"choices": {}}, "nothing to choose"),
    "dense": ({"choices": {"dense": pk.Magnitude(sparsity=0.5)}}, "another name"),
    "rounded": (
        {"choices": {"a": pk.Wanda(sparsity=0.5, bits=4)}},
        "unstructured.*use pattern 2:4",
    ),
    "groups": ({"choices": {"a": pk.Wanda(pattern="2:4", bits=4, group=16)}}, "use 64 or 128"),
    "a nameless drop": ({"choices": {"gone": None}}, "'drop'"),
    "too small": ({"bytes": 0.1, "choices": {"2:4": CHOICES["2:4"]}}, "or allow dropping"),
    "short text": ({"text": ["w3 w4 w5"]}, "longer text"),
    "a lost copy": ({"choices": {"copy": "/nowhere/at/all"}}, "/nowhere/at/all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_fix_and_leave_the_model_dense(case, word_tokenizer, tmp_path):
    options, message = REFUSED[case]
    model = make_tiny("llama")
    dense = _state(model)
    with pytest.raises(pk.PrunekitError, match=message):
        _search(model, word_tokenizer, tmp_path / "out", **options)
    assert _same(model, dense)


def test_copies_of_other_models_and_other_searches_are_refused(word_tokenizer, tmp_path):
    model = make_tiny("llama")
    for name, changes in (("wide", {"intermediate_size": 64}), ("short", {"num_hidden_layers": 3})):
        pk.save(make_tiny("llama", **changes), word_tokenizer, tmp_path / name)
        choices = {name: tmp_path / name}
        with pytest.raises(pk.PrunekitError, match="copies"):
            _search(model, word_tokenizer, tmp_path / f"out-{name}", choices=choices)
    retrained = copy.deepcopy(model)
    with torch.no_grad():
        retrained.get_input_embeddings().weight.mul_(1.1)
    pk.save(retrained, word_tokenizer, tmp_path / "retrained")
    with pytest.raises(pk.PrunekitError, match="belongs to no sublayer"):
        _search(model, word_tokenizer, tmp_path / "out", choices={"r": tmp_path / "retrained"})
    _search(model, word_tokenizer, tmp_path / "mine", generations=0)
    for options, what in (({"context": 12}, "windows"), ({"choices": {DROP: None}}, "choices")):
        with pytest.raises(pk.PrunekitError, match=f"another {what}"):
            _search(make_tiny("llama"), word_tokenizer, tmp_path / "mine", **options)


def test_stages_end_with_all_windows():
    assert measuring.STAGES[-1][0] == 1.0


def test_calibration_is_sampled_once_for_all_copies(word_tokenizer, tmp_path, monkeypatch):
    sampled = []
    tokens = calibrating.tokens

    def counted(*args, **settings):
        sampled.append(1)
        return tokens(*args, **settings)

    monkeypatch.setattr(calibrating, "tokens", counted)
    choices = {"2:4": pk.Wanda(pattern="2:4"), "50%": pk.SparseGPT(sparsity=0.5)}
    calibration = pk.Calibration(samples=2, length=16)
    options = {"choices": choices, "calibration": calibration, "generations": 0}
    result = _search(make_tiny("llama"), word_tokenizer, tmp_path, bytes=0.9, **options)
    assert sampled == [1] and result.found.within
