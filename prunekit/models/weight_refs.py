"""The prunable matrices of a model: linear layers, Conv1Ds and single experts, all seen alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.models.layouts import LAYOUTS, FusedExperts
from prunekit.packed.modules import MergedPart, PackedLinear, own_layer

_EXPERTS = tuple({layout.experts for layout in LAYOUTS.values() if layout.experts is not None})


@dataclass(frozen=True)
class WeightRef:
    """One prunable matrix of a model, seen as (out_features, in_features) however it is stored.

    Attributes:
        name: Dotted name from the model, `…experts.gate_up_proj.3` for expert 3 of a fused tensor.
        layer: Index of its decoder layer.
        sublayer: "attn" or "mlp".
        module: The module that holds it: its input is the matrix's input, except for experts.
        parameter: Name of the parameter in `module`.
        expert: Index into a fused (experts, out, in) tensor, or None.
        input_group: Matrices with the same value read the same input.
    """

    name: str
    layer: int
    sublayer: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    input_group: str = ""

    @property
    def matrix(self) -> Tensor:
        """A view (out_features, in_features) of the stored weight; writes go through to it.

        Raises:
            PrunekitError: The weight is packed.
        """
        if own_layer(self.module) is not None:
            raise PrunekitError(
                f"{self.name} is packed: make the model dense first (unswap_, or prunekit swap "
                "--format dense)"
            )
        stored: Tensor = getattr(self.module, self.parameter).data
        if self.expert is not None:
            return stored[self.expert]
        return stored.t() if isinstance(self.module, Conv1D) else stored

    def read(self) -> Tensor:
        """The values (out_features, in_features), to read only: unpacked if they are packed."""
        packed = own_layer(self.module)
        return self.matrix if packed is None else packed.weight.to_dense()

    def expert_inputs(self, routed: Tensor) -> Tensor:
        """The inputs of this expert's matrix.

        Args:
            routed: (tokens, hidden): the tokens that the router sends to this expert.

        Returns:
            (tokens, in): the same for gate and up, activation(gate) · up for down.
        """
        module: Any = self.module
        names = fused_experts(module)
        assert names is not None and self.expert is not None
        if self.parameter != names.down:
            return routed
        projected = nn.functional.linear(routed, getattr(module, names.gate_up)[self.expert])
        gate, up = projected.chunk(2, dim=-1)
        entering: Tensor = getattr(module, names.activation)(gate) * up
        return entering


def module_weights(
    path: str,
    module: nn.Module,
    layer: int,
    sublayer: str,
    shared_inputs: Sequence[tuple[str, ...]],
) -> Iterator[WeightRef]:
    """The prunable matrices that `module` itself holds.

    Args:
        path: Dotted name of the module.
        module: Any module of a decoder layer.
        layer: Index of the layer.
        sublayer: "attn" or "mlp".
        shared_inputs: `Layout.shared_inputs`: one set of statistics serves all of a group.
    """
    if isinstance(module, nn.Linear | Conv1D | PackedLinear | MergedPart):
        parent, _, leaf = path.rpartition(".")
        shared = next((names for names in shared_inputs if leaf in names), None)
        group = f"{parent}.{'+'.join(shared)}" if shared else path
        yield WeightRef(path, layer, sublayer, module, input_group=group)
        return
    names = fused_experts(module)
    if names is not None:
        for parameter in (names.gate_up, names.down):
            for expert in range(getattr(module, parameter).shape[0]):
                name = f"{path}.{parameter}.{expert}"
                yield WeightRef(name, layer, sublayer, module, parameter, expert, name)


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """The names of `module`'s parameters if it holds all experts in them, else None."""
    for names in _EXPERTS:
        tensors = [getattr(module, name, None) for name in (names.gate_up, names.down)]
        if all(isinstance(tensor, nn.Parameter) and tensor.ndim == 3 for tensor in tensors):
            return names
    return None


def expert_tensors(module: nn.Module) -> list[Tensor]:
    """The (experts, out, in) parameters that `module` holds, none for any other module."""
    names = fused_experts(module)
    return [] if names is None else [getattr(module, name) for name in (names.gate_up, names.down)]
