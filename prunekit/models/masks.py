"""The zeros of a pruned model, held while something else changes its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture

_ATTRIBUTE = "_prunekit_masks"
_WRAPPED = ".base_layer."


@dataclass(frozen=True)
class Masks:
    """Where the matrices of a model may hold weights.

    Attributes:
        keep: By name of a parameter, as it is without adapters: True where a weight is kept, in
            the parameter's shape. Only parameters that hold zeros are listed.
        parameters: The parameters themselves, which stay the same objects when adapters are put
            around their modules.
    """

    keep: dict[str, Tensor]
    parameters: dict[str, nn.Parameter]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Masks:
        """The zeros that the matrices of the model's layers hold now.

        Raises:
            PrunekitError: A matrix is packed, or offloaded.
        """
        arch = Architecture(model)
        held: dict[int, nn.Parameter] = {}
        for index in range(len(arch.layers)):
            for ref in arch.weights(index):
                if ref.matrix.is_meta:
                    raise PrunekitError(
                        f"{ref.name} is offloaded, so it can't be trained: load the model with a "
                        "device_map that keeps every layer on a device"
                    )
                parameter = getattr(ref.module, ref.parameter)
                held[id(parameter)] = parameter
        parameters = {name: p for name, p in _own(model).items() if id(p) in held}
        keep = {name: p.detach() != 0 for name, p in parameters.items()}
        sparse = [name for name, mask in keep.items() if not bool(mask.all())]
        return cls({name: keep[name] for name in sparse}, {n: parameters[n] for n in sparse})

    def remember(self, model: PreTrainedModel) -> None:
        """Let `prunekit.save` refuse this model once it breaks these masks."""
        setattr(model, _ATTRIBUTE, self)

    @torch.no_grad()
    def hold_(self) -> None:
        """Set every pruned weight to zero again."""
        for name, parameter in self.parameters.items():
            parameter.data.mul_(self._on(name, parameter))

    @torch.no_grad()
    def hold_gradients_(self) -> None:
        """Set the gradient of every pruned weight to zero."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self._on(name, parameter))

    def _on(self, name: str, parameter: Tensor) -> Tensor:
        """The mask beside its parameter, wherever that has moved to."""
        if self.keep[name].device != parameter.device:
            self.keep[name] = self.keep[name].to(parameter.device)
        return self.keep[name]

    def check(self, model: PreTrainedModel) -> None:
        """See that the model holds zeros where these masks say so.

        Raises:
            PrunekitError: It does not, and in which module.
        """
        found = _own(model)
        for name, keep in self.keep.items():
            parameter = found.get(name)
            if parameter is None or parameter.shape != keep.shape:
                continue  # packed, or another model by now: the shapes are checked elsewhere
            broken = int((parameter.detach()[~keep.to(parameter.device)] != 0).sum())
            if broken:
                module = name.removesuffix(".weight")
                raise PrunekitError(
                    f"{module} holds {broken:,} weights where it was pruned: fine-tune with "
                    "prunekit.KeepMasks, which holds zeros and adapters to the mask, or prune it "
                    "again (prunekit.models.masks.forget_masks(model) allows it on purpose)"
                )


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's own parameters by the names they have without adapters; those of adapters are not.

    PEFT puts q_proj inside of a module that is called q_proj, as its base_layer.
    """
    named = dict(model.named_parameters())
    wrapped = {name.partition(_WRAPPED)[0] for name in named if _WRAPPED in name}
    own = {}
    for name, parameter in named.items():
        parts = name.split(".")
        parents = {".".join(parts[:end]) for end in range(1, len(parts))}
        if _WRAPPED in name or not parents & wrapped:
            own[name.replace(_WRAPPED, ".")] = parameter
    return own


def forget_masks(model: nn.Module) -> None:
    """Let `prunekit.save` take whatever this model holds from now on."""
    vars(model).pop(_ATTRIBUTE, None)


def check_masks(model: PreTrainedModel) -> None:
    """Raise a PrunekitError if a model breaks the masks that were remembered of it."""
    masks: Masks | None = getattr(model, _ATTRIBUTE, None)
    if masks is not None:
        masks.check(model)
