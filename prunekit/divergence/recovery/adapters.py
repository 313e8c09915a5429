"""LoRA adapters that respect a mask: W + M∘ΔW is what runs, and what merging leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.masks import Masks


def model_inside(model: Any) -> PreTrainedModel:
    """The transformers model inside of PEFT's wrapper, or the model itself."""
    inside: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    return inside


def hold_adapters_(model: nn.Module, masks: Masks) -> None:
    """Let every LoRA adapter on a masked matrix change kept weights only.

    To merge adapters that were saved earlier, load them on the pruned model and call this before
    `merge_and_unload()`.

    Args:
        model: What PEFT made of the pruned model; nothing happens to any other.
        masks: Of the pruned model.

    Raises:
        PrunekitError: An adapter on a masked matrix is no plain LoRA, so that it would fill zeros.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    keeps = {id(masks.parameters[name]): keep for name, keep in masks.keep.items()}
    variant = _masked_variant()
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        weight = getattr(module.get_base_layer(), "weight", None)
        keep = keeps.get(id(weight))
        if keep is None:
            continue
        adapters = list(getattr(module, "lora_A", ()))
        odd = next((name for name in adapters if name in module.lora_variant), None)
        if not isinstance(module, LoraLayer) or not adapters or odd is not None:
            raise PrunekitError(
                f"the adapter on {path} is no plain LoRA, so it would fill zeros: use "
                "LoraConfig without DoRA or another variant, or leave that module out"
            )
        for name in adapters:
            module.lora_variant[name] = variant(keep)


def _masked_variant() -> Any:
    """PEFT's extension point, made when PEFT is there."""
    from peft.tuners.lora.layer import LoraVariant

    class Masked(LoraVariant):
        """ΔW of a plain LoRA where the mask keeps weights, 0 elsewhere."""

        def __init__(self, keep: Tensor) -> None:
            self.keep = keep

        def delta(self, module: Any, adapter: str) -> Tensor:
            """M∘(B·A·scale), in the layout of the base weight."""
            # not get_delta_weight, through which no gradient flows in every version
            low, high = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            product = (high @ low) * module.scaling[adapter]
            if module.fan_in_fan_out:
                product = product.t()
            return product * self.keep.to(product.device)

        def forward(
            self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
        ) -> Tensor:
            """The base layer's result and the masked adapter's."""
            delta = self.delta(module, active_adapter)
            weight = delta.t() if module.fan_in_fan_out else delta
            bias = module.lora_B[active_adapter].bias
            bias = None if bias is None else bias * module.scaling[active_adapter]
            dropped = module.lora_dropout[active_adapter](x)
            return result + nn.functional.linear(dropped, weight, bias)

        @torch.no_grad()
        def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            """A new tensor with the adapter in it."""
            return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

        @torch.no_grad()
        def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
            """The same in place."""
            orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

        @torch.no_grad()
        def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            """A new tensor without the adapter."""
            return orig_weight - self.delta(module, active_adapter).to(orig_weight.dtype)

        def supports_lora_conversion(self) -> bool:
            """False: the masked product is not of low rank."""
            return False

    return Masked
