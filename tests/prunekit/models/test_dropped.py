"""Dropped sublayers are really gone, and cached decoding stays right whatever is dropped."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from prunekit.errors import PrunekitError
from prunekit.models import dropped as modeling
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.models.layouts import SUBLAYERS, SUPPORTED

EVERY = (0, 1, 2, 3)
# (attn, mlp): with the alternating layers of the tiny Gemmas, {1, 3} keeps only sliding attentions
# and {0, 2} only full ones.
SUBSETS = [
    ((0,), ()),
    ((0, 2), (1,)),
    ((1, 3), (0, 3)),
    ((1, 2), EVERY),
    ((0, 1, 2), ()),
    (EVERY, ()),
    (EVERY, EVERY),
]


def sequence(batch: int = 2, tokens: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids longer than the tiny models' sliding window (6); row 0 has left padding."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 97, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    return ids, mask


def decode(model, ids, mask, prefill, cache=None):
    """Logits (batch, tokens, vocabulary) of a prefill and single-token steps, and the cache."""
    out = model(ids[:, :prefill], attention_mask=mask[:, :prefill], past_key_values=cache)
    logits = [out.logits]
    for end in range(prefill + 1, ids.shape[1] + 1):
        step = {"attention_mask": mask[:, :end], "past_key_values": out.past_key_values}
        out = model(ids[:, end - 1 : end], **step)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), out.past_key_values


def greedy_without_cache(model, ids, mask, count):
    """`ids` continued by `count` greedy tokens, running the whole sequence each time."""
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def filled_layers(cache) -> int:
    return sum(layer.is_initialized for layer in cache.layers)


@torch.inference_mode()
def test_dropping_changes_logits(architecture, tiny, token_ids):
    for sublayer in SUBLAYERS:
        for index in EVERY:
            model = tiny(architecture)
            dense = model(token_ids).logits
            drop_sublayers_(model, **{sublayer: [index]})
            assert (model(token_ids).logits - dense).abs().max() > 1e-3


@torch.inference_mode()
def test_dropping_equals_zeroing_the_last_projection(architecture, tiny, token_ids):
    for attn, mlp in SUBSETS:
        dropped, silenced = tiny(architecture), tiny(architecture)
        drop_sublayers_(dropped, attn=attn, mlp=mlp)
        for sublayer, indices in (("attn", attn), ("mlp", mlp)):
            for index in indices:
                for parameter in Architecture(silenced).last_projection(index, sublayer):
                    parameter.zero_()
        expected = silenced(token_ids).logits
        torch.testing.assert_close(dropped(token_ids).logits, expected, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_cached_decoding_equals_uncached(architecture, tiny, subset):
    attn, mlp = subset
    model = tiny(architecture)
    drop_sublayers_(model, attn=attn, mlp=mlp)
    ids, mask = sequence()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    for prefill in (4, 9):  # shorter and longer than the sliding window
        logits, cache = decode(model, ids, mask, prefill)
        torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
        assert len(cache.layers) == filled_layers(cache) == max(4 - len(attn), 1)
        assert cache.get_seq_length() == ids.shape[1]


@torch.inference_mode()
@pytest.mark.parametrize("subset", [((0,), (2,)), ((1, 3), ()), (EVERY, (0,))], ids=str)
def test_generate_equals_an_uncached_greedy_loop(architecture, tiny, subset):
    attn, mlp = subset
    model = tiny(architecture)
    drop_sublayers_(model, attn=attn, mlp=mlp)
    ids, mask = sequence(tokens=8)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert out.sequences.tolist() == greedy_without_cache(model, ids, mask, 6).tolist()
    assert filled_layers(out.past_key_values) == max(4 - len(attn), 1)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("attn", [(0,), (1, 3), EVERY], ids=str)
def test_generate_with_a_static_cache_and_with_beams(name, attn, tiny):
    model = tiny(name)
    drop_sublayers_(model, attn=attn, mlp=[2])
    ids, mask = sequence(tokens=8)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = greedy_without_cache(model, ids, mask, 6).tolist()
    static = {"cache_implementation": "static", "disable_compile": True}
    assert model.generate(ids, attention_mask=mask, **static, **settings).tolist() == expected
    beams = {"attention_mask": mask, "num_beams": 3, **settings}
    uncached = model.generate(ids, use_cache=False, **beams)
    assert model.generate(ids, **beams).tolist() == uncached.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_caches_made_by_the_caller(name, tiny):
    model = tiny(name)
    drop_sublayers_(model, attn=[0])
    ids, mask = sequence()
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=ids.shape[1]),
    ):
        logits, _ = decode(model, ids, mask, 5, cache)
        torch.testing.assert_close(logits[mask == 1], expected, rtol=1e-4, atol=1e-4)
    # Given by position, as nobody should.
    base, cache = Architecture(model).base, DynamicCache(config=model.config)
    by_position = base(ids, mask, None, cache).last_hidden_state
    expected = base(ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(by_position[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 3


@torch.inference_mode()
def test_no_cache_unless_asked(tiny, token_ids):
    model = tiny("llama")
    drop_sublayers_(model, attn=[1])
    assert model(token_ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(token_ids).past_key_values is None


@torch.inference_mode()
def test_a_cache_of_another_model_is_refused(tiny, token_ids):
    three, two = tiny("llama"), tiny("llama")
    drop_sublayers_(three, attn=[1])
    drop_sublayers_(two, attn=[1, 2])
    cache = three(token_ids).past_key_values
    with pytest.raises(PrunekitError, match="pass an empty cache"):
        two(token_ids[:, :1], past_key_values=cache)


@torch.inference_mode()
def test_qwen_with_some_sliding_layers(tiny):
    sliding = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    for attn in ((0,), (0, 1), (2, 3), (1, 3)):
        model = tiny("qwen2", **sliding)
        assert model.config.layer_types[1:3] == ["full_attention", "sliding_attention"]
        drop_sublayers_(model, attn=attn)
        ids, mask = sequence()
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        logits, _ = decode(model, ids, mask, 4)
        torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)


def test_dropped_parameters_are_absent(architecture, tiny):
    model = tiny(architecture)
    arch = Architecture(model)
    gone: set[str] = set()
    for sublayer, index in (("attn", 0), ("mlp", 1), ("mlp", 3)):
        branch = arch.branch(sublayer)
        parts = {branch.norm, *branch.modules, branch.post_norm} - {None}
        prefixes = tuple(f"{arch.layout.layers}.{index}.{part}." for part in parts)
        gone |= {name for name in model.state_dict() if name.startswith(prefixes)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    kept = set(model.state_dict()) - gone
    drop_sublayers_(model, attn=[0], mlp=[1, 3])
    assert set(model.state_dict()) == kept
    assert len(gone) >= 6  # three sublayers: their norms and at least one matrix each
    expected = sum(size for name, size in sizes.items() if name not in gone)
    assert model.num_parameters() == expected


def test_dropped_attention_is_not_run(tiny, token_ids):
    model = tiny("llama")
    runs: list[str] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: runs.append(f"attn{index}"))
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.append(f"mlp{index}"))
    drop_sublayers_(model, attn=[0, 3], mlp=[1])
    model(token_ids)
    assert runs == ["mlp0", "attn1", "attn2", "mlp2", "mlp3"]


def test_class_and_configuration_follow(architecture, tiny):
    model = tiny(architecture)
    stock, kept_config = type(model), model.config
    attention = model.config._attn_implementation
    drop_sublayers_(model, attn=[2])
    drop_sublayers_(model, attn=[0], mlp=[1])
    assert isinstance(model, stock) and type(model).__name__ == f"Prunekit{stock.__name__}"
    assert type(model) is AutoModelForCausalLM._model_mapping[type(model.config)]
    assert model.config.model_type == f"prunekit_{kept_config.model_type}"
    assert (model.config.drop_attn_list, model.config.drop_mlp_list) == ([0, 2], [1])
    assert model.config._attn_implementation == attention
    # Another model may share the configuration object it was built from.
    assert type(kept_config) is stock.config_class and not hasattr(kept_config, "drop_attn_list")
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


@torch.inference_mode()
def test_a_model_built_from_the_configuration_lacks_the_same(architecture, tiny, token_ids):
    model = tiny(architecture)
    drop_sublayers_(model, attn=[0, 1], mlp=[3])
    config = type(model.config).from_dict(model.config.to_dict())
    built = AutoModelForCausalLM.from_config(config).eval()
    built.load_state_dict(model.state_dict())
    assert type(built) is type(model)
    assert torch.equal(built(token_ids).logits, model(token_ids).logits)


@torch.inference_mode()
def test_copies_and_pickles_work(tiny, token_ids):
    model = tiny("opt")
    drop_sublayers_(model, attn=EVERY)
    expected = model(token_ids).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(token_ids).logits, expected)
        cached, _ = decode(clone, token_ids, torch.ones_like(token_ids), 5)
        torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_dropped_blocks_leave_a_stock_model(architecture, tiny):
    model, by_sublayer = tiny(architecture), tiny(architecture)
    stock = type(model)
    drop_blocks_(model, [1, 2])
    drop_sublayers_(by_sublayer, attn=[1, 2], mlp=[1, 2])
    ids, mask = sequence()
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    expected = by_sublayer(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=1e-6, atol=1e-6)
    assert type(model) is stock and model.config.num_hidden_layers == 2
    assert Architecture(model).original_layers == [0, 3]
    cached, cache = decode(model, ids, mask, 4)
    torch.testing.assert_close(cached[mask == 1], logits[mask == 1], rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 2


@torch.inference_mode()
def test_blocks_and_sublayers_together(tiny):
    model = tiny("gemma2")
    stock = type(model)
    drop_sublayers_(model, attn=[1, 2], mlp=[0])
    drop_blocks_(model, [0])
    assert (model.config.drop_attn_list, model.config.drop_mlp_list) == ([0, 1], [])
    ids, mask = sequence()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    logits, cache = decode(model, ids, mask, 4)
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 1
    drop_blocks_(model, [0, 1])  # nothing partial is left: a stock model again
    assert type(model) is stock and model.config.model_type == "gemma2"
    assert "drop_attn_list" not in model.config.to_dict()
    model(ids)


def test_compiles_in_one_graph_with_its_cache(tiny, token_ids):
    model = tiny("llama")
    drop_sublayers_(model, attn=[0], mlp=[1])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        out, expected = compiled(token_ids), model(token_ids)
    torch.testing.assert_close(out.logits, expected.logits)
    assert filled_layers(out.past_key_values) == 3


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_gradients_reach_what_is_left(tiny, token_ids):
    model = tiny("qwen3").train()
    drop_sublayers_(model, attn=[0], mlp=[3])
    model.gradient_checkpointing_enable()
    model(token_ids, labels=token_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn": [4]}, "attn index 4 is out of range: use 0 to 3"),
        ({"mlp": [-1]}, "mlp index -1 is out of range"),
        ({"attn": [1], "mlp": [2]}, "mlp of layer 2 is already dropped"),
    ],
    ids=str,
)
def test_bad_indices_leave_the_model_alone(tiny, token_ids, arguments, message):
    model = tiny("llama")
    drop_sublayers_(model, mlp=[2])
    names, logits = list(model.state_dict()), model(token_ids).logits
    with pytest.raises(PrunekitError, match=message):
        drop_sublayers_(model, **arguments)
    assert list(model.state_dict()) == names and torch.equal(model(token_ids).logits, logits)
    assert model.config.drop_attn_list == []


def test_bad_blocks_are_refused(tiny):
    model = tiny("gpt2")
    with pytest.raises(PrunekitError, match="block index 9 is out of range"):
        drop_blocks_(model, [9])
    with pytest.raises(PrunekitError, match="keep at least one"):
        drop_blocks_(model, EVERY)
    with pytest.raises(PrunekitError, match="scale_attn_by_inverse_layer_idx"):
        drop_blocks_(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), [0])
    assert len(model.transformer.h) == 4


def test_a_class_of_its_own_is_refused(tiny):
    model = tiny("llama")
    model.__class__ = type("MyLlama", (type(model),), {})
    with pytest.raises(PrunekitError, match="load the model as LlamaForCausalLM"):
        drop_sublayers_(model, attn=[0])
    assert not hasattr(model.config, "drop_attn_list")


def test_nothing_to_drop_changes_nothing(tiny):
    model = tiny("llama")
    before = type(model), model.config
    drop_sublayers_(model)
    drop_blocks_(model, [])
    assert (type(model), model.config) == before


def test_drop_lists_as_llm_drop_writes_them():
    flags = [False, True, False, True]
    config = AutoConfig.for_model("prunekit_llama", num_hidden_layers=4, drop_attn_list=flags)
    assert (config.drop_attn_list, config.drop_mlp_list) == ([1, 3], [])
    assert modeling.normalize_drop_list([3, 0, 3]) == [0, 3]
    assert modeling.normalize_drop_list([False] * 4) == []
    for wrong in ("0,1", [0.5], {"0": True}, 3):
        with pytest.raises(PrunekitError, match="layer indices"):
            modeling.normalize_drop_list(wrong)
    config = AutoConfig.for_model(
        "prunekit_llama", num_hidden_layers=2, hidden_size=32, vocab_size=9, drop_mlp_list=[5]
    )
    with pytest.raises(PrunekitError, match="drop_mlp_list index 5 is out of range"):
        AutoModelForCausalLM.from_config(config)


def test_every_architecture_has_its_classes():
    for name in SUPPORTED:
        config = AutoConfig.for_model(f"prunekit_{name}")
        made = modeling.model_class(name)
        assert made.config_class is type(config)
        assert issubclass(made, modeling.stock_class(name)) and issubclass(made, nn.Module)
        assert getattr(modeling, made.__name__) is made
    with pytest.raises(AttributeError):
        _ = modeling.PrunekitNothing
