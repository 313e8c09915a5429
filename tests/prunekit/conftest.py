"""Tiny random models of every supported architecture, built from configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from prunekernels import nm_mask
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prunekit.models.architectures import Architecture

LAYERS = 4
_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS = {
    **_GQA,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": _GQA,
    "mistral": {**_GQA, "sliding_window": 6},
    "qwen2": _GQA,
    "qwen3": _GQA,
    "gemma2": {**_GQA, "sliding_window": 6, "layer_types": _SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_GQA,
        "sliding_window": 6,
        "layer_types": _SLIDING,
        "query_pre_attn_scalar": 8,
    },
    "phi3": {**_COMMON, "num_key_value_heads": 2},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": _COMMON,
    "gpt_neox": {**_COMMON, "rotary_pct": 0.5},
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": _EXPERTS,
}


def make_tiny(name: str, **changes: object) -> PreTrainedModel:
    """A seeded, random, eval-mode float32 model of architecture `name`."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **{**CONFIGS[name], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the default initialisation is so small that layers hardly act
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_tiny_24(name: str, **changes: object) -> PreTrainedModel:
    """A tiny model pruned to 2:4 by magnitude, with matrices that packing makes smaller."""
    sizes: dict[str, object] = {"hidden_size": 64, "intermediate_size": 128}
    if name == "opt":
        sizes = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
    if name.endswith("moe"):
        sizes["shared_expert_intermediate_size"] = 64
    model = make_tiny(name, **{**sizes, **changes})
    arch = Architecture(model)
    for index in range(len(arch.layers)):
        for ref in arch.weights(index):
            ref.matrix.mul_(nm_mask(ref.matrix.abs(), keep=2, of=4))
    return model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for `architecture` once per supported architecture."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", sorted(CONFIGS))


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(name, **config_changes)` builds a tiny model."""
    return make_tiny


@pytest.fixture
def tiny_24() -> Callable[..., PreTrainedModel]:
    """`tiny_24(name, **config_changes)` builds a tiny model that is 2:4."""
    return make_tiny_24


@pytest.fixture
def token_ids() -> torch.Tensor:
    """(2, 12) random token ids of the tiny vocabulary, special tokens left out."""
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Word "w7" is token 7; 0 pads, 2 ends a text, and the letters A to D are 93 to 96."""
    words = {f"w{token}": token for token in range(93)}
    words = {{0: "<pad>", 2: "<end>"}.get(token, word): token for word, token in words.items()}
    words |= {letter: 93 + index for index, letter in enumerate("ABCD")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@pytest.fixture
def perturbed() -> Callable[..., PreTrainedModel]:
    """`perturbed(model, scale)` is a copy with seeded noise on the matrices of its layers."""

    def make(model: PreTrainedModel, scale: float = 0.05) -> PreTrainedModel:
        other = copy.deepcopy(model)
        draw = torch.Generator().manual_seed(5)
        for index in range(len(Architecture(other).layers)):
            for ref in Architecture(other).weights(index):
                ref.matrix.add_(torch.randn(ref.matrix.shape, generator=draw) * scale)
        return other

    return make
