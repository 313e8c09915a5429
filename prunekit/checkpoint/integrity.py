"""Checks that a checkpoint is whole: its files, its tensors, its values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from prunekit.checkpoint import leftovers
from prunekit.checkpoint.manifest import read_json
from prunekit.errors import PrunekitError, one_line
from prunekit.models.architectures import Architecture
from prunekit.models.layouts import SUBLAYERS
from prunekit.packed.modules import packed_layers
from prunekit.packed.sizes import plain_parts

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


def check_shards(folder: Path, files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """See that no file is left out and no tensor is in two, and that the index tells the truth.

    Args:
        folder: The checkpoint.
        files: Its weight files (`weight_files`).

    Returns:
        The shape of every tensor.

    Raises:
        PrunekitError: It names the tensor or the file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    homes: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in homes:
                    raise PrunekitError(
                        f"{folder}: {name} is in {homes[name]} and in {file.name}: copy the "
                        "weights again"
                    )
                homes[name] = file.name
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    if files and files[0].name != _WEIGHTS:
        _check_index(folder, homes)
    return shapes


def _check_index(folder: Path, homes: Mapping[str, str]) -> None:
    """See that the index lists the tensors where they are, and that every file is listed."""
    listed = {
        name: Path(file).name
        for name, file in read_json(folder / _INDEX).get("weight_map", {}).items()
    }
    for name in sorted(listed.keys() | homes.keys()):
        if listed.get(name) != homes.get(name):
            raise PrunekitError(
                f"{folder}: {_INDEX} puts {name} into {listed.get(name, 'no file')}, and it is in "
                f"{homes.get(name, 'none')}: copy the weights and their index again"
            )
    others = {file.name for file in folder.glob("model-*-of-*.safetensors")} - set(homes.values())
    if others:
        raise PrunekitError(
            f"{folder}: {_INDEX} does not list {min(others)}: copy the index again, or remove the "
            "file"
        )


def check_complete(
    folder: Path,
    model: PreTrainedModel,
    found: Mapping[str, Any],
    files: Sequence[Path],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """See that the checkpoint gave every tensor of the model, in its shape, and no others.

    Args:
        folder: The checkpoint.
        model: What was loaded from it.
        found: What transformers says of the loading.
        files: The weight files.
        shapes: What `check_shards` returned.

    Raises:
        PrunekitError: A tensor is missing, left over or of another shape; constants of older files
            (`leftovers.harmless`) and what LLM-Drop leaves of dropped sublayers may be left over.
    """
    leftover = set(found["unexpected_keys"])
    leftovers.refuse_wrapped(folder, found["missing_keys"], leftover)
    for name, held, expected in sorted(found["mismatched_keys"]):
        raise PrunekitError(
            f"{folder}: {name} has shape {tuple(held)}, config.json implies {tuple(expected)}: "
            f"correct config.json or copy the weights again"
        )
    arch = Architecture(model)
    for index in range(len(arch.layers)):
        for sublayer in SUBLAYERS:
            if arch.is_dropped(index, sublayer):  # LLM-Drop writes dropped sublayers all the same
                branch = arch.branch(sublayer)
                parts = (branch.norm, branch.post_norm, *branch.modules)
                prefixes = tuple(f"{arch.layout.layers}.{index}.{part}." for part in parts if part)
                leftover = {name for name in leftover if not name.startswith(prefixes)}
    leftover -= leftovers.harmless(leftover, shapes)
    telling = [name for name in sorted(leftover) if leftovers.tells(name)]
    for name in [*telling, *([] if found["missing_keys"] else sorted(leftover))]:
        leftovers.refuse(folder, name, len(arch.layers))
    for name in sorted(found["missing_keys"]):
        raise PrunekitError(
            f"{folder}: {name} is missing from the weights: copy them again, or correct config.json"
        )
    leftovers.check_frequencies(folder, files, model)


def check_finite(model: nn.Module) -> None:
    """Raise a PrunekitError that names the first weight of `model` with a NaN or an infinity."""
    packed = ((name, part) for name, layer in packed_layers(model) for part in layer.kept_values())
    for name, tensor in itertools.chain(model.named_parameters(), packed):
        # torch cannot test types of eight bits, and integers are finite
        parts = [p for p in plain_parts(tensor) if p.is_floating_point() and p.element_size() > 1]
        if not all(bool(part.isfinite().all()) for part in parts):
            raise PrunekitError(
                f"{name} holds NaN or infinite values: get the checkpoint again, or load it in "
                f"float32"
            )
