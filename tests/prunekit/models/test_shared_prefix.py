"""Prompts with a common beginning that is read once, and texts that a rule ends."""

from __future__ import annotations

import pytest
import torch

from prunekit.models import generation

PREFIX = [5 + index % 40 for index in range(20)]
RESTS = [[7, 8, 9], [50, 51], [60, 61, 62, 63, 64], [70]]
PROMPTS = [[*PREFIX, *rest] for rest in RESTS]


def test_reading_a_prefix_once_changes_no_token(tiny, architecture):
    model = tiny(architecture)
    plain = generation.generate(model, PROMPTS, max_new_tokens=8, batch_size=3, entropies=True)
    shared = generation.common_prefix(model, PROMPTS)
    assert shared == (0 if getattr(model.config, "sliding_window", None) else len(PREFIX))
    once = generation.generate(
        model, PROMPTS, max_new_tokens=8, batch_size=3, shared=shared, entropies=True
    )
    assert once == plain
    for ours, theirs in zip(once, plain, strict=True):
        assert ours.entropies == pytest.approx(theirs.entropies, rel=1e-3, abs=1e-4)


def test_entropies_are_those_of_the_distributions(tiny):
    model = tiny("llama")
    (found,) = generation.generate(model, PROMPTS[:1], max_new_tokens=6, entropies=True)
    with torch.inference_mode():
        logits = model(torch.tensor([found.ids])).logits[0].double()
    steps = torch.distributions.Categorical(logits=logits[len(PROMPTS[0]) - 1 : -1])
    assert found.entropies == pytest.approx(steps.entropy().tolist(), rel=1e-4)


def test_a_text_ends_with_the_token_that_completes_it(tiny):
    model = tiny("llama")
    whole = generation.generate(model, PROMPTS, max_new_tokens=8, batch_size=2)
    stops = [rollout.continuation[index] for index, rollout in enumerate(whole)]
    cut = generation.generate(
        model, PROMPTS, max_new_tokens=8, batch_size=2, stop=lambda ids: ids[-1] in stops
    )
    for ours, theirs in zip(cut, whole, strict=True):
        end = next(i for i, token in enumerate(theirs.continuation) if token in stops)
        assert ours.continuation == theirs.continuation[: end + 1]


def test_prompts_that_share_little_or_everything(tiny):
    model = tiny("llama")
    assert generation.common_prefix(model, RESTS) == 0
    assert generation.common_prefix(model, [PREFIX, PREFIX]) == len(PREFIX) - 1
    assert generation.common_prefix(model, [PREFIX]) == 0
