"""Whether what a model holds is what its configuration will build when it is loaded again.

A checkpoint is a configuration and tensors. If a model was changed behind its configuration's back
(layers cut by hand, adapters put in, embeddings resized), its checkpoint is one that nothing reads.
That is known before any work is done, so it is said then.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError, one_line
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import stock_class
from prunekit.models.layouts import base_model_type
from prunekit.models.skeletons import skeleton_of
from prunekit.packed.described import unpacked_state
from prunekit.packed.modules import packed_layers

# what a leftover tensor's name tells about the model, and what to do about it
_CAUSES = (
    (
        r"lora_|\.base_layer\.|modules_to_save|\.original_module\.|adapter",
        "it has adapters: merge them first, with PEFT model = model.merge_and_unload()",
    ),
    (
        r"\.\w+_(orig|mask)$",
        "torch.nn.utils.prune masks it: call torch.nn.utils.prune.remove(module, 'weight') first",
    ),
    (
        r"\.parametrizations\.",
        "it is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first",
    ),
    (r"(^|\.)_orig_mod\.", "it is compiled: put the modules that were compiled (_orig_mod) back"),
    (r"(^|\.)v_head\.", "it has a value head: use the model inside, model.pretrained_model"),
)


def check_saveable(model: PreTrainedModel) -> None:
    """Raise a PrunekitError unless a checkpoint of `model` would load as this model.

    Args:
        model: A causal language model of a supported architecture: stock, dropped or packed.
    """
    arch = Architecture(model)
    stock = stock_class(base_model_type(model.config))
    if not isinstance(model, stock):
        raise PrunekitError(
            f"{type(model).__name__} is no causal language model, so it can't be saved as one: "
            f"load it as {stock.__name__}"
        )
    layers, said = len(arch.layers), model.config.num_hidden_layers
    if layers != said:
        raise PrunekitError(
            f"the model has {layers} layers, and its configuration says {said}: drop layers with "
            "prunekit.models.dropped.drop_blocks_, which keeps them in step, or set "
            f"model.config.num_hidden_layers = {layers} and what else is listed by layer"
        )
    try:
        type(model.config).from_dict(model.config.to_dict())  # as it will be read: validates
        built = skeleton_of(model.config).state_dict()
    except Exception as error:  # each configuration class validates in its own way
        raise PrunekitError(
            f"no model can be built from model.config ({one_line(error)}): correct it"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in built.items()}
    held = _shapes(model)
    for name in sorted(held.keys() - wanted.keys()):
        cause = next((fix for found, fix in _CAUSES if re.search(found, name)), None)
        raise PrunekitError(
            f"the model holds {name}, which {stock.__name__} has not, so that no checkpoint of it "
            f"could be read: {cause or 'put the stock module back'}"
        )
    for name in sorted(wanted.keys() - held.keys()):
        raise PrunekitError(
            f"the model lacks {name}, which its configuration builds: put it back, or correct "
            "model.config"
        )
    for name, shape in held.items():
        if shape != wanted[name]:
            raise PrunekitError(
                f"{name} has shape {shape}, and model.config implies {wanted[name]}: correct "
                "model.config (model.resize_token_embeddings does so for the vocabulary)"
            )
    _check_tie(model)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by name, as if nothing were packed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in unpacked_state(model).items()}
    for name, layer in packed_layers(model):
        shape = (layer.out_features, layer.in_features)
        shapes[f"{name}.weight"] = shape[::-1] if layer.conv1d else shape
    return shapes


def _check_tie(model: PreTrainedModel) -> None:
    """See that embedding and head are one where the configuration says so, and only there."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    one: Tensor | None = getattr(head, "weight", None)
    other: Tensor | None = getattr(embedding, "weight", None)
    if one is None or other is None or one.is_meta or other.is_meta:
        return
    if model.config.tie_word_embeddings:
        if one is not other and not torch.equal(one.detach().to(other.device), other.detach()):
            raise PrunekitError(
                "embedding and head differ, and model.config.tie_word_embeddings makes them one "
                "when the model is loaded: set it to False"
            )
    elif one is other:
        raise PrunekitError(
            "embedding and head are one tensor, and model.config.tie_word_embeddings is False: "
            "set it to True"
        )
