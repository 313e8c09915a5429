"""Local reconstruction: what it minimises, what it never changes, and when it stops."""

from __future__ import annotations

import copy

import pytest
import torch
from pruned_models import prune, refs_of

from prunekit.errors import PrunekitError
from prunekit.models import blocks
from prunekit.models.architectures import Architecture
from prunekit.pruning import Magnitude, Recipe, Reconstruction, Wanda
from prunekit.pruning.descent import descend


@pytest.fixture
def sequences():
    """(12, 12) random token ids of the tiny vocabulary."""
    return torch.randint(3, 97, (12, 12), generator=torch.Generator().manual_seed(11))


def masked_line(outputs=6, width=10, tokens=64):
    """Inputs by item, targets, a pruned start and its mask, for one linear layer."""
    draw = torch.Generator().manual_seed(2)
    true = torch.randn(outputs, width, generator=draw)
    mixing = torch.eye(width) + torch.randn(width, width, generator=draw) / 2
    inputs = torch.randn(4, tokens, width, generator=draw) @ mixing
    keep = torch.rand(outputs, width, generator=draw) > 0.5
    return inputs, inputs @ true.t(), true * keep, keep


def squares(inputs, targets):
    def errors(state, item):
        found = (inputs[item] @ state["w"].t() - targets[item]).square().sum(-1)
        return found.sum(), found.numel()

    return errors


def test_descent_reaches_the_least_squares_of_its_mask():
    inputs, targets, start, keep = masked_line()
    settings = Reconstruction(steps=200, tokens=256, lr=0.05, patience=8)
    items = [0, 1, 2, 3]
    sizes = dict.fromkeys(items, 64)
    best, fit = descend(
        {"w": start}, {"w": keep}, squares(inputs, targets), items, items, sizes, settings
    )
    flat, wanted = inputs.flatten(0, 1).double(), targets.flatten(0, 1).double()
    least = 0.0
    for row in range(len(keep)):
        columns = flat[:, keep[row]]
        answer = torch.linalg.lstsq(columns, wanted[:, row : row + 1]).solution
        least += float((columns @ answer - wanted[:, row : row + 1]).square().sum()) / len(flat)
    assert fit.before > 1.1 * least
    assert (1 - 1e-6) * least < fit.least < 1.002 * least  # sums of float32
    assert (best["w"][~keep] == 0).all()


def test_an_update_takes_no_item_twice():
    inputs, targets, start, keep = masked_line()
    usual, calls = squares(inputs, targets), []

    def errors(state, item):
        calls.append(item)
        return usual(state, item)

    settings = Reconstruction(steps=2, tokens=10**6, checks=1)
    sizes = dict.fromkeys(range(4), 64)
    descend({"w": start}, {"w": keep}, errors, [0, 1, 2], [3], sizes, settings)
    fitted = [item for item in calls if item != 3]
    assert sorted(fitted[:3]) == sorted(fitted[3:]) == [0, 1, 2]


def test_held_out_items_decide():
    inputs, targets, start, keep = masked_line()
    targets[3] = inputs[3] @ start.t()  # on which the start is perfect
    settings = Reconstruction(steps=40, tokens=64, patience=2)
    sizes = dict.fromkeys(range(4), 64)
    best, fit = descend(
        {"w": start}, {"w": keep}, squares(inputs, targets), [0, 1, 2], [3], sizes, settings
    )
    assert torch.equal(best["w"], start)
    assert fit.before == fit.least == 0 and fit.steps == 10  # two checks of eight
    assert "did not fall" in fit.note


def test_what_is_not_finite_ends_it_with_the_last_good_state():
    inputs, targets, start, keep = masked_line()
    usual, calls = squares(inputs, targets), []

    def errors(state, item):
        calls.append(item)
        found, count = usual(state, item)
        return (found * float("nan") if len(calls) > 30 else found), count

    settings = Reconstruction(steps=100, tokens=64, checks=50)
    sizes = dict.fromkeys(range(4), 64)
    best, fit = descend({"w": start}, {"w": keep}, errors, [0, 1, 2], [3], sizes, settings)
    assert "not finite" in fit.note
    assert best["w"].isfinite().all() and fit.least < fit.before


def test_reported_errors_are_those_of_the_block(tiny, sequences):
    model, dense = tiny("llama"), tiny("llama")
    settings = Reconstruction(steps=6, tokens=48, held_out=0.25)
    report = prune(model, Wanda(), sequences, reconstruct=settings)
    held = torch.stack(settings.split(list(sequences))[1])
    assert len(held) == 3 and [block.layer for block in report.blocks] == [0, 1, 2, 3]
    with torch.no_grad():
        after = model(held, output_hidden_states=True).hidden_states
        wanted = dense(held, output_hidden_states=True).hidden_states
    for block in report.blocks[:-1]:  # what follows the last block is the final norm
        given, target = after[block.layer + 1].double(), wanted[block.layer + 1].double()
        error = ((given - target).square().sum(-1) / target.square().sum(-1)).mean()
        assert block.after == pytest.approx(float(error), rel=1e-4)
        assert block.after < block.before


def test_zeros_stay_and_errors_fall_on_every_architecture(tiny, sequences, architecture):
    model = tiny(architecture)
    twin = copy.deepcopy(model)
    settings = Reconstruction(steps=4, tokens=64, held_out=0.25)
    prune(twin, Wanda(), sequences[:, :8])
    masks = [ref.matrix == 0 for ref in refs_of(twin)[:3]]
    report = prune(model, Wanda(), sequences[:, :8], reconstruct=settings)
    assert report.zeros == sum(int((ref.matrix == 0).sum()) for ref in refs_of(model))
    improved = [block.after < block.before for block in report.blocks]
    assert improved[0] and sum(improved) >= 2, report.blocks
    for ref, other, mask in zip(refs_of(model), refs_of(twin), masks, strict=False):
        assert torch.equal(ref.matrix == 0, mask)  # the first block's inputs are alike
        assert not torch.equal(ref.matrix, other.matrix)


@torch.no_grad()
def test_a_reconstructed_model_is_nearer_on_tokens_that_it_never_saw(tiny):
    ids = torch.randint(3, 97, (32, 12), generator=torch.Generator().manual_seed(5))
    fresh, seen = ids[:8], ids[8:]
    wanted = tiny("llama", num_hidden_layers=2)(fresh).logits.log_softmax(-1)
    divergence = []
    for settings in (None, Reconstruction(steps=20, tokens=72)):
        model = tiny("llama", num_hidden_layers=2)
        prune(model, Magnitude(pattern="2:4"), seen, reconstruct=settings)
        given = model(fresh).logits.log_softmax(-1)
        divergence.append(float((wanted.exp() * (wanted - given)).sum(-1).mean()))
    assert divergence[1] < 0.9 * divergence[0], divergence


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_passes_may_run_in_bfloat16(tiny, sequences, dtype):
    model = tiny("llama").to(dtype)
    report = prune(
        model,
        Magnitude(pattern="2:4"),
        sequences,
        reconstruct=Reconstruction(steps=10, tokens=60),
        calibration_dtype=torch.bfloat16,
    )
    assert report.zeros * 2 == report.size and "held-out" in report.table()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert sum(block.after < block.before for block in report.blocks) >= 3


def test_a_killed_run_goes_on_to_the_same_bytes(tiny, sequences, tmp_path):
    settings = Reconstruction(steps=4, tokens=60)
    states, reports = [], []
    for _ in range(2):
        model = tiny("gpt2")
        report = prune(
            model, Wanda(), sequences, reconstruct=settings, journal=tmp_path / "journal"
        )
        states.append(model.state_dict())
        reports.append(report.to_dict())
        for block in (2, 3):
            (tmp_path / "journal" / f"block-{block:04d}.safetensors").unlink()
    assert reports[0] == reports[1]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    with pytest.raises(PrunekitError, match="another reconstruct"):
        prune(tiny("gpt2"), Wanda(), sequences, journal=tmp_path / "journal")


def test_blocks_without_a_pruned_matrix_are_left_alone(tiny, sequences):
    model, twin = tiny("llama"), tiny("llama")
    ref = refs_of(model)[8]
    settings = Reconstruction(steps=10, tokens=72)
    report = prune(model, Recipe({ref.name: Wanda()}), sequences, reconstruct=settings)
    [block] = report.blocks
    assert block.layer == ref.layer and block.after < block.before
    arch, other = Architecture(model), Architecture(twin)
    for index in range(len(arch.layers)):
        same = [
            torch.equal(one, two)
            for one, two in zip(
                arch.parameters(index).values(), other.parameters(index).values(), strict=True
            )
        ]
        assert all(same) if index != ref.layer else not any(same)


def test_a_layer_runs_with_other_parameters(tiny, token_ids):
    arch = Architecture(tiny("gemma2"))
    inputs = blocks.capture(arch, token_ids)
    layer = arch.layers[1]
    doubled = {name: 2 * value for name, value in layer.named_parameters()}
    with torch.no_grad():
        given = blocks.run_layer_with(layer, doubled, inputs.hidden, inputs.kwargs[1])
        before = blocks.run_layer(arch, 1, inputs.hidden, inputs.kwargs[1])
        for parameter in layer.parameters():
            parameter.mul_(2)
        assert torch.equal(given, blocks.run_layer(arch, 1, inputs.hidden, inputs.kwargs[1]))
    assert not torch.equal(given, before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps 0 is too small"),
        ({"lr": 0.0}, "lr 0.0 is not positive"),
        ({"held_out": 1.0}, "held_out 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(PrunekitError, match=said):
        Reconstruction(**settings)


def test_too_little_calibration_is_refused(tiny, sequences):
    with pytest.raises(PrunekitError, match="at least 2 samples"):
        prune(tiny("llama"), Wanda(), sequences[:1], reconstruct=Reconstruction())
    with pytest.raises(PrunekitError, match="reconstruction needs calibration"):
        prune(tiny("llama"), Magnitude(), reconstruct=Reconstruction())
