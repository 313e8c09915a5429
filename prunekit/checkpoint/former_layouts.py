"""Read and write the sparse layouts that the library compressed-tensors used to have.

A compressed matrix (R, C) `<module>.weight` is stored as these tensors, beside
`"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": …}}`:

    sparse-24-bitmask  <module>.compressed (R, C/2): two values of every group of four, in order
                       <module>.bitmask    uint8 (R, ⌈C/8⌉): which, lowest bit first
                       <module>.shape      int64 (2, 1)
    sparse-bitmask     <module>.compressed (non-zeros,), row by row
                       <module>.bitmask    uint8 (R, ⌈C/8⌉)
                       <module>.row_offsets int64 (R,): where each row's values start
                       <module>.shape      int64 (2,)

2:4 matrices come back packed, others dense; either way one matrix at a time is dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from prunekernels import nm_mask
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.packed.described import PACKED_VERSION, unpacked_state
from prunekit.packed.formats import FORMATS
from prunekit.packed.modules import MergedPart, PackedLinear, own_layer

FORMER_LAYOUTS = ("sparse-24-bitmask", "sparse-bitmask")
_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHTS_PER_BYTE = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def layout_of(quantization: Mapping[str, Any]) -> str | None:
    """The layout that a configuration's `quantization_config` names; None: a quantised model."""
    sparsity = quantization.get("sparsity_config") or {}
    if quantization.get("quant_method") != "compressed-tensors" or quantization.get(
        "config_groups"
    ):
        return None
    layout = sparsity.get("format")
    return layout if layout in FORMER_LAYOUTS else None


def read_former(
    files: Iterable[Path], skeleton: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint in one of the layouts.

    Args:
        files: Its safetensors files.
        skeleton: The model, on the meta device: which modules are linear layers, and their shapes.

    Returns:
        A state for the model, and the configuration's field for the layers that are packed in it.

    Raises:
        PrunekitError: A compressed matrix is incomplete or damaged, or does not fit the model.
    """
    state: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                name, _, part = key.rpartition(".")
                if part in ("compressed", "bitmask", "shape", "row_offsets"):
                    parts.setdefault(name.removesuffix(".weight"), {})[part] = tensors.get_tensor(
                        key
                    )
                else:
                    state[key] = tensors.get_tensor(key)
    for name in list(parts):
        dense = _decompress(name, parts.pop(name))
        try:
            module = skeleton.get_submodule(name)
        except AttributeError:
            raise PrunekitError(f"{name} is compressed, but the model has no such layer") from None
        packed = _packed(module, dense)
        if packed is None:
            state[f"{name}.weight"] = dense
        else:
            state |= {f"{name}.{key}": tensor for key, tensor in packed.state_dict().items()}
            modules[name] = packed.describe()
    return state, {"version": PACKED_VERSION, "modules": modules}


def _packed(module: nn.Module, dense: Tensor) -> PackedLinear | None:
    """The matrix packed 2:4 if that fits, saves memory, and leaves the shape to be checked."""
    if type(module) is not nn.Linear or module.weight.shape != dense.shape:
        return None
    try:
        weight = FORMATS["2:4"].pack(dense)
    except ValueError:
        return None
    if weight.nbytes >= dense.numel() * dense.element_size():
        return None
    return PackedLinear(weight, None, "2:4")


def _decompress(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    missing = {"compressed", "bitmask", "shape"} - set(parts)
    if missing:
        raise PrunekitError(f"{name}.{min(missing)} is missing: copy the checkpoint again")
    values, shape = parts["compressed"].flatten(), parts["shape"].flatten().tolist()
    if values.dtype not in _VALUE_TYPES:
        raise PrunekitError(
            f"{name} holds {values.dtype} values: load the model that it was quantised from"
        )
    bitmask = parts["bitmask"]
    fits = len(shape) == 2 and tuple(bitmask.shape) == (shape[0], -(-shape[1] // 8))
    if not fits or bitmask.dtype != torch.uint8:
        raise PrunekitError(
            f"{name}.bitmask {tuple(bitmask.shape)} does not fit the shape {shape}: copy the "
            "checkpoint again"
        )
    mask = (bitmask[:, :, None] & _WEIGHTS_PER_BYTE).ne(0).flatten(1)[:, : shape[1]]
    if int(mask.sum()) != values.numel():
        raise PrunekitError(
            f"{name}: {int(mask.sum())} bits are set for {values.numel()} values: copy the "
            "checkpoint again"
        )
    return torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)


def former_state(arch: Architecture, layout: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's tensors in a layout, and its `quantization_config`.

    Linear layers of the decoder are compressed where the layout fits them and makes them smaller.

    Args:
        arch: The model, packed or dense.
        layout: One of `FORMER_LAYOUTS`.
    """
    state = unpacked_state(arch.model)
    compressed, zeros, size = set(), 0, 0
    for index in range(len(arch.layers)):
        for ref in arch.weights(index):
            if ref.expert is not None:
                continue
            key, dense, layer = f"{ref.name}.weight", ref.read(), own_layer(ref.module)
            conv1d = isinstance(ref.module, Conv1D) if layer is None else layer.conv1d
            parts = None if conv1d else _compress(dense, layout)
            if parts is None:
                state[key] = dense.t().contiguous() if conv1d else dense
                continue
            state.pop(key, None)
            state |= {f"{ref.name}.{part}": tensor for part, tensor in parts.items()}
            compressed.add(ref.name)
            zeros += dense.numel() - int(dense.count_nonzero())
            size += dense.numel()
    linear = (nn.Linear, PackedLinear, MergedPart)
    linears = {name for name, module in arch.model.named_modules() if isinstance(module, linear)}
    sparsity = {
        "format": layout,
        "targets": ["Linear"],
        "ignore": sorted(linears - compressed),
        "global_sparsity": zeros / size if size else 0.0,
        "sparsity_structure": "2:4" if layout == FORMER_LAYOUTS[0] else "unstructured",
    }
    return state, {"quant_method": "compressed-tensors", "sparsity_config": sparsity}


def _compress(dense: Tensor, layout: str) -> dict[str, Tensor] | None:
    """The tensors of a matrix in a layout, or None if it does not fit or is no smaller."""
    rows, columns = dense.shape
    mask = dense != 0
    if layout == FORMER_LAYOUTS[0]:
        if columns % 4 or int(mask.view(rows, -1, 4).sum(2).max()) > 2:
            return None
        # every group stores two values, be they zeros
        mask = nm_mask(mask.float(), keep=2, of=4)
        values = dense[mask].view(rows, columns // 2)
        shape = torch.tensor([[rows], [columns]])
    else:
        values, shape = dense[mask], torch.tensor([rows, columns])
    padded = nn.functional.pad(mask, (0, -columns % 8)).view(rows, -1, 8)
    bitmask = (padded * _WEIGHTS_PER_BYTE).sum(2, dtype=torch.uint8)
    parts = {"compressed": values, "bitmask": bitmask, "shape": shape}
    if layout != FORMER_LAYOUTS[0]:
        counts = mask.sum(1)
        parts["row_offsets"] = counts.cumsum(0) - counts
    size = sum(part.numel() * part.element_size() for part in parts.values())
    return parts if size < dense.numel() * dense.element_size() else None
