"""Dropping: scores by hand, strategies against brute force, and what is left of the model."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.nn import functional as F

from prunekit.data.calibration import Calibration
from prunekit.errors import PrunekitError
from prunekit.models import blocks
from prunekit.models import dropped as modeling
from prunekit.models.architectures import Architecture
from prunekit.models.layouts import SUBLAYERS
from prunekit.pruning import Drop, cosines, drop_, dropping

LAYERS = 4


def drop(model, unit, count, tokens, strategy="discrete", **settings):
    return drop_(model, Drop(unit, count, strategy), tokens, progress=False, **settings)


def mean_cosine(a, b):
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())


@torch.no_grad()
def cosines_by_hand(model, tokens, without=()):
    """{("attn" | "mlp" | "block", layer): mean token cosine}, straight from the definitions.

    Layers are run whole through hooks on their own modules; `without` lists sublayers or blocks
    that contribute nothing.
    """
    arch = Architecture(model)
    seen = {}

    def keep(name):
        def hook(module, args, kwargs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    found = {}
    inputs = blocks.capture(arch, tokens)
    hidden = inputs.hidden
    for index, layer in enumerate(arch.layers):
        if ("block", index) in without:
            continue
        handles = []
        for sublayer in SUBLAYERS:
            branch = arch.branch(sublayer)
            last = getattr(layer, branch.post_norm or branch.modules[-1])
            handles.append(last.register_forward_hook(keep(sublayer), with_kwargs=True))
        out = blocks.run_layer(arch, index, hidden, inputs.kwargs[index])
        for handle in handles:
            handle.remove()
        attn = torch.zeros_like(hidden) if ("attn", index) in without else seen["attn"]
        after_attn = hidden + attn
        if ("attn", index) in without and not arch.parallel:
            mlp_out = arch.contribution(index, "mlp", after_attn, {})
        else:
            mlp_out = seen["mlp"].view_as(hidden)  # OPT's runs on flattened tokens
        mlp_out = torch.zeros_like(hidden) if ("mlp", index) in without else mlp_out
        mlp_input = hidden if arch.parallel else after_attn
        found["attn", index] = mean_cosine(hidden, hidden + attn)
        found["mlp", index] = mean_cosine(mlp_input, mlp_input + mlp_out)
        if any(part[0] != "block" for part in without):
            out = after_attn + mlp_out
        found["block", index] = mean_cosine(hidden, out)
        hidden = out
    return found


def ranked(found, units):
    return sorted((p for p in found if p[0] in units), key=lambda part: -found[part])


def parts_of(report):
    return [(part.unit, part.layer) for part in report.dropped]


@pytest.mark.parametrize("unit", ["attn", "mlp", "block"])
def test_scores_equal_the_definition(architecture, tiny, token_ids, unit):
    model = tiny(architecture)
    expected = cosines_by_hand(model, token_ids)
    report = drop(model, unit, 1, token_ids, batch_size=1)
    got = report.scores[unit]
    assert len(got) == LAYERS
    for layer, score in enumerate(got):
        assert score == pytest.approx(expected[unit, layer], rel=1e-6)
    assert parts_of(report) == ranked(expected, [unit])[:1]


def test_post_norms_count(tiny, token_ids):
    # Gemma 2: the contribution is what the post-norm returns, not what attention does
    model = tiny("gemma2")
    arch = Architecture(model)
    before = cosines_by_hand(model, token_ids)["attn", 0]
    for layer in arch.layers:
        layer.post_attention_layernorm.weight.data.fill_(9.0)
    report = drop(model, "attn", 1, token_ids)
    assert abs(report.scores["attn"][0] - before) > 0.1


def test_parallel_sublayers_score_against_the_layers_input(tiny, token_ids):
    expected = cosines_by_hand(tiny("gpt_neox"), token_ids)
    report = drop(tiny("gpt_neox"), "mlp", 1, token_ids)
    sequential = cosines_by_hand(tiny("gpt_neox", use_parallel_residual=False), token_ids)
    for layer in range(LAYERS):
        assert report.scores["mlp"][layer] == pytest.approx(expected["mlp", layer], rel=1e-6)
        assert abs(report.scores["mlp"][layer] - sequential["mlp", layer]) > 1e-3


def test_scores_average_over_tokens_of_ragged_sequences(tiny, token_ids):
    sequences = [token_ids[0], token_ids[1, :5], token_ids[1, 3:8]]
    report = drop(tiny("llama"), "attn", 1, sequences, batch_size=1)
    alone = [cosines_by_hand(tiny("llama"), sequence[None]) for sequence in sequences]
    for layer in range(LAYERS):
        total = sum(
            len(s) * found["attn", layer] for s, found in zip(sequences, alone, strict=True)
        )
        assert report.scores["attn"][layer] == pytest.approx(total / 22, rel=1e-6)
    assert (report.sequences, report.tokens) == (3, 22)


def test_nearly_equal_scores_keep_their_order_in_bfloat16(tiny, token_ids):
    # bf16 cosines are multiples of 0.0039; contributions this weak all look like 1 there
    model = tiny("llama").bfloat16()
    for index, layer in enumerate(Architecture(model).layers):
        layer.self_attn.o_proj.weight.data.mul_(1e-3 * (index + 1))
    found = drop(model, "attn", 2, token_ids).scores["attn"]
    assert all(score < 1 for score in found) and len(set(found)) == LAYERS
    assert all(1 - score < 1e-3 for score in found)


@pytest.mark.parametrize("unit", ["all", "block"])
def test_scores_in_bfloat16_are_close_and_leave_the_weights_alone(
    tiny, token_ids, unit, monkeypatch
):
    twin, model = tiny("llama"), tiny("llama")
    layers = []
    run = cosines._turned
    monkeypatch.setattr(
        cosines,
        "_turned",
        lambda *states: (
            layers.append(model.model.layers[0].mlp.up_proj.weight.dtype),
            run(*states),
        )[1],
    )
    rounded = drop_(model, Drop(unit, 1), token_ids, calibration_dtype=torch.bfloat16)
    assert torch.bfloat16 in layers
    monkeypatch.undo()
    exact = drop_(twin, Drop(unit, 1), token_ids)
    for name, scores in exact.scores.items():
        for score, other in zip(scores, rounded.scores[name], strict=True):
            assert score != other
            assert score == pytest.approx(other, abs=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with pytest.raises(PrunekitError, match="use bfloat16 or float32"):
        drop_(model, Drop(unit, 1), token_ids, calibration_dtype=torch.int8)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("direction", ["any", "parallel", "opposite"])
def test_angles_equal_float64_ones(size, direction):
    before = torch.randn(5, 40, 96)
    added = size * torch.randn(5, 40, 96)
    if direction != "any":
        added = (size if direction == "parallel" else -size) * before + 0.01 * added
    x, y = before.double(), before.double() + added.double()
    exact = 1 - F.cosine_similarity(x, y, dim=-1)
    found = cosines._turned(before, added)
    bound = added.double().square().sum(-1) / y.square().sum(-1)
    away = y.norm(dim=-1) > 0.1 * x.norm(dim=-1)  # what is left of x is more than its rounding
    error = (found - exact).abs()
    assert bool((error <= 1e-6 * bound.clamp_max(2.0) + 1e-5 * exact + 1e-15)[away].all())
    assert bool(((found >= 0) & (found <= 2)).all())


def test_angles_of_nothing():
    x = torch.randn(1, 96)
    zero = torch.zeros(1, 96)
    assert cosines._turned(x, zero).item() == 0
    assert cosines._turned(zero, zero).item() == 0
    assert cosines._turned(zero, x).item() == 1
    assert cosines._turned(x, -x).item() == 1


def test_hidden_states_are_streamed(tiny, token_ids, monkeypatch):
    model, held = tiny("llama"), []
    original = cosines._Pass.__call__

    def watch(self, hidden, batch, kwargs):
        held.append(hidden.data_ptr())
        return original(self, hidden, batch, kwargs)

    monkeypatch.setattr(cosines._Pass, "__call__", watch)
    layers_run = []
    contribution = Architecture.contribution
    monkeypatch.setattr(
        Architecture,
        "contribution",
        lambda *args: (layers_run.append(args[1:3]), contribution(*args))[1],
    )
    drop(model, "attn", 2, token_ids, batch_size=1)
    assert len(held) == 2 * LAYERS
    assert layers_run == [
        (layer, sublayer) for layer in range(LAYERS) for _ in range(2) for sublayer in SUBLAYERS
    ]  # every sublayer once per batch: one pass in all


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_discrete_drops_the_highest_scores(tiny, token_ids, name):
    expected = cosines_by_hand(tiny(name), token_ids)
    for unit in ("attn", "mlp", "block"):
        report = drop(tiny(name), unit, 3, token_ids)
        assert parts_of(report) == ranked(expected, [unit])[:3]


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_joint_ranks_attention_and_mlp_together(tiny, token_ids, name):
    expected = ranked(cosines_by_hand(tiny(name), token_ids), SUBLAYERS)
    for count in (1, 3, 5, 8):
        model = tiny(name)
        report = drop(model, "all", count, token_ids)
        assert parts_of(report) == expected[:count]
        attn = sorted(layer for unit, layer in expected[:count] if unit == "attn")
        mlp = sorted(layer for unit, layer in expected[:count] if unit == "mlp")
        assert model.config.drop_attn_list == attn == list(report.dropped_attn)
        assert model.config.drop_mlp_list == mlp == list(report.dropped_mlp)


def test_joint_is_not_attention_alone(tiny, token_ids):
    # "attn" in "all" is false: the research code's joint drop did nothing
    model = tiny("llama")
    size = sum(parameter.numel() for parameter in model.parameters())
    before = model(token_ids).logits
    report = drop(model, "all", LAYERS + 1, token_ids)
    assert report.dropped_attn and report.dropped_mlp
    assert sum(parameter.numel() for parameter in model.parameters()) < size
    assert not torch.allclose(before, model(token_ids).logits, atol=1e-3)


@pytest.mark.parametrize("unit", ["attn", "mlp", "block"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_consecutive_equals_brute_force(tiny, token_ids, unit, count):
    for name in ("llama", "gpt2"):
        found = cosines_by_hand(tiny(name), token_ids)
        runs = [
            run
            for run in itertools.combinations(range(LAYERS), count)
            if list(run) == list(range(run[0], run[0] + count))
        ]
        best = max(runs, key=lambda run: sum(found[unit, layer] for layer in run))
        report = drop(tiny(name), unit, count, token_ids, "consecutive")
        assert parts_of(report) == [(unit, layer) for layer in best]
        assert len(report.dropped) == count  # the research code scored n + 1 layers


def test_consecutive_on_made_up_scores():
    made_up = {("attn", layer): score for layer, score in enumerate([0.9, 0.1, 0.8, 0.7, 0.95])}
    chosen = dropping._best_window(made_up, Drop("attn", 2, "consecutive"))
    assert [part.layer for part in chosen] == [3, 4]
    chosen = dropping._best_window(made_up, Drop("attn", 3, "consecutive"))
    assert [part.layer for part in chosen] == [2, 3, 4]
    del made_up["attn", 3]  # absent already: no run may step over it
    chosen = dropping._best_window(made_up, Drop("attn", 2, "consecutive"))
    assert [part.layer for part in chosen] == [0, 1]
    with pytest.raises(PrunekitError, match="no 4 consecutive layers still have their attn"):
        dropping._best_window(made_up, Drop("attn", 4, "consecutive"))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("unit", ["attn", "mlp", "all", "block"])
def test_iterative_drops_one_and_scores_again(tiny, token_ids, name, unit):
    units = SUBLAYERS if unit == "all" else [unit]
    gone, scores = [], []
    for _ in range(3):
        found = cosines_by_hand(tiny(name), token_ids, without=gone)
        best = next(part for part in ranked(found, units) if part not in gone)
        gone.append(best)
        scores.append(found[best])
    report = drop(tiny(name), unit, 3, token_ids, "iterative")
    assert parts_of(report) == gone
    assert [part.score for part in report.dropped] == pytest.approx(scores, rel=1e-5)


def test_iterative_blocks_are_left_out_of_the_next_round(tiny, token_ids):
    model, shorter = tiny("llama"), tiny("llama")
    arch = Architecture(model)
    modeling.drop_blocks_(shorter, [1])
    got = cosines.mean_cosines(arch, [token_ids], ["block"], without=[("block", 1)])
    want = cosines.mean_cosines(Architecture(shorter), [token_ids], ["block"])
    assert list(got) == [("block", layer) for layer in (0, 2, 3)]
    assert list(got.values()) == pytest.approx(list(want.values()), rel=1e-6)


def test_iterative_equals_dropping_one_at_a_time_for_real(tiny, token_ids):
    model = tiny("llama", num_hidden_layers=3)
    layers = Architecture(model).layers
    for layer in layers:
        layer.mlp.down_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.data.mul_(0.05)
    twin = tiny("llama", num_hidden_layers=3)
    twin.load_state_dict(model.state_dict())
    first = drop(model, "attn", 2, token_ids, "iterative")
    second = drop(twin, "attn", 1, token_ids)
    assert first.dropped[0] == second.dropped[0]
    rescored = drop(twin, "attn", 1, token_ids)
    assert first.dropped[1].layer == rescored.dropped[0].layer
    assert first.dropped[1].score == pytest.approx(rescored.dropped[0].score, rel=1e-6)
    assert first.dropped[1].score != first.scores["attn"][first.dropped[1].layer]


@pytest.mark.parametrize("unit", ["attn", "mlp", "all", "block"])
def test_dropping_changes_the_model_itself(architecture, tiny, token_ids, unit):
    model, dense = tiny(architecture), tiny(architecture)
    report = drop(model, unit, 2, token_ids)
    before, after = dense(token_ids).logits, model(token_ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_after == size < report.parameters_before
    assert report.parameters_before == sum(parameter.numel() for parameter in dense.parameters())
    # the same as a dense model in which the dropped parts add nothing
    arch = Architecture(dense)
    for part in report.dropped:
        for unit_ in SUBLAYERS if part.unit == "block" else [part.unit]:
            for parameter in arch.last_projection(part.layer, unit_):
                parameter.zero_()
    torch.testing.assert_close(dense(token_ids).logits, after, rtol=1e-4, atol=1e-4)


def test_dropping_twice(tiny, token_ids):
    model = tiny("llama")
    first = drop(model, "attn", 1, token_ids)
    [gone] = first.dropped_attn
    second = drop(model, "all", 2, token_ids)
    assert second.scores["attn"][gone] is None  # absent: no score, and no candidate
    assert ("attn", gone) not in parts_of(second)
    by_hand = cosines_by_hand(tiny("llama"), token_ids, without=[("attn", gone)])
    del by_hand["attn", gone]
    assert parts_of(second) == ranked(by_hand, SUBLAYERS)[:2]  # states still flow through it
    for layer in range(LAYERS):
        assert second.scores["mlp"][layer] == pytest.approx(by_hand["mlp", layer], rel=1e-5)
    third = drop(model, "block", 1, token_ids)
    assert len(Architecture(model).layers) == LAYERS - 1
    assert third.scores["block"].index(max(third.scores["block"])) == third.dropped_blocks[0]


def test_every_attention_and_mlp_can_go(tiny, token_ids):
    model = tiny("llama")
    drop(model, "all", 2 * LAYERS, token_ids)
    hidden = model.model.embed_tokens(token_ids)
    torch.testing.assert_close(model(token_ids).logits, model.lm_head(model.model.norm(hidden)))


def test_report_as_data_and_table(tiny, token_ids):
    report = drop(tiny("llama"), "all", 3, token_ids)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["dropped_attn"] == list(report.dropped_attn)
    assert data["unit"] == "all" and data["tokens"] == 24
    assert len(data["dropped"]) == 3 and set(data["dropped"][0]) == {"unit", "layer", "score"}
    table = report.table()
    assert table.count("dropped") == 3 and len(table.splitlines()) == LAYERS + 1


def test_calibration_descriptions_are_resolved(tiny):
    report = drop(tiny("llama"), "attn", 1, Calibration(samples=2, length=6))
    assert (report.sequences, report.tokens) == (2, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("attention", 1), "unit 'attention' is unknown: use attn, mlp, all, block"),
        (("attn", 0), "count 0 drops nothing"),
        (("attn", 1, "random"), "strategy 'random' is unknown: use discrete"),
        (("all", 2, "consecutive"), "use unit attn, mlp or block, or strategy"),
    ],
    ids=str,
)
def test_impossible_settings(settings, message):
    with pytest.raises(PrunekitError, match=message):
        Drop(*settings)


@pytest.mark.parametrize(
    ("unit", "count", "message"),
    [
        ("attn", 5, "count 5 exceeds the 4 attn sublayers .* use count <= 4"),
        ("mlp", 99, "the 4 mlp sublayers"),
        ("all", 9, "the 8 attn and mlp sublayers"),
        ("block", 4, r"the 3 of its blocks \(one must stay\)"),
    ],
)
def test_counts_beyond_the_model(tiny, token_ids, unit, count, message):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match=message):
        drop(model, unit, count, token_ids)
    assert len(Architecture(model).layers) == LAYERS


def test_counts_beyond_what_is_left(tiny, token_ids):
    model = tiny("llama")
    modeling.drop_sublayers_(model, attn=[0, 1, 2])
    with pytest.raises(PrunekitError, match="exceeds the 1 attn sublayers"):
        drop(model, "attn", 2, token_ids)


def test_nan_is_named(tiny, token_ids):
    model = tiny("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PrunekitError, match="the mlp of layer 2 gives NaN"):
        drop(model, "mlp", 1, token_ids)
    assert not hasattr(model.config, "drop_mlp_list")
