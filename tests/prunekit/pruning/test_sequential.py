"""The sequence of blocks: what each is calibrated on, experts, ties, reports."""

from __future__ import annotations

import json

import pytest
import torch
from pruned_models import inputs_of, prune, refs_of
from torch import nn

from prunekit.models import blocks
from prunekit.models import dropped as modeling
from prunekit.models.architectures import Architecture
from prunekit.pruning import (
    Drop,
    Magnitude,
    Recipe,
    SparseGPT,
    Wanda,
    drop_,
    importance,
    input_statistics,
    patterns,
    prune_,
    sparsegpt,
    stream,
)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_each_layer_is_calibrated_on_the_pruned_layers_before_it(tiny, token_ids, name):
    model, twin = tiny(name), tiny(name)
    prune(model, Wanda(), token_ids)
    arch = Architecture(twin)
    for index in range(len(arch.layers)):
        inputs = inputs_of(twin, token_ids)  # layers before this one are pruned, it is not yet
        for ref in arch.weights(index):
            found = importance.wanda(ref.matrix, inputs[ref.name].double().square().mean(0))
            worst = found.argsort(dim=-1, stable=True)[:, : found.shape[1] // 2]
            ref.matrix.scatter_(1, worst, 0)
    for ref, other in zip(refs_of(model), refs_of(twin), strict=True):
        assert torch.equal(ref.matrix, other.matrix), ref.name


def test_relative_error_is_the_matrices_output_error(tiny, token_ids):
    model = tiny("llama")
    ref = next(ref for ref in refs_of(model) if ref.name.endswith("1.mlp.down_proj"))
    inputs, dense = inputs_of(model, token_ids)[ref.name], ref.matrix.clone()
    report = prune(model, Recipe({ref.name: Magnitude()}), token_ids)
    [matrix] = report.matrices  # 24 tokens: fewer than are sampled at most
    expected = (inputs @ (dense - ref.matrix).t()).norm() / (inputs @ dense.t()).norm()
    assert matrix.relative_error == pytest.approx(float(expected), rel=1e-5)
    assert len(report.left_dense) == len(refs_of(model)) - 1


def test_rows_for_the_error_are_spread_over_all_batches():
    collector = input_statistics.LayerCollector(
        [ref for ref in _linear_refs(4, 6)], hessians=set(), batches=3
    )
    for batch in range(3):
        inputs = torch.full((100, 4), float(batch))
        collector.observe(lambda inputs=inputs: collector_module(inputs), batch)
    collector.finish()
    [found] = collector.groups.values()
    rows = found.sampled[:, 0]
    assert len(rows) == input_statistics.SAMPLED_ROWS
    assert [int((rows == batch).sum()) for batch in range(3)] == [42, 43, 43]
    assert found.tokens == 300
    assert found.mean_square.tolist() == [pytest.approx(5 / 3)] * 4


def _linear_refs(width, out):
    from prunekit.models.weight_refs import WeightRef

    global collector_module
    collector_module = nn.Linear(width, out)
    yield WeightRef("w", 0, "mlp", collector_module, input_group="w")


def test_results_do_not_depend_on_batching(tiny, token_ids):
    models = [tiny("qwen2") for _ in range(3)]
    prune(models[0], Wanda(), token_ids, batch_size=1)
    prune(models[1], Wanda(), token_ids, batch_size=8)
    prune(models[2], Wanda(), list(token_ids), batch_size=2)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])
        assert torch.equal(value, models[2].state_dict()[name])


def test_sequences_of_different_lengths_count_by_their_tokens(tiny, token_ids):
    model, twin = tiny("llama"), tiny("llama")
    prune(model, Wanda(), [token_ids[0], token_ids[1, :4]])
    arch = Architecture(twin)
    whole, short = inputs_of(twin, token_ids[:1]), inputs_of(twin, token_ids[1:, :4])
    for ref in arch.weights(0):
        squares = torch.cat([whole[ref.name], short[ref.name]]).double().square().mean(0)
        found = importance.wanda(ref.matrix, squares)
        mask = importance.select(found, patterns.parse("unstructured"), per_row=True)
        pruned = next(other for other in refs_of(model) if other.name == ref.name)
        assert torch.equal(pruned.matrix != 0, mask)


def test_keyword_arguments_are_shared_only_where_they_are_equal(tiny, token_ids, monkeypatch):
    capture = blocks.capture

    def by_tokens(arch, ids):  # as an architecture would whose layers also read the token ids
        inputs = capture(arch, ids)
        for kwargs in inputs.kwargs:
            kwargs["ids"] = ids
        return inputs

    arch, rows = Architecture(tiny("llama")), list(token_ids[:, None])

    def held():
        seen = []
        stream.Stream(arch, [*rows, rows[0]]).visit(1, lambda h, batch, kwargs: seen.append(kwargs))
        return seen

    first, second, third = held()
    assert first is second is third
    monkeypatch.setattr(blocks, "capture", by_tokens)
    first, second, third = held()
    assert first is third and first is not second
    assert torch.equal(second["ids"], rows[1])


def test_any_number_of_sequences(tiny):
    # the research code's buffers held exactly 128
    tokens = torch.randint(3, 97, (133, 3))
    report = prune(tiny("llama", num_hidden_layers=1), Wanda(), tokens, batch_size=50)
    assert (report.sequences, report.tokens) == (133, 399)


def test_magnitude_runs_no_pass_and_needs_no_calibration(tiny, monkeypatch):
    def fail(*args):
        raise AssertionError("a layer ran")

    monkeypatch.setattr(blocks, "run_layer", fail)
    report = prune(tiny("llama"), Magnitude(0.3))
    assert all(matrix.relative_error is None for matrix in report.matrices)
    assert (report.sequences, report.tokens) == (0, 0)


def test_passes_over_the_calibration_data(tiny, token_ids, monkeypatch):
    passes = []
    original = blocks.run_layer
    monkeypatch.setattr(
        blocks, "run_layer", lambda *args: (passes.append(args[1]), original(*args))[1]
    )
    prune(tiny("llama"), Recipe({"*.1.*": Wanda(), "*.2.mlp.*": Magnitude()}), token_ids)
    # layer 0 only propagates, the last pruned layer isn't run again, layer 3 not at all
    assert passes == [0, 1, 1, 2]


def test_matrices_of_one_input_share_one_hessian(tiny, token_ids, monkeypatch):
    factored = []
    original = sparsegpt.inverse_factor
    monkeypatch.setattr(
        sparsegpt,
        "inverse_factor",
        lambda hessian, damping: (factored.append(len(hessian)), original(hessian, damping))[1],
    )
    prune(tiny("llama", num_hidden_layers=1), SparseGPT(), token_ids)
    assert factored == [32, 32, 32, 48]  # q+k+v, o, gate+up, down


def test_the_dense_pass_stops_once_all_inputs_are_read(tiny, token_ids):
    model = tiny("llama", num_hidden_layers=1)
    ran = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda *args: ran.append("down_proj"))
    prune(model, Wanda(), token_ids)
    assert ran == []  # its input is read, its output would be thrown away
    assert not model.model.layers[0].self_attn.q_proj._forward_pre_hooks


def test_dropped_models_can_be_pruned(tiny, token_ids):
    model = tiny("gemma2")
    modeling.drop_sublayers_(model, attn=[0, 1], mlp=[2])
    report = prune(model, SparseGPT(pattern="2:4"), token_ids)
    assert report.sparsity == 0.5
    assert not any(".0.self_attn" in matrix.name for matrix in report.matrices)


def test_training_mode_and_seed_are_left_alone(tiny, token_ids):
    model = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    twin = tiny("gpt2")
    model.train()
    state = torch.get_rng_state()
    prune(model, Wanda(), token_ids)
    assert model.training and torch.equal(state, torch.get_rng_state())
    prune(twin, Wanda(), token_ids)
    for ref, other in zip(refs_of(model), refs_of(twin), strict=True):
        assert torch.equal(ref.matrix, other.matrix)


def test_a_pruned_model_still_trains(tiny, token_ids):
    model = tiny("llama")
    prune(model, SparseGPT(), token_ids)
    model(token_ids, labels=token_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_experts_are_scored_on_the_tokens_routed_to_them(tiny, token_ids):
    model, twin = tiny("mixtral"), tiny("mixtral")
    prune(model, Recipe({"*.0.mlp.*": Wanda()}), token_ids)
    arch = Architecture(twin)
    calls = []
    experts = twin.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        twin(token_ids)
    hidden, chosen = calls[0][0], calls[0][1]
    pruned = {ref.name: ref.matrix for ref in refs_of(model)}
    for ref in arch.weights(0):
        if ref.expert is None:
            continue
        inputs = hidden[(chosen == ref.expert).any(-1)]
        if ref.parameter == "down_proj":
            gate, up = (inputs @ experts.gate_up_proj[ref.expert].t()).chunk(2, dim=-1)
            inputs = nn.functional.silu(gate) * up
        found = importance.wanda(ref.matrix, inputs.detach().double().square().mean(0))
        mask = importance.select(found, patterns.parse("unstructured"), per_row=True)
        assert torch.equal(pruned[ref.name] != 0, mask), ref.name


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), SparseGPT(pattern="2:4")], ids=str)
def test_experts_without_a_token_fall_back_to_magnitude_and_say_so(tiny, method):
    model = tiny("mixtral")
    report = prune(model, method, torch.tensor([[5, 6]]))  # 4 routings per layer at most
    silent = [matrix for matrix in report.matrices if matrix.note]
    assert silent and all("no calibration token" in matrix.note for matrix in silent)
    assert all(".experts." in matrix.name for matrix in silent)
    assert all(matrix.relative_error is None for matrix in silent)
    assert {matrix.sparsity for matrix in report.matrices} == {0.5}
    dense = {ref.name: ref.matrix for ref in refs_of(tiny("mixtral"))}
    pruned = {ref.name: ref.matrix for ref in refs_of(model)}
    per_row = not isinstance(method, SparseGPT)
    for matrix in silent:
        found = importance.magnitude(dense[matrix.name])
        mask = importance.select(found, method.target, per_row=per_row)
        assert torch.equal(pruned[matrix.name], dense[matrix.name] * mask)
    assert silent[0].name in report.table()


@pytest.mark.parametrize("method", [Magnitude, Wanda])
def test_ties_never_over_prune(tiny, token_ids, method):
    model = tiny("llama")
    for ref in refs_of(model):
        ref.matrix.copy_(ref.matrix.sign() * 0.5)
    report = prune(model, method(sparsity=0.3), token_ids)
    for ref, matrix in zip(refs_of(model), report.matrices, strict=True):
        rows, width = ref.matrix.shape
        exact = rows * int(0.3 * width + 1e-9) if method is Wanda else int(0.3 * rows * width)
        assert matrix.zeros == exact


def test_zeros_that_were_there_count_as_pruned_first(tiny, token_ids):
    model = tiny("llama")
    prune(model, Wanda(sparsity=0.25), token_ids)
    before = {ref.name: ref.matrix == 0 for ref in refs_of(model)}
    report = prune(model, Wanda(), token_ids)
    assert report.sparsity == 0.5
    for ref in refs_of(model):
        assert bool((ref.matrix == 0)[before[ref.name]].all())


def test_report_as_data_and_table(tiny, token_ids):
    model = tiny("mixtral")
    recipe = Recipe({"*.self_attn.*": SparseGPT(pattern="2:4"), "*": Magnitude(0.25)})
    report = prune(model, recipe, token_ids)
    data = json.loads(json.dumps(report.to_dict()))
    assert Recipe.from_dict(data["recipe"]) == recipe
    assert data["zeros"] == sum(int((ref.matrix == 0).sum()) for ref in refs_of(model))
    assert data["kept"] + data["zeros"] == data["size"]
    assert data["matrices"][0]["name"] == "model.layers.0.self_attn.q_proj"
    table = report.table().splitlines()
    assert [line.split()[:5] for line in table[1:]][-2] == [
        "mlp.experts.down_proj", "16", "32×48", "magnitude", "unstructured",
    ]  # fmt: skip
    assert len(report.table(verbose=True).splitlines()) == len(report.matrices) + 2


def test_reports_say_in_which_type_calibration_ran(tiny, token_ids):
    for dtype, name in ((torch.bfloat16, "bfloat16"), (None, None)):
        settings = {"calibration_dtype": dtype, "progress": False}
        found = [
            prune_(tiny("llama"), Wanda(), token_ids, **settings),
            drop_(tiny("llama"), Drop("attn", 1), token_ids, **settings),
        ]
        for report in found:
            assert report.to_dict()["calibration_dtype"] == name
            told = "Calibration passes ran in bfloat16, on copies of the weights: activations"
            assert (told in report.table()) == (name is not None)
    magnitude = prune(tiny("llama"), Magnitude(), calibration_dtype=torch.bfloat16)
    assert magnitude.calibration_dtype is None  # no pass ran
