"""Swapping packed 2:4 weights into models: same results, less memory, reversible, per instance."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from prunekernels.sparse.layer import Expected
from torch import nn
from transformers import AutoModelForCausalLM

import prunekit as pk
from prunekit import packed
from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.packed import FORMATS
from prunekit.packed.modules import FusedGatedMLP, MergedLinear, PackedLinear, packed_layers


def logits(model, token_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids).logits


def assert_close(got, want) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_swapped_models_compute_the_same_and_come_back(tiny_24, architecture, token_ids):
    model = tiny_24(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = logits(model, token_ids)
    report = pk.swap_(model, formats=["2:4"])
    assert_close(logits(model, token_ids), want)
    linears = [r for r in report.modules if r.reason != "experts stored as one tensor"]
    assert {r.name for r in linears if not r.format and "hardly smaller" not in r.reason} <= {
        "lm_head",
        "embed_out",
        *(r.name for r in linears if r.name.endswith("shared_expert_gate")),
    }
    assert report.swapped and all(r.format == "2:4" for r in report.swapped)
    assert report.bytes < 0.6 * report.dense_bytes
    names = {name for name, _ in packed_layers(model)}
    assert names == {r.name for r in report.swapped}
    fused = {r.fused for r in report.swapped} - {""}
    attention = Architecture(model).attentions()[0]
    assert ("q_proj+k_proj+v_proj" in fused) == hasattr(attention, "q_proj")
    silu = {"llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"}
    assert ("gate_proj+up_proj" in fused) == (architecture in silu)
    assert sorted(pk.unswap_(model)) == sorted(names)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model, token_ids), want)
    assert not any(isinstance(m, PackedLinear | FusedGatedMLP) for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_sparsities_are_packed_as_a_bitmap(tiny, token_ids, name):
    model = tiny(name, hidden_size=64)
    pk.prune_(model, pk.Magnitude(pattern="4:8"))
    Architecture(model).last_projection(2, "mlp")[0].zero_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = logits(model, token_ids)
    report = pk.swap_(model)
    formats = [r.format for r in report.swapped]
    assert formats.count("2:4") == 1 and formats.count("bitmap") == len(formats) - 1
    assert [r.name for r in report.left_dense] == ["lm_head"]
    assert report.bytes < 0.6 * report.dense_bytes
    assert_close(logits(model, token_ids), want)
    fused = {r.fused for r in report.swapped} - {""}
    llama = {"q_proj+k_proj+v_proj", "gate_proj+up_proj"}
    assert fused == (llama if name == "llama" else set())
    # packed as layers of their own, they compute the same as stacked ones
    apart = {n: layer.weight.to_dense() for n, layer in packed_layers(model)}
    assert apart.keys() == {r.name for r in report.swapped}
    assert all(torch.equal(apart[n], before[n + ".weight"]) for n in apart if name == "llama")
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {layer.weight.dtype for _, layer in packed_layers(half)} == {torch.bfloat16}
    assert half(token_ids).logits.isfinite().all()
    pk.unswap_(model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_only_this_instance_changes(tiny_24, token_ids):
    model, other = tiny_24("llama"), tiny_24("llama")
    forward = type(model).forward
    pk.swap_(model)
    assert type(model).forward is forward
    assert not any(isinstance(m, PackedLinear) for m in other.modules())
    assert type(other.model.layers[0].mlp) is not FusedGatedMLP


@pytest.mark.parametrize("merge", [True, False])
def test_copies_pickles_and_state_dicts(tiny_24, token_ids, merge):
    model = tiny_24("qwen2")
    pk.swap_(model, merge=merge)
    want = logits(model, token_ids)
    twin = copy.deepcopy(model)
    owners = {id(m) for m in model.modules() if isinstance(m, PackedLinear)}
    assert not owners & {id(m) for m in twin.modules()}
    parts = [m for m in twin.modules() if isinstance(m, packed.MergedPart)]
    assert bool(parts) == merge and all(id(p.owner) not in owners for p in parts)
    assert torch.equal(logits(twin, token_ids), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), token_ids), want)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "model.layers.0.mlp.gate_proj.packed" in state
    for name, tensor in twin.named_buffers():
        if name.endswith("packed"):
            tensor.zero_()
    assert not torch.equal(logits(twin, token_ids), want)
    twin.load_state_dict(state)
    assert torch.equal(logits(twin, token_ids), want)
    pk.unswap_(twin)
    assert_close(logits(twin, token_ids), want)


@pytest.mark.parametrize(
    ("position", "value"), [(0, 2), (1, 127), (2, 60), (3, 0)], ids=["version", "out", "in", "type"]
)
def test_states_that_do_not_fit_change_no_packed_layer(tiny_24, position, value):
    model = tiny_24("llama")
    pk.swap_(model)
    name = "model.layers.1.mlp.gate_proj"
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state[f"{name}.header"][position] = value
    state[f"{name}.packed"].zero_()
    layer = model.get_submodule(name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"{name}\.header is .*prunekit\.load"):
        model.load_state_dict(state)
    assert all(torch.equal(layer.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize("merge", [True, False])
def test_moving_to_another_type_converts_the_packed_values(tiny_24, token_ids, merge):
    model = tiny_24("qwen2")
    dense = copy.deepcopy(model).to(torch.bfloat16)
    pk.swap_(model, merge=merge)
    model.to(torch.bfloat16)
    assert all(layer.weight.dtype == torch.bfloat16 for _, layer in packed_layers(model))
    exact = logits(copy.deepcopy(dense).double(), token_ids)
    eager = (logits(dense, token_ids) - exact).abs().max()
    assert (logits(model, token_ids) - exact).abs().max() <= 2 * eager
    pk.unswap_(model)
    assert torch.equal(logits(model, token_ids), logits(dense, token_ids))
    moved = tiny_24("llama")
    pk.swap_(moved)
    assert {b.device.type for b in moved.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("static", [False, True])
def test_generation(tiny_24, static):
    model = tiny_24("llama")
    dense = copy.deepcopy(model)
    pk.swap_(model)
    ids = torch.randint(3, 97, (2, 5))
    options = dict(max_new_tokens=10, do_sample=False, min_new_tokens=10)
    if static:
        options["cache_implementation"] = "static"
    got = model.generate(ids, **options)
    assert got.shape == (2, 15)
    assert torch.equal(got, dense.generate(ids, **options))


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gpt2"))]
)
def test_compiles_as_one_graph(tiny_24, token_ids, name):
    model = tiny_24(name, num_hidden_layers=1)
    pk.swap_(model)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=token_ids).logits, logits(model, token_ids))
    torch._dynamo.reset()


@pytest.mark.slow
def test_decoding_with_a_static_cache_compiles_with_inductor(tiny_24):
    from transformers import StaticCache

    model = tiny_24("llama", num_hidden_layers=1)
    dense = copy.deepcopy(model)
    pk.swap_(model)
    step = torch.compile(model.forward, fullgraph=True)
    ids = torch.randint(3, 97, (1, 8))
    results = []
    for call in (step, dense.forward):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            outs = [
                call(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                for i in range(8)
            ]
        results.append(torch.cat(outs, 1))
    assert_close(*results)


def test_gradients_reach_what_lies_before(tiny_24, token_ids):
    model = tiny_24("llama")
    dense = copy.deepcopy(model)
    pk.swap_(model)
    for each in (model, dense):
        each(token_ids).logits.square().sum().backward()
    assert_close(model.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad)
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))
    with pytest.raises(ValueError, match=r"to_dense\(\)"):
        layer.weight.requires_grad_()
    assert all(p.requires_grad for p in model.parameters())
    pk.unswap_(model)
    assert all(p.requires_grad for p in model.parameters())


def test_save_pretrained_writes_packed_layers_packed(tiny_24, tmp_path, token_ids):
    model = tiny_24("llama")
    pk.swap_(model, min_speedup=2.0)
    model.save_pretrained(tmp_path / "nothing packed")
    pk.swap_(model)
    want = logits(model, token_ids)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.save_pretrained(tmp_path / "packed", state_dict=each.state_dict())  # as a trainer does
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert any(isinstance(module, PackedLinear) for module in again.modules())
        assert_close(logits(again, token_ids), want)
        each.save_pretrained(tmp_path / "no main process", is_main_process=False)
        assert not (tmp_path / "no main process").exists()
        with pytest.raises(PrunekitError, match="upload the folder"):
            each.save_pretrained(tmp_path / "hub", push_to_hub=True)
        pk.unswap_(each)
        each.save_pretrained(tmp_path / "dense")
        again = type(model).from_pretrained(tmp_path / "dense").state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in each.state_dict().items())


def test_training_says_that_packed_weights_are_not_trained(tiny_24):
    model = tiny_24("llama")
    pk.swap_(model)
    with pytest.warns(UserWarning, match=r"not trained.*unswap_\(model\) before training"):
        model.train()
    assert model.training and model.model.layers[0].mlp.down_proj.training


def test_what_stays_dense_and_why(tiny_24):
    model = tiny_24("llama", tie_word_embeddings=True)
    layers = model.model.layers
    with torch.no_grad():
        layers[0].mlp.down_proj.weight[3, 8:12] = 1.0
    layers[1].mlp.up_proj.weight = layers[1].mlp.gate_proj.weight
    layers[2].self_attn.o_proj.__class__ = type("Special", (nn.Linear,), {})
    report = pk.swap_(model, formats=["2:4"])
    why = {r.name: r.reason for r in report.left_dense}
    assert why == {
        "model.layers.0.mlp.down_proj": "not 2:4: row 3, columns 8 to 11 hold 4 non-zeros",
        "model.layers.1.mlp.gate_proj": "shares its weight with another module",
        "model.layers.1.mlp.up_proj": "shares its weight with another module",
        "model.layers.2.self_attn.o_proj": "is a Special",
        "lm_head": "output head",
        **{
            f"model.layers.{i}.self_attn.o_proj": "hardly smaller as 2:4: 1.06 of the dense bytes"
            for i in (0, 1, 3)
        },
    }
    assert len(report.swapped) + len(why) == len(report.modules) == 29
    by_name = {r.name: r for r in report.modules}
    assert by_name["model.layers.0.mlp.gate_proj"].fused == "gate_proj+up_proj"
    assert by_name["model.layers.1.mlp.gate_proj"].fused == ""
    assert by_name["model.layers.1.mlp.down_proj"].speedup < 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    table = report.table()
    assert "not 2:4" in table and "dense" in table and "0.5312" in table
    assert "model.layers.0.mlp.down_proj" in report.table(verbose=True)


def test_on_a_cpu_it_says_that_nothing_is_faster(tiny_24):
    report = pk.swap_(tiny_24("llama"))
    assert not report.faster and report.device == "cpu"
    assert "not faster on this machine" in report.verdict
    asked = tiny_24("llama")
    refused = pk.swap_(asked, min_speedup=1.0, formats=["2:4"])
    assert not refused.swapped and "Nothing was packed" in refused.verdict
    assert {r.reason.partition(":")[0] for r in refused.left_dense} == {
        "slower as 2",
        "hardly smaller as 2",
        "output head",
    }
    data = refused.to_dict()
    assert data["packed"] == 0 and data["modules"][0]["shape"] == [32, 64]


def test_the_table_decides_at_the_expected_number_of_tokens(tiny_24, monkeypatch):
    from prunekernels.sparse import tuning

    def expected(w, tokens):
        impl = "mma_sp" if tokens <= 64 else "eager"
        speedup = tuning.packed_speedup(impl, tokens, 4 * w.shape[0] * w.shape[1], w.nbytes)
        return Expected(speedup, impl, "as on a GPU")

    monkeypatch.setattr(FORMATS["2:4"], "expected", expected)
    decode = pk.swap_(tiny_24("llama"), min_speedup=1.0, tokens=4, formats=["2:4"])
    assert decode.faster and len(decode.swapped) == 24
    assert "faster at 4 token(s) a call (predicted)" in decode.verdict
    known = [replace(module, measured=True) for module in decode.modules]
    assert "(measured on this kind of GPU)." in replace(decode, modules=tuple(known)).verdict
    some = replace(decode, modules=(*known[:3], *decode.modules[3:]))
    count = sum(module.measured for module in some.swapped)
    assert f"for {count} of 24, else predicted" in some.verdict
    prefill = pk.swap_(tiny_24("llama"), min_speedup=1.0, tokens=4096, formats=["2:4"])
    assert not prefill.swapped
    assert "slower as 2:4: expected 0.93× (as on a GPU)" in prefill.left_dense[0].reason


def test_small_and_wide_layers_gain_what_bytes_predict():
    from prunekernels.sparse.tuning import packed_speedup

    def speedup(impl, tokens, weights, size=9 / 8):
        return packed_speedup(impl, tokens, 2 * weights, int(size * weights))

    small, large = speedup("mma_sp", 1, 576 * 1536), speedup("mma_sp", 1, 14336 * 4096)
    assert 1 < small < 1.1 < 1.5 < large < 16 / 9
    half, seventy = speedup("mma", 1, 14336 * 4096), speedup("mma", 1, 14336 * 4096, 0.725)
    # predicted: the low ends of what is expected
    assert 1.3 < half < 1.5 < seventy < 1.9
    assert 1 < speedup("mma", 1, 576 * 1536) < 1.1
    # without the tensor cores a bitmap takes more instructions than the dense layer has time for
    assert packed_speedup("triton", 1, 2 * 4096 * 4096, 9 * 4096 * 512, "bitmap") < 1
    assert speedup("eager", 1, 4096 * 4096) < 0.5
    assert speedup("eager", 4096, 4096 * 4096) < 1


def test_bad_arguments_change_nothing(tiny_24):
    model = tiny_24("llama")
    with pytest.raises(PrunekitError, match="unknown format '4:8': use one of 2:4, bitmap"):
        pk.swap_(model, formats=["4:8"])
    with pytest.raises(PrunekitError, match="tokens is 0"):
        pk.swap_(model, tokens=0)
    with pytest.raises(PrunekitError, match="meta"):
        pk.swap_(tiny_24("llama").to("meta"))
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_an_interruption_leaves_the_model_dense(tiny_24, monkeypatch, token_ids):
    model = tiny_24("llama")
    want, calls, pack = logits(model, token_ids), [], FORMATS["2:4"].pack

    def interrupted(weight):
        calls.append(weight)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return pack(weight)

    monkeypatch.setattr(FORMATS["2:4"], "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pk.swap_(model)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert torch.equal(logits(model, token_ids), want)


def test_packed_weights_are_not_pruned_again(tiny_24):
    model = tiny_24("llama")
    pk.swap_(model)
    with pytest.raises(PrunekitError, match="is packed: make the model dense first"):
        pk.prune_(model, pk.Magnitude(sparsity=0.6))
    pk.unswap_(model)
    assert pk.unswap_(model) == []
    pk.prune_(model, pk.Magnitude(sparsity=0.6))


def test_a_second_swap_finds_nothing_left(tiny_24, token_ids):
    model = tiny_24("llama")
    first = pk.swap_(model)
    want = logits(model, token_ids)
    assert not pk.swap_(model).swapped
    assert torch.equal(logits(model, token_ids), want)
    assert len(list(packed_layers(model))) == len(first.swapped)


def test_merged_projections_answer_in_any_order():
    layers = [
        PackedLinear(FORMATS["2:4"].pack(torch.eye(64)[:rows] * rows), None, "2:4")
        for rows in (32, 16, 48)
    ]
    owner = MergedLinear(layers)
    parts = [owner, packed.MergedPart(owner, 1), packed.MergedPart(owner, 2)]
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    want = {id(z): [layer(z) for layer in layers] for z in (x, y)}
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 1, 0, 2]):
        for place in order:
            assert torch.equal(parts[place](x), want[id(x)][place])
    first = parts[0](x)
    assert torch.equal(parts[1](y), want[id(y)][1])
    assert torch.equal(first, want[id(x)][0])


def test_sizes_count_packed_weights(tiny_24):
    model = tiny_24("llama")
    count = sum(p.numel() for p in model.parameters())
    before = packed.weight_bytes(model)
    report = pk.swap_(model)
    assert packed.weight_count(model) == count
    assert before - packed.weight_bytes(model) == report.dense_bytes - report.bytes


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])  # with biases; where nothing is merged
def test_a_merged_model_takes_a_checkpoint_that_has_its_projections_apart(tiny_24, token_ids, name):
    # what a trainer does that resumes: save_pretrained, then load_state_dict of the file
    model, other = tiny_24(name), tiny_24(name)
    apart = {key: tensor.clone() for key, tensor in packed_state_of(model).items()}
    pk.swap_(other)
    want = logits(other, token_ids)
    for key, buffer in other.named_buffers():
        if key.endswith("packed"):
            buffer.zero_()
    assert not torch.equal(logits(other, token_ids), want)
    found = other.load_state_dict(apart, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    assert torch.equal(logits(other, token_ids), want)
    # one that does not fit is refused, and changes no packed layer
    layer = next(key for key in apart if key.endswith("header"))
    apart[layer] = apart[layer].clone()
    apart[layer][1] += 8
    with pytest.raises(RuntimeError, match="load a state of this model"):
        other.load_state_dict(apart, strict=False)
    assert torch.equal(logits(other, token_ids), want)
    pk.unswap_(other)
    assert not any(m._load_state_dict_pre_hooks for m in other.modules())


def packed_state_of(model):
    pk.swap_(model, merge=False)
    return model.state_dict()


@pytest.mark.parametrize("wrong", [None, 3, "demo"])
def test_what_is_no_model_is_said_to_be_none(wrong):
    for call in (pk.unswap_, pk.warm_up_, pk.swap_, pk.load):
        if (call, wrong) != (pk.load, "demo"):
            with pytest.raises(pk.PrunekitError):
                call(wrong)
    with pytest.raises(pk.PrunekitError):
        pk.kld(wrong if wrong != "demo" else 3.5, [])
