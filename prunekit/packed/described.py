"""Packed checkpoints: what stands in `config.json`, and building a model that takes the tensors.

A checkpoint with packed layers has the model type `prunekit_<base>`, so that transformers without
prunekit refuses it instead of making weights up, and a field in its configuration:

    "packed_layers": {"version": 1, "modules": {"model.layers.0.mlp.down_proj": {
        "format": "2:4", "shape": [576, 1536], "dtype": "bfloat16",
        "tensors": {"packed": ["int32", 36, 6912], "header": ["int64", 4]}}, ...}}

The tensors are `<module>.<tensor>` in the safetensors files. The listed layers are made packed and
empty while a model is built (on the meta device, by `from_pretrained`: `models/quantizer.py`), so
the files' tensors go straight into their buffers: no dense weight ever exists. Merged projections
are written one by one: how layers are merged is no property of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.packed.formats import FORMATS
from prunekit.packed.modules import PackedLinear, packed_layers

PACKED_FIELD = "packed_layers"
QUANT_METHOD = "prunekit"  # in "quantization_config", so that transformers asks our quantizer
PACKED_VERSION = 1


def describe_packed(model: nn.Module) -> dict[str, Any]:
    """The configuration's field for the packed layers of `model`."""
    modules = {name: layer.describe() for name, layer in packed_layers(model)}
    return {"version": PACKED_VERSION, "modules": modules}


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` with merged projections as tensors of their own (sharing memory)."""
    return _state(model, lambda layer: layer.state_dict())


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` as if nothing had ever been packed: all weights dense at once."""
    return _state(model, lambda layer: layer.to_dense().state_dict())


def unpacked_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` without the packed weights; their layers' biases are in it."""
    return _state(model, lambda layer: {} if layer.bias is None else {"bias": layer.bias.detach()})


def _state(model: nn.Module, read: Any) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for key in module.state_dict():
                del state[f"{name}.{key}"]
    for name, layer in packed_layers(model):
        state |= {f"{name}.{key}": tensor for key, tensor in read(layer).items()}
    return state


def check_described(field: Any) -> dict[str, Any]:
    """The packed layers that a configuration's field lists, by name.

    Raises:
        PrunekitError: Another version, an unknown format, or not such a field at all.
    """
    if not isinstance(field, Mapping) or not isinstance(field.get("modules"), Mapping):
        raise PrunekitError(f"{PACKED_FIELD} in config.json is not valid: copy it again")
    if field.get("version") != PACKED_VERSION:
        raise PrunekitError(
            f"packed checkpoint version {field.get('version')} is unknown (this prunekit reads "
            f"{PACKED_VERSION}): upgrade prunekit or save the model again"
        )
    return dict(field["modules"])


def install_skeletons_(model: nn.Module, field: Any) -> None:
    """Make the layers that a configuration lists packed and empty.

    Raises:
        PrunekitError: The field is not valid, or does not fit the model.
    """
    if field is None:
        return
    for name, described in check_described(field).items():
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            raise PrunekitError(
                f"{PACKED_FIELD} lists {name}, which the model has not: correct config.json"
            ) from None
        if not isinstance(dense, nn.Linear | Conv1D):
            raise PrunekitError(
                f"{PACKED_FIELD} lists {name}, which is a {type(dense).__name__}: correct "
                "config.json"
            )
        shape = list(dense.weight.shape)
        if isinstance(dense, Conv1D):
            shape.reverse()
        try:
            if described["format"] not in FORMATS:
                raise PrunekitError(
                    f"{name} is packed as {described['format']!r}, which this prunekit does not "
                    f"know: upgrade prunekit"
                )
            if list(described["shape"]) != shape:
                raise PrunekitError(
                    f"{name} is packed with shape {tuple(described['shape'])}, config.json implies "
                    f"{tuple(shape)}: correct config.json or copy the checkpoint again"
                )
            made = PackedLinear.skeleton(described, dense)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise PrunekitError(
                f"{PACKED_FIELD} describes {name} in a way that can't be read ({error}): copy "
                "config.json again"
            ) from error
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made)


def check_packed(model: nn.Module) -> None:
    """Raise a PrunekitError that names the first packed layer whose tensors are not valid."""
    for name, layer in packed_layers(model):
        layer.check(name)


def is_packed(model: nn.Module) -> bool:
    """Whether `model` has packed layers."""
    return any(isinstance(module, PackedLinear) for module in model.modules())
