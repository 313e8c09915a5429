"""Mixes of layers whose values have 8 or 4 bits: measured, counted and saved as packed."""

from __future__ import annotations

import copy

import pytest
import torch
from prunekernels import quantized24_round

import prunekit as pk
from prunekit.divergence.windows import of_text
from prunekit.mixing.fitness import Fitness
from prunekit.packed import PackedLinear, packed_layers, weight_bytes
from tests.prunekit.conftest import make_tiny

BITS = {"2:4-int8": 8, "2:4-int4": 4, "2:4-fp8": "fp8"}
CHOICES = {name: pk.SparseGPT(pattern="2:4", bits=bits) for name, bits in BITS.items()}
BRANCHES = {"attn": "self_attn", "mlp": "mlp"}
TEXT = [" ".join(f"w{3 + 7 * n % 89}" for n in range(200))]


def _dense(dtype=torch.float32):
    return make_tiny("llama", hidden_size=64, intermediate_size=128).to(dtype)


def _search(model, tokenizer, folder, choices, share, generations=2):
    given = {"text": TEXT, "context": 16, "offspring": 4, "progress": False}
    given["calibration"] = pk.Calibration(samples=8, length=32)
    given["generations"] = generations
    return pk.search(model, tokenizer, choices, folder, bytes=share, **given)


def _packed(model):
    """Format and tensors of every packed layer."""
    held = {}
    for path, layer in packed_layers(model):
        held[path] = layer.format, layer.weight.state_dict()
    return held


def _same(first, second):
    assert first.keys() == second.keys() and first
    for path, (kind, tensors) in first.items():
        assert second[path][0] == kind
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[path][1][name]), (path, name)


def _kl(dense, model, tokenizer):
    windows = of_text(tokenizer, TEXT, kind="strided", context=16)
    measured = Fitness(dense, windows, 1024)  # tokens at once, as in the search
    measured._model = model
    return measured.kl([i for i in range(len(windows)) if i % 4 != 3])


def test_two_formats_in_one_model_are_saved_as_they_were_measured(word_tokenizer, tmp_path):
    model = _dense()
    dense = copy.deepcopy(model)
    choices = {name: CHOICES[name] for name in ("2:4-int8", "2:4-int4")}
    with pytest.raises(pk.PrunekitError, match="the most is"):
        _search(_dense(), word_tokenizer, tmp_path / "out", choices, 0.1)
    sizes = _search(_dense(), word_tokenizer, tmp_path / "out", choices, 0.99, generations=0)
    named = {point.name: point for point in sizes.points}
    assert named["all 2:4-int4"].bytes < named["all 2:4-int8"].bytes
    ends = [named[f"all {name}"].bytes for name in choices]
    share = 1.001 * sum(ends) / 2 / weight_bytes(dense)
    result = _search(model, word_tokenizer, tmp_path / "out", choices, share)
    report = pk.swap_(model, min_speedup=0.0)
    assert {module.format for module in report.swapped} == set(choices)
    for module in report.swapped:
        (choice,) = (
            result.choice_of(part)
            for part in result.parts
            if f".{part.layer}.{BRANCHES[part.sublayer]}." in module.name
        )
        assert module.format == choice
    pk.save(model, word_tokenizer, tmp_path / "best")
    loaded, _ = pk.load(tmp_path / "best")
    _same(_packed(model), _packed(loaded))
    assert weight_bytes(loaded) == result.found.bytes
    assert _kl(dense, loaded, word_tokenizer) == pytest.approx(result.found.kl, rel=1e-4)
    pk.unswap_(loaded)  # so that the products are the same ones
    assert _kl(dense, loaded, word_tokenizer) == result.found.kl


def test_copies_that_hold_packed_values_keep_them(word_tokenizer, tmp_path):
    pk.save(_dense(torch.bfloat16), word_tokenizer, tmp_path / "dense")
    model, _ = pk.load(tmp_path / "dense")  # whose rotary table is float32, as every loaded one's
    dense, mine = copy.deepcopy(model), copy.deepcopy(model).float()
    pk.prune_(mine, pk.Magnitude(pattern="2:4"), progress=False)
    for layer in mine.model.layers:
        for branch, kind in ((layer.self_attn, "2:4-fp8"), (layer.mlp, "2:4-int4")):
            for name, module in list(branch.named_children()):
                if isinstance(module, torch.nn.Linear):
                    lopsided = module.weight + 0.02 * (module.weight != 0)
                    options = {} if kind == "2:4-fp8" else {"group": 64, "symmetric": False}
                    weight = quantized24_round(lopsided, kind, **options)
                    setattr(branch, name, PackedLinear(weight, None, kind))
    held = _packed(mine)
    assert {kind for kind, _ in held.values()} == {"2:4-fp8", "2:4-int4"}
    assert any("zeros" in tensors for _, tensors in held.values())
    pk.save(mine, word_tokenizer, tmp_path / "mine")
    share = 1.0001 * weight_bytes(mine.bfloat16()) / weight_bytes(dense)
    result = _search(model, word_tokenizer, tmp_path / "out", {"mine": tmp_path / "mine"}, share)
    assert set(result.found.mix) == {1} and result.found.bytes == weight_bytes(mine)
    pk.swap_(model, min_speedup=0.0)
    pk.save(model, word_tokenizer, tmp_path / "best")
    loaded, _ = pk.load(tmp_path / "best")
    _same(_packed(mine), _packed(loaded))
    for path, (_, tensors) in _packed(loaded).items():
        for name in set(tensors) - {"header"}:  # which says float32 there, and bfloat16 here
            assert torch.equal(tensors[name], held[path][1][name])
    pk.unswap_(loaded)
    assert _kl(dense, loaded, word_tokenizer) == result.found.kl


def test_a_choice_is_its_format_and_is_measured_once(word_tokenizer, tmp_path):
    out, choices = tmp_path / "out", {"a": CHOICES["2:4-int8"], "drop": None}
    first = _search(_dense(), word_tokenizer, out, choices, 0.7)
    measured = (out / "measured.jsonl").read_bytes()
    assert _search(_dense(), word_tokenizer, out, choices, 0.7) == first
    assert (out / "measured.jsonl").read_bytes() == measured
    other = {**choices, "a": CHOICES["2:4-fp8"]}
    with pytest.raises(pk.PrunekitError, match="another choices"):
        _search(_dense(), word_tokenizer, out, other, 0.7)


def test_a_copy_that_saves_nothing_is_refused(word_tokenizer, tmp_path):
    copied = _dense()
    with torch.no_grad():
        for layer in copied.model.layers:
            weight = layer.mlp.up_proj.weight
            scale = weight.abs().amax() / 127
            weight.copy_((weight / scale).round() * scale)  # 8 bits, and no zeros
    pk.save(copied, word_tokenizer, tmp_path / "int8")
    with pytest.raises(pk.PrunekitError, match=r"int8 is nowhere smaller.*no packed format"):
        _search(_dense(), word_tokenizer, tmp_path / "out", {"int8": tmp_path / "int8"}, 0.7)
