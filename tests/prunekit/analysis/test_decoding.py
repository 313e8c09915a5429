"""Both decoding protocols: constructed models by hand, random ones against plain loops."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from prunekit.analysis.decoding import Decoding, decode
from prunekit.analysis.sequence_metrics import SEQUENCE_METRICS
from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_sublayers_

EXACT = {"h_cosine": 1, "z_cosine": 1, "p_cosine": 1, "kl_dense_pruned": 0, "kl_pruned_dense": 0}
EXACT |= {"p_one_minus_cosine": 0, "z_one_minus_cosine": 0, "flipped": 0, "kl_estimate": 0}
PROMPTS = ["w5 w9 w30", "w4 w4 w60 w61 w62 w12", "w90 w17 w3 w44"]


def test_identical_models_under_both_protocols(architecture, tiny, word_tokenizer):
    model = tiny(architecture)
    twin = copy.deepcopy(model)
    found = decode(model, twin, word_tokenizer, PROMPTS, max_new_tokens=9, batch_size=2)
    for grid in (found.teacher_forced, found.free_running):
        there = ~np.isnan(grid["entropy_dense"])
        assert there.sum() == sum(len(g.dense_ids) for g in found.generations)
        for name, value in EXACT.items():
            np.testing.assert_array_equal(grid[name][there], value, err_msg=name)
    for text in found.generations:
        assert text.dense_ids == text.pruned_ids and text.first_divergence is None
        assert text.dense_text == text.pruned_text
        assert all(step.top_dense == step.top_pruned for step in text.steps)
    sequence = found.sequence
    assert (sequence["identical"] == 1).all() and (sequence["chrf"] == 100).all()
    assert (sequence["exact_prefix_share"] == 1).all()
    assert np.isnan(sequence["first_divergence"]).all()
    np.testing.assert_array_equal(sequence["nll_dense_text"], sequence["nll_pruned_text"])


@pytest.fixture
def chain(tiny):
    """A dense model that counts upwards, and a copy that jumps from 20 to 5; and the logit gap.

    No layer acts, so the logits depend on the last token alone: the head reads a one-hot embedding
    and gives the successor the logit `gap`, every other token 0.
    """
    model = tiny("llama", vocab_size=97, hidden_size=128, head_dim=32)
    for index in range(4):
        for sublayer in ("attn", "mlp"):
            for parameter in Architecture(model).last_projection(index, sublayer):
                parameter.zero_()
    embedding, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data
    model.model.norm.weight.data.fill_(1.0)
    embedding.zero_()
    head.zero_()
    for token in range(97):
        embedding[token, token] = 1.0
        head[(token + 1) % 97, token] = 0.7
    pruned = copy.deepcopy(model)
    pruned.lm_head.weight.data[21, 20] = 0.0
    pruned.lm_head.weight.data[5, 20] = 0.7
    # the norm scales a one-hot state of width 128 to length sqrt(128)
    return model, pruned, 0.7 / math.sqrt(1 / 128 + model.config.rms_norm_eps)


def test_divergence_by_hand(chain, word_tokenizer):
    model, pruned, gap = chain
    prompts = ["w30 w17", "w40", "w20"]
    found = decode(model, pruned, word_tokenizer, prompts, max_new_tokens=6)
    first = found.generations[0]
    assert first.prompt_ids == (30, 17)
    assert first.dense_ids == (18, 19, 20, 21, 22, 23)
    assert first.pruned_ids == (18, 19, 20, 5, 6, 7)
    assert first.dense_text == "w18 w19 w20 w21 w22 w23"
    assert first.pruned_tokens == ("w18", "w19", "w20", "w5", "w6", "w7")
    assert [g.first_divergence for g in found.generations] == [3, None, 0]
    np.testing.assert_array_equal(found.sequence["first_divergence"], [3, np.nan, 0])
    np.testing.assert_array_equal(found.sequence["exact_prefix"], [3, 6, 0])
    np.testing.assert_array_equal(found.sequence["exact_prefix_share"], [0.5, 1, 0])
    np.testing.assert_array_equal(found.sequence["identical"], [0, 1, 0])

    # p puts e^gap on the successor; swapping it with an empty token costs (p1 - p0) * gap.
    total = math.exp(gap) + 96
    kl = (math.exp(gap) - 1) / total * gap
    grid = found.teacher_forced
    expected = np.zeros((3, 6))
    expected[0, 3] = expected[2, 0] = kl
    np.testing.assert_allclose(grid["kl_dense_pruned"], expected, rtol=1e-5, atol=0)
    np.testing.assert_allclose(grid["kl_pruned_dense"], expected, rtol=1e-5, atol=0)
    np.testing.assert_array_equal(grid["flipped"], expected > 0)
    assert not grid["estimate_valid"][0, 3] and grid["estimate_valid"][0, 2]
    np.testing.assert_array_equal(grid["h_cosine"], 1)  # only the head was changed
    free = found.free_running["kl_dense_pruned"]
    np.testing.assert_array_equal(np.isnan(free).sum(1), [2, 0, 5])

    step = first.steps[3]
    assert step.kl == pytest.approx(kl, rel=1e-5)
    assert (step.top_dense[0].id, step.top_dense[0].text) == (21, "w21")
    assert (step.top_pruned[0].id, step.top_pruned[0].text) == (5, "w5")
    assert step.top_dense[0].probability == pytest.approx(math.exp(gap) / total, rel=1e-5)
    # The dense model finds its own text as likely as can be, the jump unlikely.
    nll = math.log(total) - gap
    np.testing.assert_allclose(found.sequence["nll_dense_text"], nll, rtol=1e-4)
    np.testing.assert_allclose(
        found.sequence["nll_pruned_text"], [nll + gap / 6, nll, nll + gap / 6], rtol=1e-4
    )


def test_end_of_sequence_by_hand(chain, word_tokenizer):
    model, pruned, _ = chain
    pruned.lm_head.weight.data[:, 1] = 0.0
    pruned.lm_head.weight.data[7, 1] = 0.7  # 1 -> 7 where the dense model ends: 1 -> 2
    found = decode(model, pruned, word_tokenizer, ["D", "w50"], max_new_tokens=4)
    assert found.generations[0].dense_ids == (0, 1, 2)
    assert found.generations[0].pruned_ids == (0, 1, 7, 8)
    assert found.generations[0].first_divergence == 2
    np.testing.assert_array_equal(found.sequence["eos_dense"], [1, 0])
    np.testing.assert_array_equal(found.sequence["eos_pruned"], [0, 0])
    np.testing.assert_array_equal(found.sequence["length_dense"], [3, 4])
    np.testing.assert_array_equal(found.sequence["exact_prefix_share"], [0.5, 1])
    assert np.isnan(found.sequence["repetition_dense"][0])  # too short for 4-grams
    assert np.isnan(found.teacher_forced["kl_dense_pruned"]).sum() == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt2", "mixtral"])
def test_free_running_equals_two_plain_loops_until_they_fork(tiny, word_tokenizer, name, perturbed):
    model = tiny(name)
    pruned = perturbed(model)
    drop_sublayers_(pruned, attn=[0])
    found = decode(model, pruned, word_tokenizer, PROMPTS, max_new_tokens=8)
    free = found.free_running["kl_dense_pruned"]
    for index, text in enumerate(found.generations):
        ids = [list(text.prompt_ids), list(text.prompt_ids)]
        for step in range(len(text.dense_ids)):
            rows = [
                m(torch.tensor([tokens])).logits[0, -1].double()
                for m, tokens in zip((model, pruned), ids, strict=True)
            ]
            p, q = (row.log_softmax(-1) for row in rows)
            kl = (p.exp() * (p - q)).sum().item()
            assert free[index, step] == pytest.approx(kl, rel=1e-3, abs=1e-6)
            chosen = [int(row.argmax()) for row in rows]
            assert (chosen[0], chosen[1]) == (text.dense_ids[step], text.pruned_ids[step])
            top = [(token.id, token.probability) for token in text.steps[step].top_pruned]
            values, best = q.exp().topk(5)
            assert [i for i, _ in top] == best.tolist()
            assert [v for _, v in top] == pytest.approx(values.tolist(), rel=1e-3)
            ids = [[*tokens, token] for tokens, token in zip(ids, chosen, strict=True)]
            if chosen[0] != chosen[1]:
                assert text.first_divergence == step
                assert np.isnan(free[index, step + 1 :]).all()
                break
        else:
            assert text.first_divergence is None
    assert (found.sequence["identical"] == 0).any()


def test_teacher_forcing_does_not_depend_on_batching(tiny, word_tokenizer, perturbed):
    model = tiny("llama")
    pruned = perturbed(model)
    runs = [
        decode(model, pruned, word_tokenizer, PROMPTS, max_new_tokens=7, batch_size=size)
        for size in (1, 3)
    ]
    for metric in runs[0].teacher_forced.metrics:
        first, second = (run.teacher_forced[metric] for run in runs)
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-5, err_msg=metric)
    assert [g.pruned_ids for g in runs[0].generations] == [
        g.pruned_ids for g in runs[1].generations
    ]


@torch.no_grad()
def test_perplexity_of_texts_does_not_depend_on_the_temperature(tiny, word_tokenizer, perturbed):
    model = tiny("llama")
    pruned = perturbed(model, 0.03)
    runs = [
        decode(model, pruned, word_tokenizer, PROMPTS, max_new_tokens=7, temperature=t)
        for t in (1.0, 0.6)
    ]
    for name in ("nll_dense_text", "nll_pruned_text", "perplexity_pruned_text"):
        np.testing.assert_allclose(*(run.sequence[name] for run in runs), rtol=1e-4)
    for index, text in enumerate(runs[0].generations):
        ids = torch.tensor([text.prompt_ids + text.pruned_ids])
        logprobs = model(ids).logits[0].double().log_softmax(-1)
        start = len(text.prompt_ids)
        by_hand = -np.mean([float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])])
        assert runs[0].sequence["nll_pruned_text"][index] == pytest.approx(by_hand, rel=1e-4)


def test_json_round_trip(tiny, word_tokenizer, perturbed):
    model = tiny("llama")
    found = decode(model, perturbed(model), word_tokenizer, PROMPTS, max_new_tokens=5)
    again = Decoding.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again.generations == found.generations
    assert set(again.sequence) == set(found.sequence) == set(SEQUENCE_METRICS)
    for name, values in found.sequence.items():
        np.testing.assert_array_equal(again.sequence[name], values)
    for name in found.teacher_forced.metrics:
        np.testing.assert_array_equal(again.teacher_forced[name], found.teacher_forced[name])


def test_prompt_longer_than_the_context(tiny, word_tokenizer):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match="context is 64"):
        decode(model, model, word_tokenizer, ["w5 " * 62], max_new_tokens=5)
