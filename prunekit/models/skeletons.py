"""Models without weights: what a configuration describes, for tensors to be put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from prunekit.models import dropped as modeling
from prunekit.models.layouts import base_model_type
from prunekit.packed.described import PACKED_FIELD, QUANT_METHOD


def skeleton_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config`'s class on the meta device; no random number is drawn."""
    name = base_model_type(config)
    own = isinstance(config, modeling.CONFIG_CLASSES[name])
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), no_init_weights():
            return (modeling.model_class(name) if own else modeling.stock_class(name))(config)
    finally:
        torch.set_default_dtype(usual)


def make_packed_config_(config: PretrainedConfig, packed: Mapping[str, Any]) -> None:
    """Turn a configuration into that of a `prunekit_<base>` model with packed layers."""
    setattr(config, PACKED_FIELD, packed)
    config.quantization_config = {"quant_method": QUANT_METHOD}
    vars(config).pop("model_type", None)
    config.__class__ = modeling.CONFIG_CLASSES[base_model_type(config)]
    for field in modeling.DROP_LISTS.values():
        setattr(config, field, getattr(config, field, []))
