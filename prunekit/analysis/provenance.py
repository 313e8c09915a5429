"""The provenance of a result: versions, and facts of the compared models."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from prunekit.models.architectures import Architecture
from prunekit.models.layouts import SUBLAYERS, base_model_type
from prunekit.packed.sizes import weight_count


def versions() -> dict[str, str | None]:
    """Versions of what computed the result; None = not installed."""
    packages = ("prunekit", "torch", "triton", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: installed(name) for name in packages}}


def installed(package: str) -> str | None:
    """The version of an installed package, torch's with its build; None = not installed."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def absent_sublayers(arch: Architecture) -> dict[str, list[int]]:
    """Layers whose "attn" or "mlp" is absent, in the model's own numbering."""
    return {
        sublayer: [index for index in range(len(arch.layers)) if arch.is_dropped(index, sublayer)]
        for sublayer in SUBLAYERS
    }


def describe(arch: Architecture) -> dict[str, Any]:
    """Architecture, size and dropped parts of a model; JSON-able."""
    return {
        "architecture": base_model_type(arch.model.config),
        "layers": len(arch.layers),
        "kept_blocks": arch.original_layers,
        "dropped": absent_sublayers(arch),
        "hidden": arch.head.weight.shape[1],
        "vocabulary": arch.head.weight.shape[0],
        "parameters": weight_count(arch.model),
    }
