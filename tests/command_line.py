"""What the tests of the command line share: a tiny model, its tokenizer, folders seen twice."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

CONTEXT = 512
QUESTIONS = [
    {"question": f"Which is {n}?", "options": ["one", "two", "six", "ten"], "answer": n % 4}
    for n in range(3)
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    # " A" … must be one token each, as the option letters of multiple choice are
    vocabulary |= {f"Ġ{letter}": len(vocabulary) + i for i, letter in enumerate("ABCD")}
    bytewise = Tokenizer(models.BPE(vocabulary, [("Ġ", letter) for letter in "ABCD"]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, **special)


def tiny_model(
    kind: type = LlamaForCausalLM,
    vocabulary: int = 264,
    layers: int = 3,
    hidden: int = 32,
    inner: int = 48,
):
    config = {LlamaForCausalLM: LlamaConfig, Qwen2: Qwen2Config}[kind](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below `folder` with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.stat()
        changed = 0 if path.is_dir() else facts.st_mtime_ns
        found[str(path.relative_to(folder))] = (0 if path.is_dir() else facts.st_size, changed)
    return found


QUICK = "--samples 2 --length 16 --calibration long.txt"


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")
