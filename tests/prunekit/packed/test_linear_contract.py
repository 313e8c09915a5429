"""Whatever works on nn.Linear works on the packed layer that replaces it, or is refused clearly."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from torch.nn.utils import prune

import prunekit as pk
from prunekit.packed import modules as packed
from prunekit.packed.modules import PackedLinear, packed_layers


@pytest.fixture(params=["2:4", "bitmap"])
def pair(request, tiny_24):
    """A dense Llama and its packed copy, merged where the format allows it."""
    dense = tiny_24("llama")
    model = copy.deepcopy(dense)
    pk.swap_(model, formats=[request.param])
    assert any(isinstance(m, packed.MergedPart) for m in model.modules())
    return dense, model


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_the_dense_model(pair, token_ids, weights, asked):
    dense, model = pair
    exact = run(dense, token_ids)
    dense.to(weights)
    model.to(weights)
    with torch.autocast("cpu", asked):
        want, got = run(dense, token_ids), run(model, token_ids)
        layer = model.model.layers[0].mlp.down_proj
        assert layer(torch.randn(2, layer.in_features, dtype=weights)).dtype == asked
    assert got.dtype == want.dtype
    # no farther from the unrounded logits than twice what rounding costs the dense model
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max() + 1e-6


def test_gradients_under_autocast_keep_their_type(tiny_24, token_ids):
    exact, dense = tiny_24("llama"), tiny_24("llama")
    model = copy.deepcopy(dense)
    pk.swap_(model)
    for each in (dense, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(token_ids, labels=token_ids).loss
        loss.backward()
    exact(token_ids, labels=token_ids).loss.backward()
    got, usual, want = (m.model.embed_tokens.weight.grad for m in (model, dense, exact))
    assert got.dtype == torch.float32
    assert (got - want).norm() <= 2 * (usual - want).norm()


@pytest.mark.parametrize("merge", [True, False])
def test_conversions_of_a_live_model_work(tiny_24, token_ids, merge):
    dense = tiny_24("qwen2")  # with biases
    model = copy.deepcopy(dense)
    pk.swap_(model, merge=merge)
    exact = run(copy.deepcopy(dense).double(), token_ids)
    assert torch.equal(run(model.double(), token_ids), exact)
    assert run(model.float(), token_ids).dtype == torch.float32
    state = {name: layer.weight.to_dense() for name, layer in packed_layers(model)}
    assert all(torch.equal(t, dense.get_parameter(f"{n}.weight")) for n, t in state.items())
    model.half()
    dense.half()
    assert {layer.weight.dtype for _, layer in packed_layers(model)} == {torch.float16}
    # a type that computes nothing converts as nn.Linear does, rounding the values
    narrow = torch.float8_e5m2
    model.to(narrow).to(torch.float16)
    dense.to(narrow).to(torch.float16)
    pk.unswap_(model)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_model_of_another_type_comes_back_from_a_folder(
    tiny_24, word_tokenizer, tmp_path, token_ids
):
    model = tiny_24("llama")
    pk.swap_(model)
    model.double()
    loaded, _ = pk.load(pk.save(model, word_tokenizer, tmp_path / "double"))
    assert torch.equal(run(loaded, token_ids), run(model, token_ids))


def test_other_input_types_are_refused_as_by_nn_linear(pair):
    dense, model = pair
    x = torch.randn(1, 64, dtype=torch.float64)
    for each, error in ((dense, RuntimeError), (model, ValueError)):
        with pytest.raises(error):
            each.model.layers[0].mlp.down_proj(x[:, :1].expand(1, 96))
        with pytest.raises(error):
            each.model.layers[0].self_attn.q_proj(x)


def attention_of(pair):
    return (m.model.layers[0].self_attn for m in pair)


def close(got, want) -> bool:
    return bool((got - want).abs().max() <= 1e-5 * want.abs().max())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_projections_follow_their_input_through_in_place_changes(pair, mode):
    dense, merged = attention_of(pair)
    with mode():
        x = torch.randn(1, 3, 64)
        for change in (lambda: None, lambda: x.mul_(2), lambda: x[0, 0].zero_()):
            for name in ("q_proj", "k_proj", "v_proj", "k_proj"):
                change()
                assert close(getattr(merged, name)(x), getattr(dense, name)(x)), name


def test_gradients_reach_an_input_first_seen_without_them(pair):
    dense, merged = attention_of(pair)
    x = torch.randn(1, 3, 64, requires_grad=True)
    with torch.no_grad():
        merged.q_proj(x)
    merged.k_proj(x).sum().backward()
    got, x.grad = x.grad, None
    dense.k_proj(x).sum().backward()
    assert close(got, x.grad)


def test_loaded_weights_count_at_once(tiny_24):
    model, other = tiny_24("llama"), tiny_24("llama", initializer_range=0.2)
    for each in (model, other):
        pk.swap_(each, formats=["2:4"])
    ours, theirs = (m.model.layers[0].self_attn for m in (model, other))
    x = torch.randn(1, 3, 64)
    ours.q_proj(x), ours.k_proj(x)
    model.load_state_dict(other.state_dict())
    for name in ("k_proj", "v_proj", "q_proj"):
        assert torch.equal(getattr(ours, name)(x), getattr(theirs, name)(x))


def test_in_place_changes_by_a_hook_inside_the_attention_count(pair, token_ids):
    for each in pair:
        each.model.layers[1].self_attn.k_proj.register_forward_pre_hook(
            lambda module, args: (args[0].mul_(1.5), None)[1]
        )
    dense, model = pair
    assert (run(model, token_ids) - run(dense, token_ids)).abs().max() < 1e-4


def test_no_activation_outlives_the_call(pair):
    _, merged = attention_of(pair)
    alive = []
    for name in ("q_proj", "k_proj"):
        x = torch.randn(1, 3, 64)
        out = getattr(merged, name)(x)
        alive += [weakref.ref(x), weakref.ref(out)]
    del x, out
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_a_failing_attention_leaves_nothing_waiting(pair, token_ids):
    _, model = pair
    attention = model.model.layers[0].self_attn

    def fail(module, args):
        raise OverflowError

    handle = attention.o_proj.register_forward_pre_hook(fail)
    before = run(pair[0], token_ids)
    with pytest.raises(OverflowError):
        run(model, token_ids)
    handle.remove()
    owner = attention.q_proj
    assert owner._waiting is None and not owner._running
    assert (run(model, token_ids) - before).abs().max() < 1e-4


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_projections_are_called_and_removed(tiny_24, token_ids, when):
    model = tiny_24("llama")
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp", "mlp.down_proj")
    want, seen, handles = {}, {}, []

    def watch(store):
        for name in names:
            hook = (
                model.model.layers[1]
                .get_submodule(name)
                .register_forward_hook(
                    lambda m, args, out, name=name: store.__setitem__(name, out.detach().clone())
                )
            )
            handles.append(hook)

    watch(want)
    run(model, token_ids)
    for handle in handles:
        handle.remove()
    if when == "before":
        watch(seen)
    pk.swap_(model)
    if when == "after":
        watch(seen)
    run(model, token_ids)
    assert set(seen) == set(names)
    assert all(close(seen[name], want[name]) for name in names)
    for handle in handles:
        handle.remove()
    seen.clear()
    run(model, token_ids)
    pk.unswap_(model)
    run(model, token_ids)
    assert not seen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_merged_layers_can_be_offloaded(tiny_24, token_ids, name):
    model = tiny_24(name)
    pk.swap_(model)
    want = run(model, token_ids)
    x = torch.randn(1, 3, 64)
    alone = None
    if name != "gpt2":
        alone = model.model.layers[0].self_attn.v_proj(x)
    cpu_offload(model)
    assert torch.equal(run(model, token_ids), want)
    if alone is not None:  # a part whose owner is offloaded
        assert torch.equal(model.model.layers[0].self_attn.v_proj(x), alone)


def test_a_dense_state_is_refused_by_name(tiny_24):
    model = tiny_24("llama")
    dense = copy.deepcopy(model).state_dict()
    pk.swap_(model)
    with pytest.raises(RuntimeError, match=r"down_proj\.weight is dense.*unswap_"):
        model.load_state_dict(dense, strict=False)


def test_weights_that_other_tensors_give_stay_dense(tiny_24, token_ids):
    model = tiny_24("llama")
    layer = model.model.layers[0].mlp.down_proj
    prune.l1_unstructured(layer, "weight", amount=0.7)
    want = run(model, token_ids)
    report = pk.swap_(model)
    why = {r.name: r.reason for r in report.left_dense}
    assert why["model.layers.0.mlp.down_proj"] == "its weight is computed from other tensors"
    assert not isinstance(model.model.layers[0].mlp.down_proj, PackedLinear)
    assert close(run(model, token_ids), want)
