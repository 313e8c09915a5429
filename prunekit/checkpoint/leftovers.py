"""Tensors of a checkpoint that its model has not: which are harmless, what the others mean.

Checkpoints of older libraries hold constants that are computed today: causal masks, rotary
frequencies. They are dropped by name, frequencies only where they are the model's own. Everything
else is refused with what really helps: correcting config.json does not, where the tensors are a
value head or belong to a wrapper.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.checkpoint.gguf_accounts import frequencies
from prunekit.errors import PrunekitError

# constants of older files, by the end of their names
_CONSTANTS = re.compile(
    r"(^|\.)((attn|attention|self_attn)\.masked_bias|position_ids|rotary_emb\.(cos|sin)_cached"
    r"|rotary_emb\.inv_freq|(decoder|encoder)\.version|embed_positions\._float_tensor)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # GPT-2 and GPT-NeoX: a causal mask, 4-D
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_LAYER = re.compile(r"(^|\.)(layers|h)\.(\d+)\.")

_WRAPPERS = (
    ("module.", "a data-parallel wrapper"),
    ("_orig_mod.", "a compiled model"),
    ("base_model.model.", "a PEFT wrapper"),
    ("pretrained_model.", "a model with a value head"),
    ("_forward_module.", "a training wrapper"),
)
_KINDS = (
    (r"\.base_layer\.|(^|\.)lora_|\.lora_[AB]\.", "adapters"),
    (r"(^|\.)(v_head|value_head|critic_head|score|classifier|reward_head|rm_head)\.", "head"),
    (r"(^|\.)(mtp|mtp_\w+|medusa\w*|nextn|multi_token\w*|eagle\w*|shared_head)\.", "extra"),
    (r"(_scale|_scale_inv|\.scales?|qweight|qzeros|g_idx|absmax|quant_map|quant_state\.\w+)$", "q"),
)


def harmless(names: Collection[str], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Which of `names` are constants that older checkpoints hold.

    Args:
        names: Tensors that the model has not.
        shapes: Shapes of the checkpoint's tensors.
    """
    return {
        name
        for name in names
        if _CONSTANTS.search(name) or (_MASK.search(name) and len(shapes.get(name, ())) == 4)
    }


def refuse_wrapped(folder: Path, missing: Collection[str], leftover: Collection[str]) -> None:
    """Say so where all that a checkpoint lacks is that its names begin with a wrapper's."""
    for prefix, what in _WRAPPERS:
        bare = {name.replace(prefix, "", 1) for name in leftover if prefix in name}
        if bare & set(missing) and not any(prefix in name for name in missing):
            raise PrunekitError(
                f"{folder}: the weights' names hold {prefix!r}, from {what}: save the model inside "
                "the wrapper, or rename them in every file F (and in the index), with "
                f"safetensors.torch: save_file({{name.replace({prefix!r}, '', 1): tensor for name, "
                "tensor in load_file(F).items()}, F, {'format': 'pt'})"
            )


def tells(name: str) -> bool:
    """Whether a leftover tensor's name says what is wrong with the whole checkpoint."""
    return any(re.search(found, name) for found, _ in _KINDS)


def refuse(folder: Path, name: str, layers: int) -> None:
    """Raise a PrunekitError that says what a leftover tensor means.

    Args:
        folder: The checkpoint.
        name: The tensor.
        layers: Number of the model's layers.
    """
    kind = next((kind for found, kind in _KINDS if re.search(found, name)), "")
    without = (
        f"write a copy without them, AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        ".save_pretrained(NEW), and copy the tokenizer"
    )
    beyond = _LAYER.search(name)
    if kind == "adapters":
        said = "adapters that were not merged: save what PEFT's model.merge_and_unload() returns"
    elif kind == "head":
        said = f"a value or classification head, which no causal model has: {without}"
    elif kind == "q":
        said = (
            "parts of quantised weights, but config.json has no quantization_config: get the "
            "original config.json, or the model that was quantised"
        )
    elif kind == "extra":
        said = f"heads that predict further tokens, which transformers does not read: {without}"
    elif beyond is not None and int(beyond[3]) >= layers:
        said = (
            f"a layer past the {layers} that config.json says: correct num_hidden_layers; or, if "
            f"it predicts further tokens, {without}"
        )
    else:
        said = (
            "which the model has not: correct config.json if it should have; otherwise " + without
        )
    raise PrunekitError(f"{folder}: the weights hold {name}, {said}")


def check_frequencies(folder: Path, files: Sequence[Path], model: PreTrainedModel) -> None:
    """See that rotary frequencies in the files, which nobody reads, are the model's."""
    for name, held in _held_frequencies(files):
        known = [*frequencies(model), *_unscaled(model)]
        # older libraries stored them in half precision
        if known and not any(
            held.shape == own.shape and torch.allclose(held, own, rtol=2e-2, atol=1e-6)
            for own in known
        ):
            raise PrunekitError(
                f"{folder}: {name} in the weights differs from the rotary frequencies that "
                "config.json gives: correct rope_theta or rope_parameters there"
            )


def _held_frequencies(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if _FREQUENCIES.search(name):
                    yield name, tensors.get_tensor(name).float()


def _unscaled(model: PreTrainedModel) -> list[Tensor]:
    """The frequencies before scaling, which older libraries stored."""
    theta = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta")
    if not isinstance(theta, int | float):
        return []
    return [
        float(theta) ** (-torch.arange(len(own)).float() / len(own)) for own in frequencies(model)
    ]
