"""Torch's process-wide settings change no result."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import prunekit as pk
from prunekit.divergence.two_models import kl_report
from prunekit.evaluation.likelihood import perplexity


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def pruned(recipe):
    def run(tiny, tiny_24, tokenizer, ids, folder):
        model = tiny("llama")
        report = pk.prune_(model, recipe, ids, progress=False)
        return state_of(model), report.to_dict()

    return run


def dropped(unit):
    def run(tiny, tiny_24, tokenizer, ids, folder):
        model = tiny("qwen2")
        report = pk.drop_(model, pk.Drop(unit, 1), ids, progress=False)
        return state_of(model), report.to_dict()

    return run


def swapped(tiny, tiny_24, tokenizer, ids, folder):
    model = tiny_24("llama")
    pk.swap_(model)
    packed = state_of(model)
    pk.unswap_(model)
    return {f"packed {k}": v for k, v in packed.items()} | state_of(model), {}


def loaded(tiny, tiny_24, tokenizer, ids, folder):
    model, _ = pk.load(folder / "packed")
    assert not any(p.is_inference() for p in (*model.parameters(), *model.buffers()))
    return state_of(model), {}


def measured(tiny, tiny_24, tokenizer, ids, folder):
    dense, model = tiny("llama"), tiny_24("llama", hidden_size=32, intermediate_size=48)
    text = " ".join(f"w{i}" for i in range(3, 90))
    report = kl_report(dense, model, tokenizer, text, context=16, progress=False)
    return {}, {**report, "perplexity": perplexity(model, None, ids[0], context=8)}


def compared(tiny, tiny_24, tokenizer, ids, folder):
    dense, model = tiny("llama"), tiny_24("llama", hidden_size=32, intermediate_size=48)
    options = dict(choices=None, max_new_tokens=3, chat="never", progress=False)
    study = pk.compare(dense, model, ["w5 w6 w7"], tokenizer=tokenizer, **options)
    return {}, {name: repr(value) for name, value in study.summary().items() if "sec" not in name}


WORK = {
    "magnitude": pruned(pk.Magnitude(0.5)),
    "wanda": pruned(pk.Wanda(0.5, variant=True)),
    "sparsegpt": pruned(pk.SparseGPT(pattern="2:4")),
    "drop attn": dropped("attn"),
    "drop block": dropped("block"),
    "swap": swapped,
    "load": loaded,
    "measure": measured,
    "compare": compared,
}


@pytest.mark.parametrize("work", WORK)
def test_results_do_not_depend_on_torchs_settings(
    work, tiny, tiny_24, word_tokenizer, token_ids, tmp_path
):
    if work == "load":
        model = tiny_24("llama")
        pk.swap_(model)
        pk.save(model, word_tokenizer, tmp_path / "packed")
    made = {}  # models are made outside of the setting, which would change them too

    def make(build):
        def once(name, **changes):
            key = (build, name, tuple(changes.items()))
            if key not in made:
                made[key] = build(name, **changes)
            return copy.deepcopy(made[key])

        return once

    parts = (make(tiny), make(tiny_24), word_tokenizer, token_ids, tmp_path)
    tensors, facts = WORK[work](*parts)
    assert tensors or facts
    for name, state in STATES.items():
        parts = (make(tiny), make(tiny_24), word_tokenizer, token_ids, tmp_path)
        with state():
            before = (torch.get_default_dtype(), torch.get_default_device())
            got, said = WORK[work](*parts)
            assert (torch.get_default_dtype(), torch.get_default_device()) == before
        assert said == facts, name
        assert got.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), (name, key)
