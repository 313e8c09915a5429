"""compare end to end on tiny models; the embedded model under `slow`."""

from __future__ import annotations

import copy
import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from prunekit.analysis import quality
from prunekit.analysis.findings import SECTIONS
from prunekit.errors import PrunekitError
from prunekit.evaluation.answering import Asking, answered
from prunekit.evaluation.items import Choice
from prunekit.evaluation.likelihood import option_logliks
from prunekit.evaluation.questions import Question
from prunekit.models import generation
from prunekit.models.dropped import drop_sublayers_
from prunekit.study.baseline import Baseline
from prunekit.study.comparison import compare
from prunekit.study.study import Study
from prunekit.sweeping.run import sweep

PROMPTS = ["w5 w9 w30", "w4 w4 w60 w61 w62 w12", "w90 w17 w3 w44", "w70 w71", "w11 w12 w13"]
CHOICES = [
    Choice(str(index), f"w{index + 5} w6", ("w10", "w11", "w12 w13", "w14"), index % 4)
    for index in range(6)
]
QUESTIONS = [Question(str(n), f"w{n} w9 w{n + 3}", f"w{n}", f"w{n}") for n in range(20, 90, 10)]
ASKING = Asking(max_new_tokens=4, batch_size=3)
OPTIONS = {"max_new_tokens": 6, "batch_size": 2, "layerwise_prompts": 3, "layerwise_steps": 4}


def run(dense, pruned, tokenizer, **options):
    asked = {"choices": CHOICES, "questions": QUESTIONS, "asking": ASKING}
    options = {**asked, "progress": False, **OPTIONS, **options}
    return compare(dense, pruned, PROMPTS, tokenizer=tokenizer, **options)


def assert_same(ours, theirs, rtol=0.0):
    """Two JSON-able trees are equal, numbers up to `rtol`."""
    assert type(ours) is type(theirs) or {type(ours), type(theirs)} <= {int, float}
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key], rtol)
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, rtol)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=rtol, abs=rtol)
    else:
        assert ours == theirs


@pytest.fixture
def dropped(tiny):
    model = tiny("llama")
    pruned = copy.deepcopy(model)
    drop_sublayers_(pruned, attn=[1], mlp=[3])
    return model, pruned


def test_study_of_a_dropped_model(dropped, word_tokenizer):
    study = run(*dropped, word_tokenizer, names=("big", "small"))
    assert study.layerwise.shape == study.removal.shape == (3, 4, 4, 2)
    assert study.accumulated.shape == (3, 4, 4)
    # three of five prompts and four of six steps, evenly spread, the first included
    assert study.layerwise.labels["prompt"] == [0, 2, 4]
    assert study.layerwise.labels["step"] == [0, 2, 3, 5]
    assert study.decoding.teacher_forced.shape == (5, 6)
    assert [text.prompt for text in study.decoding.generations] == PROMPTS
    assert len(study.subspace.items) == 6
    assert {(row["space"], row["layer"], row["sublayer"]) for row in study.theory} == {
        (space, layer, part)
        for space in ("h", "p", "kl")
        for layer in range(4)
        for part in ("attn", "mlp")
    }
    # the layerwise view of the traced steps agrees with what decoding saw at those steps
    np.testing.assert_allclose(
        study.accumulated["kl_dense_pruned"][:, :, -1],
        study.decoding.teacher_forced["kl_dense_pruned"][np.ix_([0, 2, 4], [0, 2, 3, 5])],
        rtol=1e-3,
        atol=1e-6,
    )
    meta = study.meta
    assert meta["names"] == {"dense": "big", "pruned": "small"}
    assert meta["models"]["pruned"]["dropped"] == {"attn": [1], "mlp": [3]}
    assert meta["models"]["dense"]["dropped"] == {"attn": [], "mlp": []}
    assert meta["sections"] == list(SECTIONS) and meta["versions"]["torch"] == torch.__version__
    assert set(meta["seconds"]) >= {"generation", "layerwise", "decoding", "scores"}

    summary = study.summary()
    kl = study.decoding.teacher_forced["kl_dense_pruned"]
    assert summary["kl_dense_pruned"].mean == pytest.approx(np.nanmean(kl, 1).mean())
    assert summary["kl_dense_pruned"].n == 5
    accuracy = np.mean(option_logliks(dropped[1], word_tokenizer, CHOICES, progress=False).correct)
    assert summary["pruned_accuracy"].mean == pytest.approx(accuracy)
    for name in ("dense", "pruned"):
        assert len(study.right[name]) == len(CHOICES)
        assert np.mean(study.right[name]) == pytest.approx(study.scores[name]["accuracy"].mean)
    turned = np.subtract(study.right["pruned"], study.right["dense"], dtype=float)
    assert summary["accuracy_difference"].mean == pytest.approx(turned.mean())
    assert summary["accuracy_gained"] == (turned > 0).sum()
    assert summary["accuracy_lost"] == (turned < 0).sum()
    replies = [answered(model, word_tokenizer, QUESTIONS, ASKING) for model in dropped]
    assert [item.dense for item in study.answers.items] == replies[0]
    assert [item.pruned for item in study.answers.items] == replies[1]
    match = np.mean([reply.right for reply in replies[1]])
    assert summary["pruned_exact_match"].mean == pytest.approx(match)
    assert summary["dense_same_answer"].mean == 1 and summary["exact_match_needed"] > 0
    assert summary["dense_identical"].mean == 1 and summary["dense_chrf"].mean == 100
    nll = study.decoding.sequence["nll_pruned_text"].mean()
    assert summary["pruned_perplexity"].mean == pytest.approx(np.exp(nll))


def test_json_round_trip(dropped, word_tokenizer):
    study = run(*dropped, word_tokenizer)
    text = json.dumps(study.to_dict(), allow_nan=False)
    again = Study.from_dict(json.loads(text))
    assert json.dumps(again.to_dict(), allow_nan=False) == text
    np.testing.assert_array_equal(again.layerwise["h_cosine"], study.layerwise["h_cosine"])
    assert again.decoding.generations == study.decoding.generations
    assert again.subspace.items == study.subspace.items
    assert again.scores == study.scores and again.theory == study.theory
    assert again.summary() == study.summary()
    with pytest.raises(PrunekitError, match="schema version 99"):
        Study.from_dict({**study.to_dict(), "schema_version": 99})


def test_identical_models(tiny, word_tokenizer):
    model = tiny("qwen3")
    study = run(model, copy.deepcopy(model), word_tokenizer)
    assert study.removal is None and "removal" not in study.meta["sections"]
    summary = study.summary()
    for name in ("h_cosine", "z_cosine", "p_cosine", "layerwise_p_cosine", "pruned_identical"):
        assert (summary[name].mean, summary[name].low, summary[name].high) == (1, 1, 1), name
    for name in ("kl_dense_pruned", "kl_pruned_dense", "kl_estimate", "flipped"):
        assert summary[name].mean == 0, name
    assert np.isnan(summary["first_divergence"].mean)
    assert summary["options_agreement"].mean == summary["options_kendall"].mean == 1
    assert study.scores["dense"] == study.scores["pruned"]


def test_only_what_is_asked_for(dropped, word_tokenizer):
    study = run(*dropped, word_tokenizer, sections=("removal", "theory"))
    made = {name for name in SECTIONS if getattr(study, name) is not None}
    assert made == {"removal", "theory"}
    study = run(*dropped, word_tokenizer, sections=("scores",), choices=None)
    assert {name for name in SECTIONS if getattr(study, name) is not None} == {"scores"}
    assert "accuracy" not in study.scores["dense"] and "chrf" in study.scores["pruned"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sections": ("layer",)}, "unknown section 'layer': use some of layerwise"),
        ({"sections": ("theory",)}, "ask for layerwise too"),
        ({"sections": ("subspace",), "choices": None}, "give choices"),
        ({"sections": ("answers",), "questions": None}, "give questions"),
        ({"asking": Asking(max_new_tokens=64)}, "the model's context is 64"),
        ({"max_new_tokens": 62}, "context is 64"),
        ({"temperature": -1.0}, "must be above 0"),
        ({"layerwise_prompts": 0}, "at least 1"),
    ],
    ids=str,
)
def test_bad_input_is_found_before_the_work(tiny, word_tokenizer, monkeypatch, options, message):
    model = tiny("llama")
    monkeypatch.setattr(generation, "generate", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(PrunekitError, match=message):
        run(model, model, word_tokenizer, **options)


def test_no_prompts_and_mismatched_models(tiny, word_tokenizer):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match="no prompts"):
        compare(model, model, [], tokenizer=word_tokenizer)
    with pytest.raises(PrunekitError, match="vocabulary size"):
        run(model, tiny("llama", vocab_size=99), word_tokenizer)


def test_a_point_of_a_sweep_equals_a_comparison(tiny, word_tokenizer):
    model = tiny("llama")
    pruned = copy.deepcopy(model)
    drop_sublayers_(pruned, attn=[1, 2], mlp=[2])
    study = run(model, pruned, word_tokenizer, sections=("answers", "scores"))
    asked = {"choices": CHOICES, "questions": QUESTIONS, "asking": ASKING, "progress": False}
    found = sweep(model, word_tokenizer, {"pruned": pruned}, kl=False, speed=False, **asked)
    (row,) = found.rows
    assert row.changes == {
        "accuracy": study.accuracy_change(),
        "exact_match": study.answer_change(),
    }
    for name, interval in row.scores.items():
        assert interval == study.scores["pruned"][name], name
    assert {"accuracy", "exact_match", "same_answer", "answer_chrf"} <= row.scores.keys()


def test_a_shared_baseline_changes_nothing_but_the_work(dropped, word_tokenizer, monkeypatch):
    model, pruned = dropped
    alone = run(model, pruned, word_tokenizer).to_dict()
    options = {"max_new_tokens": 6, "batch_size": 2, "progress": False}
    baseline = Baseline(model, word_tokenizer, **options)
    baseline.rollouts(PROMPTS)
    baseline.single_step(CHOICES)
    baseline.replies(QUESTIONS, ASKING)
    asked = []

    def noting(plain):
        return lambda one, *args, **kwargs: (asked.append(one), plain(one, *args, **kwargs))[1]

    monkeypatch.setattr(generation, "generate", noting(generation.generate))
    monkeypatch.setattr(quality, "single_step", noting(quality.single_step))
    shared = run(model, pruned, word_tokenizer, baseline=baseline).to_dict()
    assert asked and not any(one is model for one in asked)
    del alone["meta"]["seconds"], shared["meta"]["seconds"]
    assert_same(shared, alone)
    with pytest.raises(PrunekitError, match="another model"):
        run(pruned, pruned, word_tokenizer, baseline=baseline)
    with pytest.raises(PrunekitError, match="max_new_tokens"):
        run(model, pruned, word_tokenizer, baseline=baseline, max_new_tokens=5)


def test_a_model_and_itself(tiny, word_tokenizer):
    model = tiny("llama")
    one, two = (run(model, other, word_tokenizer) for other in (model, copy.deepcopy(model)))
    assert_same(one.scores["pruned"]["perplexity"].mean, two.scores["pruned"]["perplexity"].mean)
    assert not np.nansum(one.decoding.teacher_forced["kl_dense_pruned"])
    assert_same(one.decoding.to_dict(), two.decoding.to_dict())


def _process(rank, port, path, make_models, make_tokenizer):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dense, pruned = make_models
    study = run(dense, pruned, make_tokenizer)
    if rank == 1:  # every process has the whole study, not only the main one
        with open(path, "w") as file:
            json.dump(study.to_dict(), file)
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_study(tiny, word_tokenizer, perturbed, tmp_path):
    model = tiny("llama")
    models = (model, perturbed(model))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "study.json"
    mp.spawn(_process, (port, str(path), models, word_tokenizer), nprocs=2)
    alone = run(*models, word_tokenizer).to_dict()
    together = json.loads(path.read_text())
    assert together["meta"]["processes"] == 2
    for section in ("layerwise", "accumulated", "decoding", "subspace", "scores", "theory"):
        assert_same(json.loads(json.dumps(alone[section])), together[section], rtol=1e-3)


@pytest.mark.slow
def test_embedded_model_is_identical_to_itself():
    from prunekit import checkpoint
    from prunekit.evaluation.items import load_choices, load_prompts

    dense, tokenizer = checkpoint.load("demo")
    twin, _ = checkpoint.load("demo")
    prompts = [prompt.prompt for prompt in load_prompts()[:4]]
    study = compare(
        dense,
        twin,
        prompts,
        tokenizer=tokenizer,
        choices=load_choices()[:8],
        max_new_tokens=24,
        layerwise_prompts=2,
        layerwise_steps=24,
        batch_size=3,
        progress=False,
    )
    grids = (study.layerwise, study.accumulated, study.decoding.teacher_forced)
    for grid in (*grids, study.decoding.free_running):
        there = ~np.isnan(grid["entropy_dense"])
        for name in ("h_cosine", "z_cosine", "p_cosine"):
            assert (grid[name][there] == 1).all(), name
        for name in ("kl_dense_pruned", "kl_pruned_dense", "kl_estimate", "flipped", "h_alpha"):
            assert (grid[name][there] == 0).all(), name
        for name in ("h", "z", "p"):
            assert (grid[f"{name}_one_minus_cosine"][there] == 0).all(), name
    assert all(text.first_divergence is None for text in study.decoding.generations)
    assert study.scores["dense"] == study.scores["pruned"]
