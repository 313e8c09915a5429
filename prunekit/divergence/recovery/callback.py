"""Keep a pruned model's zeros while transformers' own Trainer fine-tunes it, adapters included."""

from __future__ import annotations

from typing import Any

from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from prunekit.divergence.recovery.adapters import hold_adapters_, model_inside
from prunekit.models.masks import Masks


class KeepMasks(TrainerCallback):
    """Holds every zero of a model's matrices: `Trainer(…, callbacks=[KeepMasks()])`.

    Before each update the gradients of pruned weights are zeroed, after it the weights: neither
    momentum, weight decay nor a clipped norm sees them. LoRA adapters are held to the mask as well:
    W + M∘(B·A·scale) is what trains and what merges, so that a merged model is as sparse as before.
    `prunekit.save` refuses a model whose mask was broken by other means, and names the module.

    Args:
        masks: What to hold; by default the zeros at the beginning of training.
    """

    def __init__(self, masks: Masks | None = None) -> None:
        self.masks = masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the zeros, and hold adapters to them."""
        model = kwargs["model"]
        inside = model_inside(model)
        if self.masks is None:
            self.masks = Masks.of(inside)
        self.masks.remember(inside)
        hold_adapters_(model, self.masks)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zero the gradients of pruned weights."""
        if self.masks is not None:
            self.masks.hold_gradients_()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zero what the update made of pruned weights."""
        if self.masks is not None:
            self.masks.hold_()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that the mask holds."""
        inside: PreTrainedModel = model_inside(kwargs["model"])
        if self.masks is not None:
            self.masks.check(inside)
