"""What is no plain causal language model, and what to pass instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError

#: Types that torch multiplies and normalises in on every device.
COMPUTES_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# an attribute by which a wrapper is known, and how the model inside is reached
_WRAPPERS = (
    ("merge_and_unload", "carries adapters: merge them, model = model.merge_and_unload()"),
    ("_orig_mod", "is compiled: pass the model inside, model._orig_mod"),
    ("pretrained_model", "wraps a model: pass the one inside, model.pretrained_model"),
    ("module", "wraps a model: pass the one inside, model.module"),
    ("model", "holds a model: pass the one inside, .model"),
)


def check_causal(model: Any) -> None:
    """Raise a PrunekitError unless `model` is a transformers model in a type that computes.

    Args:
        model: What was given as a model: perhaps a wrapper, a name, or a pair from `load`.
    """
    name = f"{type(model).__module__}.{type(model).__name__}".removeprefix("builtins.")
    if isinstance(model, str | Path):
        raise PrunekitError(
            f"'{model}' is a name where a model is expected: load it first, model, tokenizer = "
            f"prunekit.load('{model}')"
        )
    if isinstance(model, tuple):
        raise PrunekitError(
            "a tuple was given where a model is expected: prunekit.load returns two things, model, "
            "tokenizer = prunekit.load(…)"
        )
    if not isinstance(model, PreTrainedModel) or hasattr(model, "_orig_mod"):
        inside = next((fix for attribute, fix in _WRAPPERS if _holds(model, attribute)), None)
        raise PrunekitError(
            f"{name} {inside}"
            if inside
            else f"{name} is no transformers causal language model: pass one, as prunekit.load or "
            "AutoModelForCausalLM gives it"
        )
    check_computes(model.dtype, f"the model ({type(model).__name__})")


def check_computes(dtype: torch.dtype, what: str) -> None:
    """Raise a PrunekitError unless models compute in `dtype`, the type of `what`."""
    if dtype not in COMPUTES_IN:
        raise PrunekitError(
            f"{what} is in {dtype}, in which torch stores numbers but does not compute: use "
            "float32, bfloat16 or float16 (in Python model.to(torch.bfloat16))"
        )


def check_measured(model: PreTrainedModel) -> None:
    """Raise a PrunekitError unless the metrics read the type that `model` computes in."""
    if model.dtype == torch.float64:
        raise PrunekitError(
            "the metrics read float32, bfloat16 and float16, and the model is in float64: use "
            "model.float()"
        )


def _holds(wrapper: Any, attribute: str) -> bool:
    found = getattr(wrapper, attribute, None)
    return callable(found) if attribute == "merge_and_unload" else isinstance(found, nn.Module)
