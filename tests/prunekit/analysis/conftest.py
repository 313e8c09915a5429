"""A tokenizer for the tiny models, and noise that stands in for weight pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prunekit.architectures import Architecture


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
