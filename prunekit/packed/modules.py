"""Modules that hold packed sparse weights, and the formats there are.

`PackedLinear` takes the place of an `nn.Linear` or Conv1D. Its weight lives in buffers, so it is in
`state_dict`, follows `.to(device)`, and is converted by `.to(dtype)`. `MergedLinear` computes
several projections of one input at once, and `FusedGatedMLP` a Llama-like MLP's gate and up. Which
module becomes which is `prunekit.swap`'s business; a new format is one more entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from prunekernels import (
    BitmapSparse,
    Sparse24,
    bitmap_cat,
    bitmap_expected,
    bitmap_linear,
    bitmap_pack,
    bitmap_split,
    sparse24_cat,
    sparse24_expected,
    sparse24_gate_up,
    sparse24_linear,
    sparse24_pack,
    sparse24_split,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError

Shape = tuple[int, int]


class PackedWeight(Protocol):
    """What every packed weight offers, whatever its format."""

    @property
    def shape(self) -> Shape:
        """(out_features, in_features)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""

    def to_dense(self) -> Tensor:
        """A new dense (out_features, in_features) tensor."""

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> PackedWeight:
        """On another device, or with other values (rounded)."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, with a `header` that says version, shape and type."""


@dataclass(frozen=True)
class Format:
    """A way to hold a sparse weight.

    Attributes:
        name: What it is called in reports and checkpoints.
        pack: Packs a dense (out, in) weight, or raises ValueError if it does not fit.
        rebuild: The weight from the tensors of its `state_dict`, shape and type, unchecked header.
        load: The weight from its `state_dict`; ValueError if it is not valid.
        linear: y = x·Wᵀ + bias.
        values: Tensors that hold every value which is not zero (sharing memory).
        expected: (tokens, weight) -> expected speed-up over dense, implementation, reason.
        cat: Stacks weights along their rows; `split` undoes it. `row_multiple` is what the rows of
            all but the last must be multiples of. None: projections can't be merged.
        gate_up: SiLU(x·Wgᵀ)·(x·Wuᵀ) in one kernel; None: gate and up are merged like projections.
    """

    name: str
    pack: Callable[[Tensor], Any]
    rebuild: Callable[[Mapping[str, Tensor], Shape, torch.dtype], Any]
    load: Callable[[Mapping[str, Tensor]], Any]
    linear: Callable[[Tensor, Any, Tensor | None], Tensor]
    values: Callable[[Any], Sequence[Tensor]]
    expected: Callable[[int, Any], Any]
    cat: Callable[[Sequence[Any]], Any] | None = None
    split: Callable[[Any, Sequence[int]], Sequence[Any]] | None = None
    row_multiple: int = 1
    gate_up: Callable[[Tensor, Any, Any], Tensor] | None = None


def _rebuild24(tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Sparse24:
    return Sparse24(tensors["packed"], shape, dtype)


def _rebuild_bitmap(
    tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
) -> BitmapSparse:
    return BitmapSparse(tensors["bitmap"], tensors["starts"], tensors["values"], shape)


#: The formats, tried in this order.
FORMATS: dict[str, Format] = {
    "2:4": Format(
        "2:4",
        sparse24_pack,
        _rebuild24,
        Sparse24.from_state_dict,
        sparse24_linear,
        Sparse24.kept_values,
        sparse24_expected,
        cat=sparse24_cat,
        split=sparse24_split,
        row_multiple=16,
        gate_up=sparse24_gate_up,
    ),
    "bitmap": Format(
        "bitmap",
        bitmap_pack,
        _rebuild_bitmap,
        BitmapSparse.from_state_dict,
        bitmap_linear,
        lambda weight: [weight.values],
        bitmap_expected,
        cat=bitmap_cat,
        split=bitmap_split,
        row_multiple=16,
    ),
}


class _Blank(NamedTuple):
    """Stands for a weight whose tensors a checkpoint will fill."""

    shape: Shape
    dtype: torch.dtype
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


class PackedLinear(nn.Module):
    """A linear layer y = x·Wᵀ + bias whose weight is packed.

    Args:
        weight: The packed weight.
        bias: (out_features,), or None.
        format: Name of its format.
        conv1d: Whether it stands for a Conv1D, which keeps its dense weight transposed.
        trainable: Whether the dense weight required gradients, and shall do so when it is back.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: PackedWeight | _Blank,
        bias: nn.Parameter | None,
        format: str,
        *,
        conv1d: bool = False,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.format = format
        self.conv1d = conv1d
        self.trainable = trainable
        self.tensor_names: tuple[str, ...] = ()
        self._hold_(weight)
        self.register_parameter("bias", bias)

    def _hold_(self, weight: PackedWeight | _Blank) -> None:
        tensors = weight.state_dict()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.tensor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Any:
        """The packed weight (shares the buffers)."""
        tensors = {name: getattr(self, name) for name in self.tensor_names}
        shape = (self.out_features, self.in_features)
        return FORMATS[self.format].rebuild(tensors, shape, self.dtype)

    def kept_values(self) -> Sequence[Tensor]:
        """Tensors that hold every weight which is not zero, in no order (sharing memory)."""
        return FORMATS[self.format].values(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return FORMATS[self.format].linear(x, self.weight, self.bias)

    def to_dense(self) -> nn.Module:
        """The dense nn.Linear or Conv1D that this stands for."""
        weight = self.weight.to_dense()
        # on meta: nothing is allocated or initialised only to be replaced
        with torch.device("meta"):
            dense: Any
            if self.conv1d:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        if self.conv1d:
            weight = weight.t().contiguous()
        dense.weight = nn.Parameter(weight, requires_grad=self.trainable)
        dense.bias = self.bias
        return dense.train(self.training)

    def describe(self) -> dict[str, Any]:
        """What `skeleton` needs to make an empty one; JSON-serialisable."""
        tensors = {name: getattr(self, name) for name in self.tensor_names}
        return {
            "format": self.format,
            "shape": [self.out_features, self.in_features],
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensors": {
                name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape]
                for name, tensor in tensors.items()
            },
        }

    @classmethod
    def skeleton(cls, described: Mapping[str, Any], dense: nn.Module) -> PackedLinear:
        """A layer of zeros for `dense`, as `describe` said.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: The description is not valid.
        """
        tensors = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype))
            for name, (dtype, *shape) in described["tensors"].items()
        }
        rows, columns = described["shape"]
        blank = _Blank((rows, columns), getattr(torch, described["dtype"]), tensors)
        bias: Any = dense.bias
        return cls(blank, bias, described["format"], conv1d=isinstance(dense, Conv1D))

    def check(self, name: str) -> None:
        """Raise a PrunekitError unless the tensors are a valid weight of this module's shape.

        Tensors that accelerate has offloaded are not there to be looked at.
        """
        tensors = {n: getattr(self, n) for n in self.tensor_names}
        if any(tensor.is_meta for tensor in tensors.values()):
            return
        try:
            held = FORMATS[self.format].load(tensors)
        except ValueError as error:
            raise PrunekitError(f"{name} is no valid packed weight: {error}") from error
        wanted = ((self.out_features, self.in_features), self.dtype)
        if (tuple(held.shape), held.dtype) != wanted:
            raise PrunekitError(
                f"{name} holds a packed {tuple(held.shape)} weight of {held.dtype}, config.json "
                f"implies {wanted[0]} of {wanted[1]}: save the model again"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # the buffers are integers, which a conversion leaves alone: see what it does to a float
        probe = torch.empty(0, dtype=self.dtype, device=getattr(self, self.tensor_names[0]).device)
        wanted = fn(probe).dtype
        if wanted != self.dtype:
            self._hold_(self.weight.to(dtype=wanted))
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load nothing from a state of another format version, shape or value type."""
        found = state_dict.get(f"{prefix}header")
        held: Tensor = self.header  # type: ignore[assignment]
        if found is not None and not held.is_meta and found.tolist() != held.tolist():
            errors = args[-1]
            errors.append(
                f"{prefix}header is {found.tolist()}, here (version, out, in, type) is "
                f"{held.tolist()}: load a state of this model, or the checkpoint with prunekit.load"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What is held."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, {self.dtype}"
        )


class MergedLinear(PackedLinear):
    """Several projections of the same input as one packed weight; stands where the first was.

    The stock attention calls its projections one by one with the same tensor. The first call
    computes all; the results of the others wait here until their `MergedPart`s are called.

    Args:
        parts: The packed projections, in the order they are called.
    """

    def __init__(self, parts: Sequence[PackedLinear]) -> None:
        first = parts[0]
        cat = FORMATS[first.format].cat
        assert cat is not None
        bias = None
        if first.bias is not None:
            joined = torch.cat([part.bias.detach() for part in parts if part.bias is not None])
            bias = nn.Parameter(joined, requires_grad=first.bias.requires_grad)
        weight = cat([part.weight for part in parts])
        super().__init__(weight, bias, first.format, trainable=first.trainable)
        self.sizes = [part.out_features for part in parts]
        self._waiting: tuple[Tensor, list[Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The first projection of x; the others wait for their turn."""
        first, *rest = torch.split(super().forward(x), self.sizes, -1)
        self._waiting = (x, rest)
        return first

    def take(self, index: int, x: Tensor) -> Tensor:
        """Projection `index` (from 1) of x."""
        waiting = self._waiting
        if waiting is not None and waiting[0] is x:
            if index == len(self.sizes) - 1:
                self._waiting = None
            return waiting[1][index - 1]
        # called alone, or with another input: compute it again
        return torch.split(super().forward(x), self.sizes, -1)[index]

    def parts(self) -> list[PackedLinear]:
        """The projections as layers of their own; they share this one's memory."""
        split = FORMATS[self.format].split
        assert split is not None
        weights = split(self.weight, self.sizes)
        biases: Sequence[Any] = [None] * len(weights)
        if self.bias is not None:
            joined = self.bias.detach()
            biases = [
                nn.Parameter(part, self.bias.requires_grad)
                for part in torch.split(joined, self.sizes)
            ]
        made = [
            PackedLinear(weight, bias, self.format, trainable=self.trainable)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return [part.train(self.training) for part in made]


class MergedPart(nn.Module):
    """Stands where a projection was that a `MergedLinear` computes.

    Args:
        owner: The module that computes it.
        index: Which of its parts.
    """

    def __init__(self, owner: MergedLinear, index: int) -> None:
        super().__init__()
        # in a tuple, so that the owner is not a submodule here too
        self._owner = (owner,)
        self.index = index

    @property
    def owner(self) -> MergedLinear:
        """The module that computes it."""
        return self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        """This projection of x."""
        return self.owner.take(self.index, x)


class FusedGatedMLP(nn.Module):
    """down(SiLU(gate(x))·up(x)) with gate and up in one kernel; stands where the MLP was.

    Args:
        mlp: A module whose gate and up are packed and have no bias.
        parts: Names of gate, up and down in it; they keep these names here.
    """

    def __init__(self, mlp: nn.Module, parts: tuple[str, str, str]) -> None:
        super().__init__()
        for name in parts:
            self.add_module(name, getattr(mlp, name))
        self._parts = parts
        self._original = (mlp,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        gate, up, down = (self._modules[name] for name in self._parts)
        assert isinstance(gate, PackedLinear) and isinstance(up, PackedLinear) and down is not None
        fused = FORMATS[gate.format].gate_up
        assert fused is not None
        projected: Tensor = down(fused(x, gate.weight, up.weight))
        return projected

    @property
    def original(self) -> nn.Module:
        """The module that this replaced, which shares its projections."""
        return self._original[0]


def own_layer(module: nn.Module) -> PackedLinear | None:
    """The packed projection that `module` stands for alone (sharing memory), or None."""
    if isinstance(module, MergedPart):
        return module.owner.parts()[module.index]
    if isinstance(module, MergedLinear):
        return module.parts()[0]
    return module if isinstance(module, PackedLinear) else None


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Every packed projection under its own name, merged ones taken apart (sharing memory)."""
    for name, module in model.named_modules():
        layer = own_layer(module)
        if layer is not None:
            yield name, layer


def prove_kernels(model: nn.Module) -> None:
    """Run the self-tests of the kernels that the packed layers use, once per format and device.

    Without it the first call would: too late if that call is captured in a CUDA graph.
    """
    weights = {
        (layer.format, layer.weight.device): layer.weight for _, layer in packed_layers(model)
    }
    for (format_, device), weight in weights.items():
        if device.type != "meta":
            FORMATS[format_].expected(1, weight)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and packed weights in memory; tied ones count once."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return parameters + sum(module.weight.nbytes for module in packed)


def weight_count(model: nn.Module) -> int:
    """Number of weights, zeros of packed ones included; tied ones count once."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    inside = sum(module.out_features * module.in_features for module in packed)
    return inside + sum(parameter.numel() for parameter in model.parameters())
