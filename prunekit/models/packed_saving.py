"""Writing models with packed layers the way transformers writes models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.skeletons import make_packed_config_, skeleton_of
from prunekit.packed.described import describe_packed, is_packed, packed_state


def write_packed(model: PreTrainedModel, folder: Path) -> None:
    """Write a model with packed layers as they are, without its tokenizer."""
    config = copy.deepcopy(model.config)
    make_packed_config_(config, describe_packed(model))
    write_state(model, config, packed_state(model), folder)


def write_state(
    model: PreTrainedModel, config: PretrainedConfig, state: dict[str, Tensor], folder: Path
) -> None:
    """Write `state` as a model of `config`'s class."""
    skeleton = skeleton_of(config, model.dtype)  # what is written says its type
    skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(folder, state_dict=state)


class _PackedSaving:
    """Stands for `save_pretrained` of one model whose layers are packed.

    Trainers call it with arguments of their own; the model's own tensors are what is written.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the packed checkpoint that `from_pretrained` reads once prunekit is imported."""
        if push_to_hub:
            raise PrunekitError(
                "a packed model can't be pushed to the Hub from here: prunekit.save it, and upload "
                "the folder"
            )
        if is_main_process:
            write_packed(self.model, Path(save_directory))


def save_packed_(model: PreTrainedModel) -> None:
    """Make `save_pretrained` of this model, if it has packed layers, write them packed."""
    if is_packed(model):
        vars(model)["save_pretrained"] = _PackedSaving(model)
