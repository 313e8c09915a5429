"""Recovery: nearer to the dense model on held-out text, zeros stay, killed runs go on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pruned_models import prune, refs_of
from torch.nn import functional

import prunekit as pk
from prunekit import checkpoint
from prunekit.divergence.recovery import Recovery, recover_
from prunekit.divergence.recovery import recover as recovering
from prunekit.divergence.recovery.loss import loss_of
from prunekit.divergence.rows import Readout
from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.pruning import Drop, Magnitude, descent, drop_

SETTINGS = {"tokens": 48, "held_out": 0.2, "checks": 4, "lr": 0.02}


@pytest.fixture(scope="module")
def sequences():
    """(20, 12) random token ids of the tiny vocabulary."""
    return torch.randint(3, 97, (20, 12), generator=torch.Generator().manual_seed(11))


def recover(model, teacher, sequences, **settings):
    names = "journal", "calibration_dtype"
    options = {name: settings.pop(name) for name in names if name in settings}
    recovery = Recovery(**{**SETTINGS, "steps": 12, **settings})
    options |= {"recovery": recovery, "batch_size": 4, "progress": False}
    return recover_(model, teacher, sequences, **options)


def divergence(dense, model, ids):
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1)[:, :-1].mean())


@pytest.mark.parametrize(
    "name",
    ["gemma2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2", "mixtral"))],
)
def test_a_pruned_model_comes_nearer_and_keeps_its_zeros(tiny, sequences, name):
    dense, model = tiny(name), tiny(name)
    prune(model, Magnitude(pattern="2:4"))
    pruned = copy.deepcopy(model)
    # an expert sees a part of each update's few tokens
    report = recover(model, dense, sequences, steps=36 if name == "mixtral" else 12)
    held = torch.stack(descent.split(list(sequences), 0.2, "x")[1])
    for statistics, other in ((report.before, pruned), (report.after, model)):
        expected = divergence(dense, other, held)
        assert statistics["kl_mean"] == pytest.approx(expected, rel=1e-3)
    assert report.after["kl_mean"] < 0.9 * report.before["kl_mean"]
    assert report.curve[0][1] == pytest.approx(report.before["kl_mean"], rel=1e-3)
    for ref, other in zip(refs_of(model), refs_of(pruned), strict=True):
        assert torch.equal(ref.matrix == 0, other.matrix == 0)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        weight, other = (getattr(m, part)().weight for m in (model, pruned))
        assert torch.equal(weight, other)
    assert "same likeliest token" in report.table() and report.zeros * 2 == sum(
        ref.matrix.numel() for ref in refs_of(model)
    )


def test_dropped_sublayers_are_healed(tiny, sequences):
    dense, model = tiny("llama"), tiny("llama")
    drop_(model, Drop("attn", 2), sequences, progress=False)
    report = recover(model, dense, sequences, kind="js")
    assert report.zeros == 0
    assert report.after["js_mean"] < 0.95 * report.before["js_mean"]
    assert sum(Architecture(model).is_dropped(layer, "attn") for layer in range(4)) == 2


def test_passes_may_run_in_bfloat16(tiny, sequences):
    dense, model = tiny("qwen3"), tiny("qwen3")
    prune(model, Magnitude(pattern="2:4"))
    report = recover(model, dense, sequences, calibration_dtype=torch.bfloat16, kind="reverse_kl")
    assert model.dtype == torch.float32
    assert report.after["kl_reverse_mean"] < 0.9 * report.before["kl_reverse_mean"]


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
def test_loss_is_that_of_the_logits(kind):
    draw = torch.Generator().manual_seed(3)
    states, wanted = (torch.randn(7, 5, generator=draw) for _ in range(2))
    weight = torch.randn(11, 5, generator=draw)
    labels = torch.randint(11, (7,), generator=draw)
    readout = Readout(weight, None, 4.0, 0.5, 11)
    settings = Recovery(kind=kind, cross_entropy=0.3, temperature=2.0)
    states.requires_grad_()
    found = loss_of(states, wanted, labels, readout, readout, settings)
    (gradient,) = torch.autograd.grad(found, states)

    exact = states.detach().double().requires_grad_()
    logits = [4 * torch.tanh(h.double() @ weight.double().t() * 0.5 / 4) for h in (exact, wanted)]
    q, p = ((z / 2).log_softmax(-1) for z in logits)
    m = torch.logaddexp(p, q) - math.log(2)
    kl = {
        "kl": (p.exp() * (p - q)).sum(),
        "reverse_kl": (q.exp() * (q - p)).sum(),
        "js": 0.5 * (p.exp() * (p - m)).sum() + 0.5 * (q.exp() * (q - m)).sum(),
    }[kind]
    expected = kl + 0.3 * functional.cross_entropy(logits[0], labels, reduction="sum")
    assert found.item() == pytest.approx(float(expected), rel=1e-5)
    (reference,) = torch.autograd.grad(expected, exact)
    assert torch.allclose(gradient.double(), reference, rtol=1e-4, atol=1e-6)


class Killed(Exception):
    """Stands for a signal."""


def test_a_killed_run_goes_on_to_the_same_bytes(tiny, sequences, tmp_path, monkeypatch):
    dense, models = tiny("llama"), [tiny("llama") for _ in range(2)]
    reports = []
    for model in models:
        prune(model, Magnitude(pattern="2:4"))
    reports.append(recover(models[0], dense, sequences, journal=tmp_path / "whole"))
    usual, calls = recovering.loss_of, []
    whole = 12 + 5  # an item for each update, and one at each check

    def dying(*args):
        calls.append(None)
        if len(calls) == 12:
            raise Killed
        return usual(*args)

    monkeypatch.setattr(recovering, "loss_of", dying)
    with pytest.raises(Killed):
        recover(models[1], dense, sequences, journal=tmp_path / "killed")
    calls.clear()
    reports.append(recover(models[1], dense, sequences, journal=tmp_path / "killed"))
    assert 0 < len(calls) < whole - 5  # it went on behind a check
    assert reports[0] == reports[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(PrunekitError, match="another recovery"):
        model = tiny("llama")
        prune(model, Magnitude(pattern="2:4"))
        recover(model, dense, sequences, journal=tmp_path / "killed", kind="js")


def test_a_loss_that_is_not_finite_leaves_the_best_state(tiny, sequences, monkeypatch):
    dense, model = tiny("llama"), tiny("llama")
    prune(model, Magnitude(pattern="2:4"))
    before, usual, calls = copy.deepcopy(model), recovering.loss_of, []

    def failing(*args):
        calls.append(None)
        return usual(*args) * (float("nan") if len(calls) > 10 else 1.0)

    monkeypatch.setattr(recovering, "loss_of", failing)
    report = recover(model, dense, sequences)
    assert "not finite" in report.note and report.steps < 12
    assert report.after["kl_mean"] < report.before["kl_mean"]
    calls += [None] * 10
    broken = copy.deepcopy(before)
    with pytest.raises(PrunekitError, match="not finite before any update"):
        recover(broken, dense, sequences)
    for one, other in zip(broken.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


def test_bad_input_is_refused(tiny, sequences, tmp_path, word_tokenizer):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match="vocabulary of 101 tokens, the model one of 97"):
        recover(model, tiny("llama", vocab_size=101), sequences)
    with pytest.raises(PrunekitError, match="at least 2 samples"):
        recover(model, tiny("llama"), sequences[:1])
    with pytest.raises(PrunekitError, match="too short to predict"):
        recover(model, tiny("llama"), sequences[:, :1])
    for settings in ({"kind": "mse"}, {"cross_entropy": -1}, {"temperature": 0}, {"steps": 0}):
        with pytest.raises(PrunekitError, match=next(iter(settings))):
            Recovery(**settings)
    other = copy.deepcopy(word_tokenizer)
    other.add_tokens(["more"])
    folder = checkpoint.save(tiny("llama"), other, tmp_path / "teacher")
    with pytest.raises(PrunekitError, match="another vocabulary"):
        recover_(model, str(folder), sequences, tokenizer=word_tokenizer, progress=False)


def test_a_mask_that_was_broken_afterwards_is_refused_at_save(
    tiny, sequences, tmp_path, word_tokenizer
):
    dense, model = tiny("llama"), tiny("llama")
    prune(model, Magnitude(pattern="2:4"))
    recover(model, dense, sequences, steps=2)
    pk.save(model, word_tokenizer, tmp_path / "good")
    refs_of(model)[9].matrix[2] += 1
    with pytest.raises(PrunekitError, match=r"layers\.1\.self_attn\.v_proj holds 16 weights"):
        pk.save(model, word_tokenizer, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    prune(model, Magnitude(sparsity=0.3))  # another mask counts from here
    pk.save(model, word_tokenizer, tmp_path / "again")
