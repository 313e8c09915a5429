"""Write a model and its tokenizer into a folder, whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prunekit.checkpoint.former_layouts import FORMER_LAYOUTS, former_state
from prunekit.checkpoint.manifest import MANIFEST, write_manifest
from prunekit.errors import PrunekitError, one_line
from prunekit.files.atomic import replaced_folder
from prunekit.models import dropped as modeling
from prunekit.models.architectures import Architecture
from prunekit.models.layouts import SUBLAYERS, base_model_type
from prunekit.models.masks import check_masks
from prunekit.models.packed_saving import write_packed, write_state
from prunekit.models.saveable import check_saveable
from prunekit.packed import FORMATS
from prunekit.packed.described import dense_state, is_packed
from prunekit.packed.modules import packed_layers
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import quiet_transformers

SAVE_FORMATS = ("auto", "dense", "zeroed", *FORMER_LAYOUTS)


@usual_torch()
def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    format: str = "auto",
    overwrite: bool = False,
    report: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model and its tokenizer into a folder that `load` reads, whole or not at all.

    Args:
        model: Stock, pruned or dropped.
        tokenizer: Its tokenizer.
        folder: Where to; its parents are created.
        format: "auto" leaves dropped tensors out and keeps packed layers packed (see the table
            above). "dense" writes packed layers as dense zeros, which takes the memory of the dense
            model meanwhile. "zeroed" writes a stock, dense model that computes the same: dropped
            sublayers return as zeros. "sparse-24-bitmask" and "sparse-bitmask" are layouts that
            readers of compressed-tensors up to 0.9 know.
        overwrite: Whether to replace a checkpoint that is there. It survives until the new one is
            complete.
        report: What the pruning run reported, JSON-serialisable, kept in prunekit.json.

    Returns:
        The folder.

    Raises:
        PrunekitError: Unknown format; no tokenizer; the model is not what its configuration says
            (`prunekit.models.saveable`); fine-tuning broke its mask (`prunekit.models.masks`); or
            the folder is not empty or can't be written.
    """
    check_format(format)
    _check_tokenizer(tokenizer)
    check_saveable(model)
    check_masks(model)
    arch = Architecture(model)
    dropped = {
        sublayer: [i for i in range(len(arch.layers)) if arch.is_dropped(i, sublayer)]
        for sublayer in SUBLAYERS
    }
    replaceable = ("config.json", MANIFEST)
    with (
        replaced_folder(folder, overwrite=overwrite, replaceable=replaceable) as new,
        quiet_transformers(),
    ):
        try:
            if format == "zeroed" and any(dropped.values()):
                _with_zeros(arch).save_pretrained(new)
            elif format in FORMER_LAYOUTS:
                _write_former(arch, new, format)
            elif not is_packed(model):
                model.save_pretrained(new)
            else:
                write_packed(model, new) if format == "auto" else _write_dense(model, new)
            tokenizer.save_pretrained(new)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise PrunekitError(f"{folder} can't be written: {one_line(error)}") from error
        facts = {
            "format": format,
            "base_model_type": base_model_type(model.config),
            "dropped": dropped,
            "kept_blocks": arch.original_layers,
            "packed": sorted({layer.format for _, layer in packed_layers(model)})
            if format == "auto"
            else [],
            "report": report,
        }
        write_manifest(new, facts)
    return Path(folder)


def _check_tokenizer(tokenizer: Any) -> None:
    """Raise a PrunekitError unless `tokenizer` can be written beside the model."""
    if not callable(getattr(tokenizer, "save_pretrained", None)):
        raise PrunekitError(
            f"the tokenizer is {type(tokenizer).__name__}, and a checkpoint needs one: pass a "
            "transformers tokenizer, such as AutoTokenizer.from_pretrained(…) of the original model"
        )


def check_format(format: str) -> None:
    """Raise a PrunekitError unless `format` is one that `save` writes."""
    if format in FORMATS:
        raise PrunekitError(
            f"{format!r} is how a weight is packed, not how a checkpoint is written: swap packs "
            "what fits, and prune with --bits 8 or 4 makes values of so many bits; use one of "
            f"{', '.join(SAVE_FORMATS)}"
        )
    if format not in SAVE_FORMATS:
        raise PrunekitError(f"unknown format {format!r}: use one of {', '.join(SAVE_FORMATS)}")


def _write_dense(model: PreTrainedModel, folder: Path) -> None:
    write_state(model, copy.deepcopy(model.config), dense_state(model), folder)


def _write_former(arch: Architecture, folder: Path, layout: str) -> None:
    """Write a model in a layout of `former_layouts`."""
    config = copy.deepcopy(arch.model.config)
    state, quantization = former_state(arch, layout)
    config.quantization_config = quantization
    write_state(arch.model, config, state, folder)


def _with_zeros(arch: Architecture) -> PreTrainedModel:
    """A stock model that shares `arch`'s tensors; its dropped sublayers are zeros, norms ones."""
    name = base_model_type(arch.model.config)
    config = copy.deepcopy(arch.model.config)
    for field in modeling.DROP_LISTS.values():
        delattr(config, field)
    config.__class__ = CONFIG_MAPPING[name]
    with torch.device("meta"):
        skeleton = modeling.stock_class(name)(config)
    state = dense_state(arch.model)
    for path, tensor in skeleton.state_dict().items():
        if path not in state:
            owner = type(skeleton.get_submodule(path.rpartition(".")[0])).__name__
            fill = torch.ones if owner.endswith("Norm") and path.endswith("weight") else torch.zeros
            state[path] = fill(tensor.shape, dtype=arch.model.dtype)
    model: PreTrainedModel = type(skeleton).from_pretrained(None, config=config, state_dict=state)
    return model
