"""The prunable matrices of a model: linear layers, Conv1Ds and single experts, all seen alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.packed.modules import MergedPart, PackedLinear, own_layer

# Projections of one module that read the same input: one set of statistics serves them all.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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


def module_weights(path: str, module: nn.Module, layer: int, sublayer: str) -> Iterator[WeightRef]:
    """The prunable matrices that `module` itself holds."""
    if isinstance(module, nn.Linear | Conv1D | PackedLinear | MergedPart):
        parent, _, leaf = path.rpartition(".")
        shared = next((names for names in SHARED_INPUTS if leaf in names), None)
        group = f"{parent}.{'+'.join(shared)}" if shared else path
        yield WeightRef(path, layer, sublayer, module, input_group=group)
    elif is_fused_experts(module):
        for parameter in ("gate_up_proj", "down_proj"):
            for expert in range(getattr(module, parameter).shape[0]):
                name = f"{path}.{parameter}.{expert}"
                yield WeightRef(name, layer, sublayer, module, parameter, expert, name)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds all experts in (experts, out, in) tensors, as transformers 5 does.

    It is called as module(hidden (tokens, hidden), top_k_index (tokens, k), top_k_weights) and
    computes down(act(gate) · up) per routed token.
    """
    tensors = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(tensor, nn.Parameter) and tensor.ndim == 3 for tensor in tensors)
