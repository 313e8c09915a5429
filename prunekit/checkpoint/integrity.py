"""Checks that a checkpoint is whole: its files, its tensors, its values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from prunekit.checkpoint.manifest import read_json
from prunekit.errors import PrunekitError, one_line
from prunekit.models.architectures import Architecture
from prunekit.models.layouts import SUBLAYERS
from prunekit.packed.modules import packed_layers

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        listed = read_json(folder / _INDEX).get("weight_map", {})
        files = [folder / Path(name).name for name in sorted(set(listed.values()))]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise PrunekitError(f"{missing[0]} is missing: copy it again")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise PrunekitError(
            f"{folder} holds only pickled weights, which prunekit never opens: convert them to "
            f"{_WEIGHTS}"
        )
    raise PrunekitError(f"{folder} holds no {_WEIGHTS}: give the folder of a saved model")


def check_readable(file: Path) -> None:
    """See that the header of a safetensors file agrees with its length."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise PrunekitError(
            f"{file} is truncated or no safetensors file ({one_line(error)}): copy it again"
        ) from error


def check_complete(folder: Path, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """See that the checkpoint gave every tensor of the model, in its shape, and no others."""
    for name, held, expected in sorted(found["mismatched_keys"]):
        raise PrunekitError(
            f"{folder}: {name} has shape {tuple(held)}, config.json implies {tuple(expected)}: "
            f"correct config.json or copy the weights again"
        )
    for name in sorted(found["missing_keys"]):
        raise PrunekitError(
            f"{folder}: {name} is missing from the weights: copy them again, or correct config.json"
        )
    leftover = set(found["unexpected_keys"])
    arch = Architecture(model)
    for index in range(len(arch.layers)):
        for sublayer in SUBLAYERS:
            if arch.is_dropped(index, sublayer):  # LLM-Drop writes dropped sublayers all the same
                branch = arch.branch(sublayer)
                parts = (branch.norm, branch.post_norm, *branch.modules)
                prefixes = tuple(f"{arch.layout.layers}.{index}.{part}." for part in parts if part)
                leftover = {name for name in leftover if not name.startswith(prefixes)}
    for name in sorted(leftover):
        raise PrunekitError(
            f"{folder}: the weights hold {name}, which the model has not: correct config.json"
        )


def check_finite(model: nn.Module) -> None:
    """Raise a PrunekitError that names the first weight of `model` with a NaN or an infinity."""
    packed = ((name, part) for name, layer in packed_layers(model) for part in layer.kept_values())
    for name, tensor in itertools.chain(model.named_parameters(), packed):
        if not tensor.detach().isfinite().all():
            raise PrunekitError(
                f"{name} holds NaN or infinite values: get the checkpoint again, or load it in "
                f"float32"
            )
