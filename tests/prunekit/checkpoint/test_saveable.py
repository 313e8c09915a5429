"""What `load` could not read is not written, and not pruned for hours either."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

import prunekit as pk
from prunekit.errors import PrunekitError
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.models.saveable import check_saveable


class Adapted(nn.Module):
    """A LoRA layer that was not merged."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def cut(model):
    model.model.layers = model.model.layers[:2]


def doubled(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def renumbered(model):
    cut(model)
    model.config.num_hidden_layers = 2
    model.config.layer_types = ["full_attention"] * 4


def adapted(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)


def masked(model):
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.5)


def parametrised(model):
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Identity())


def compiled(model):
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp)


def value_head(model):
    model.v_head = nn.Linear(32, 1)


def resized(model):
    model.lm_head = nn.Linear(32, 100, bias=False)
    model.model.embed_tokens = nn.Embedding(100, 32)


def biased(model):
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.zeros(48))


def without_norm(model):
    model.model.layers[0].input_layernorm = nn.Identity()


def fewer_heads(model):
    attention = model.model.layers[0].self_attn
    attention.o_proj = nn.Linear(16, 32, bias=False)


def untied(model):
    model.config.tie_word_embeddings = True


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


CHANGES = {
    cut: "has 2 layers, and its configuration says 4.*drop_blocks_",
    doubled: "has 5 layers, and its configuration says 4",
    renumbered: r"no model can be built from model\.config|layer_types",
    adapted: r"merge_and_unload\(\)",
    masked: r"prune\.remove",
    parametrised: "remove_parametrizations",
    compiled: "compiled",
    value_head: r"model\.pretrained_model",
    resized: "resize_token_embeddings",
    biased: r"up_proj\.bias.*put the stock module back",
    without_norm: r"lacks model\.layers\.0\.input_layernorm\.weight",
    fewer_heads: r"o_proj\.weight has shape \(32, 16\).*implies \(32, 32\)",
    untied: "set it to False",
    tied: "set it to True",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_models_that_left_their_configuration_are_refused(
    change, tiny, word_tokenizer, token_ids, tmp_path
):
    model = tiny("llama", tie_word_embeddings=False)
    check_saveable(model)
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for work in (
        lambda: pk.save(model, word_tokenizer, tmp_path / "out"),
        lambda: pk.prune_(model, pk.Wanda(0.5), token_ids, progress=False),
        lambda: pk.drop_(model, pk.Drop("attn", 1), token_ids, progress=False),
    ):
        with pytest.raises(PrunekitError, match=CHANGES[change]):
            work()
    assert not (tmp_path / "out").exists()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "mistral"])
def test_classification_heads_are_refused(tiny, word_tokenizer, token_ids, tmp_path, name):
    config = tiny(name, pad_token_id=0).config
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(PrunekitError, match=r"no causal language model.*load it as"):
        pk.prune_(model, pk.Magnitude(0.5))
    with pytest.raises(PrunekitError, match="no causal language model"):
        pk.save(model, word_tokenizer, tmp_path / "out")


def test_what_is_in_step_is_accepted(tiny, tiny_24, architecture, token_ids, word_tokenizer):
    model = tiny_24(architecture)
    check_saveable(model)
    pk.swap_(model)
    check_saveable(model)
    drop_blocks_(model, [1])
    drop_sublayers_(model, attn=[0], mlp=[1])
    check_saveable(model)
    pk.unswap_(model)
    check_saveable(model)
    own = type("Own", (LlamaForCausalLM,), {})
    check_saveable(own(tiny("llama").config))
    grown = tiny("llama")
    grown.resize_token_embeddings(120)
    check_saveable(grown)
