"""Whether every tensor of a GGUF file reached the model, and every tensor of the model is its own.

transformers makes up what a file lacks, and says nothing of what it does not read. Converting a
tensor (dequantising, reordering, splitting, joining) keeps its number of elements, so if nothing of
the model is missing, the elements of file and model are as many; a surplus was not read.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError

_PART = re.compile(r".+-(\d{5})-of-(\d{5})\.gguf")
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def check_accounts(
    path: Path,
    model: PreTrainedModel,
    missing: Collection[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Compare a file with the model that was read from it.

    Args:
        path: The file.
        model: The model.
        missing: Names of its tensors that the file did not give.
        tensors: The file's tensors (`gguf.ReaderTensor`), by name.
        metadata: The file's metadata.

    Raises:
        PrunekitError: Something is missing or left over; names it.
    """
    if missing:
        part = _PART.fullmatch(path.name)
        among = f"part {int(part[1])} of {int(part[2])}, " if part else ""
        raise PrunekitError(
            f"{path} ({among}{len(tensors)} tensors) lacks {min(missing)} and {len(missing) - 1} "
            "others: get the whole model"
        )
    for name in _ROPE_FACTORS:
        if name in tensors and not _followed(model, tensors[name].data):
            raise PrunekitError(
                f"{path} holds {name}, factors on the rotary frequencies that the model read from "
                "it doesn't follow: load the original checkpoint instead"
            )
    counted = {name: t for name, t in tensors.items() if name not in _ROPE_FACTORS}
    held = sum(int(tensor.n_elements) for tensor in counted.values())
    read = sum(parameter.numel() for parameter in model.parameters())
    if held == read:
        return
    unread = sorted(set(counted) - _known_names(model, metadata)) or ["a tensor"]
    raise PrunekitError(
        f"{path} holds {unread[0]}, which nothing reads into a {type(model).__name__} ({held} "
        f"elements in the file, {read} in the model): load the original checkpoint instead"
    )


def _followed(model: PreTrainedModel, factors: Any) -> bool:
    """Whether the model's rotary frequencies are the usual ones divided by a file's factors."""
    wanted = torch.from_numpy(np.array(factors, np.float32))
    if bool((wanted == 1).all()):
        return True
    theta = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is None:
        return False
    width = 2 * len(wanted)
    usual = float(theta) ** (-torch.arange(0, width, 2).float() / width) / wanted
    return any(_close(buffer, usual) for buffer in frequencies(model))


def frequencies(model: PreTrainedModel) -> list[Tensor]:
    """The rotary frequencies at work in a model, (head size / 2,) each."""
    return [
        buffer.detach().float().cpu()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=0)


def _known_names(model: PreTrainedModel, metadata: Mapping[str, Any]) -> set[str]:
    """What the format calls the model's tensors, as far as the package gguf knows."""
    gguf: Any = importlib.import_module("gguf")
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = architectures.get(metadata.get("general.architecture"))
    if arch is None:
        return set()
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    return {
        found
        for name in model.state_dict()
        if (found := names.get_name(name, try_suffixes=(".weight", ".bias"))) is not None
    }
