"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
]
MERGES = ["c a", "ca t", "Ġ cat"]
VOCABULARY = [*TOKENS, "ca", "cat", "Ġcat"]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    pre: str = "smollm",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    skip: tuple[str, ...] = (),
    extra: Mapping[str, Tensor] | None = None,
    shard_tensors: int = 0,
) -> None:
    """Write a tiny Llama as llama.cpp's converter does: queries and keys in pair order.

    Args:
        path: The file.
        model: With a vocabulary of `VOCABULARY`'s length.
        pre: What the file says of its tokenizer.
        kind: Type of the matrices whose rows it divides; all else is float32.
        skip: Beginnings of the names of tensors that are left out.
        extra: Tensors that no Llama has.
        shard_tensors: Tensors per file, numbered as llama.cpp does; 0: one file.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=shard_tensors)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, 3] + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                halves = values.reshape(heads, 2, config.head_dim // 2, -1)
                values = halves.transpose(1, 2).reshape(values.shape)
        data = values.numpy()
        held = gguf.GGMLQuantizationType.F32
        if data.ndim == 2 and data.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            held, data = kind, gguf.quantize(data, kind)
        called = names.get_name(name, try_suffixes=(".weight",))
        if not called.startswith(skip or "no name begins so"):
            writer.add_tensor(called, data, raw_dtype=held)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
