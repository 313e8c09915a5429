"""Modules that hold packed sparse weights.

`PackedLinear` takes the place of an `nn.Linear` or Conv1D. Its weight lives in buffers, so it is in
`state_dict`, follows `.to(device)`, and is converted by `.to(dtype)`. `MergedLinear` computes
several projections of one input at once, and `FusedGatedMLP` a Llama-like MLP's gate and up. Which
module becomes which is `prunekit.swap`'s business, what a format is `packed.formats`'s.

Types. A format holds float32, bfloat16 and float16 values. A layer that is converted to another
type (float64) keeps values that it can hold and multiplies densely in that type. Under autocast a
layer returns autocast's type, as nn.Linear does; float32 values are multiplied as float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.packed.autocast import computed_in
from prunekit.packed.formats import FORMATS, VALUE_TYPES, PackedWeight, Shape
from prunekit.packed.remembered import remember_

_WORDS = {2: torch.int16, 4: torch.int32}  # integers of their sizes


class _Blank(NamedTuple):
    """Stands for a weight whose tensors a checkpoint will fill."""

    shape: Shape
    dtype: torch.dtype
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


class PackedLinear(nn.Module):
    """A linear layer y = x·Wᵀ + bias whose weight is packed.

    Attributes:
        dtype: Type that the layer was converted to. Its values are of that type if a format can
            hold it (`VALUE_TYPES`), otherwise of a type that `_apply` chose.

    Args:
        weight: The packed weight.
        bias: (out_features,), or None.
        format: Name of its format.
        conv1d: Whether it stands for a Conv1D, which keeps its dense weight transposed.
        trainable: Whether the dense weight required gradients, and shall do so when it is back.
    """

    bias: nn.Parameter | None
    dtype: torch.dtype

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
        self.dtype = self._held_dtype = weight.dtype
        for name in set(self.tensor_names) - set(tensors):
            delattr(self, name)
        self.tensor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Any:
        """The packed weight (shares the buffers)."""
        held: Any = self._buffers
        shape = (self.out_features, self.in_features)
        return FORMATS[self.format].from_tensors(held, shape, self._held_dtype)

    @property
    def likeness(self) -> Any:
        """What weights that are stacked, or share a kernel's call, have in common."""
        tensors = [(name, getattr(self, name)) for name in self.tensor_names]
        parts = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in tensors)
        return self.format, self.dtype, self.in_features, self.weight.device, parts

    def kept_values(self) -> Sequence[Tensor]:
        """Tensors that hold every weight which is not zero, in no order (sharing memory)."""
        values: list[Tensor] = self.weight.kept_values()
        return values

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # not through nn.Module's search for attributes, which costs as much as a launch
        return self._product(x, self.weight, self._parameters["bias"])

    def product(self, x: Tensor) -> Tensor:
        """x·Wᵀ + bias for all rows that are held, merged ones too."""
        return self._product(x, self.weight, self._parameters["bias"])

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias in the type that nn.Linear would return, `weight` being held here."""
        types = computed_in(x, self.dtype, weight.dtype)
        if types is None:
            return F.linear(x, weight.to_dense().to(self.dtype), bias)
        compute, result = types
        if compute == result == x.dtype:
            direct: Tensor = weight.linear(x, bias)
            return direct
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(compute)
            y: Tensor = weight.linear(x.to(compute), bias)
            return y.to(result)

    def to_dense(self) -> nn.Module:
        """The dense nn.Linear or Conv1D that this stands for; it remembers values that round."""
        packed = self.weight
        weight = packed.to_dense().to(self.dtype)
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
        share_hooks_(dense, self)
        if not packed.exact:
            remember_(dense, packed)
        return dense.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As for any module; says that the weight takes no part in training."""
        if mode and not self.training:
            warnings.warn(
                "packed weights are not trained, only what lies between them: "
                "prunekit.unswap_(model) before training",
                stacklevel=2,
            )
        return super().train(mode)

    def describe(self) -> dict[str, Any]:
        """What `skeleton` needs to make an empty one; JSON-serialisable."""
        tensors = {name: getattr(self, name) for name in self.tensor_names}
        converted = {"converted_to": str(self.dtype).removeprefix("torch.")}
        return {
            "format": self.format,
            "shape": [self.out_features, self.in_features],
            "dtype": str(self._held_dtype).removeprefix("torch."),
            **(converted if self.dtype != self._held_dtype else {}),
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
        made = cls(blank, bias, described["format"], conv1d=isinstance(dense, Conv1D))
        made.dtype = getattr(torch, described.get("converted_to", described["dtype"]))
        return made

    def check(self, name: str) -> None:
        """Raise a PrunekitError unless the tensors are a valid weight of this module's shape.

        What they hold in a former version of the format is converted. Tensors that accelerate has
        offloaded are not there to be looked at.
        """
        tensors = {n: getattr(self, n) for n in self.tensor_names}
        if any(tensor.is_meta for tensor in tensors.values()):
            try:
                FORMATS[self.format].from_tensors(
                    tensors, (self.out_features, self.in_features), self._held_dtype
                )
            except ValueError as error:
                raise PrunekitError(f"{name} cannot be used offloaded: {error}") from error
            return
        try:
            held = FORMATS[self.format].from_state_dict(tensors)
        except ValueError as error:
            raise PrunekitError(f"{name} is no valid packed weight: {error}") from error
        wanted = ((self.out_features, self.in_features), self._held_dtype)
        if (tuple(held.shape), held.dtype) != wanted:
            raise PrunekitError(
                f"{name} holds a packed {tuple(held.shape)} weight of {held.dtype}, config.json "
                f"implies {wanted[0]} of {wanted[1]}: save the model again"
            )
        if set(held.state_dict()) != set(self.tensor_names):
            # a former version of the format, converted
            converted_to = self.dtype
            self._hold_(held)
            self.dtype = converted_to

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # see what it does to a float; the buffers pass as integers, which are moved only
        probe = torch.empty(0, dtype=self.dtype, device=getattr(self, self.tensor_names[0]).device)
        wanted = fn(probe).dtype
        if wanted != self.dtype:
            self._convert_(wanted)
        held = {name: getattr(self, name) for name in self.tensor_names}
        for name, tensor in held.items():
            if tensor.is_floating_point():
                setattr(self, name, tensor.view(_WORDS[tensor.element_size()]))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in held.items():
            setattr(self, name, getattr(self, name).view(tensor.dtype))
        return self

    def _convert_(self, wanted: torch.dtype) -> None:
        """Round the values to a type, and hold them in a type that a format has.

        Values that are quantised stay: what they stand for is rounded when they are used.
        """
        if wanted in VALUE_TYPES:
            self._hold_(self.weight.to(dtype=wanted))
            return
        exact = FORMATS[self.format].exact
        if exact and wanted.is_floating_point and torch.finfo(wanted).bits < 32:
            rounded = self.weight.to_dense().to(wanted).float()
            self._hold_(FORMATS[self.format].pack(rounded))
        # every value that is held is a float64 or a complex number already
        self.dtype = wanted

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load nothing from a dense state, or one of another version, shape or value type."""
        errors = args[-1]
        found = state_dict.get(f"{prefix}header")
        held: Tensor = self.header  # type: ignore[assignment]
        if found is None and f"{prefix}weight" in state_dict:
            errors.append(
                f"{prefix}weight is dense, and packed here: call prunekit.unswap_(model) first"
            )
            return
        if found is not None and not held.is_meta and found.tolist() != held.tolist():
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

    The stock attention calls its projections one by one with the same tensor. While it runs
    (`watch_`), the first call computes all, and the results of the others wait here until their
    `MergedPart`s are called with the unchanged tensor. Every other call computes one projection.

    Args:
        parts: The packed projections, in the order they are called.
        names: Their names in the module around them: by these a checkpoint's separate projections
            are found when a state is loaded.
    """

    def __init__(self, parts: Sequence[PackedLinear], names: Sequence[str] = ()) -> None:
        first = parts[0]
        bias = None
        if first.bias is not None:
            joined = torch.cat([part.bias.detach() for part in parts if part.bias is not None])
            bias = nn.Parameter(joined, requires_grad=first.bias.requires_grad)
        weight = FORMATS[first.format].cat([part.weight for part in parts])
        super().__init__(weight, bias, first.format, trainable=first.trainable)
        self.dtype = first.dtype
        self.sizes = [part.out_features for part in parts]
        self.names = tuple(names)
        self._running = False
        self._waiting: tuple[Tensor, object, list[Tensor]] | None = None

    def watch_(self, attention: nn.Module) -> None:
        """Let results wait while `attention`, which calls the projections, runs."""
        attention.register_forward_pre_hook(self._begin)
        attention.register_forward_hook(self._end, always_call=True)
        register: Any = attention.register_load_state_dict_pre_hook
        register(self._join_)

    def unwatch_(self, attention: nn.Module) -> None:
        """Undo `watch_`."""
        loading: Any = attention._load_state_dict_pre_hooks
        for key in [k for k, h in loading.items() if getattr(h.hook, "__self__", None) is self]:
            del loading[key]
        for hooks in (attention._forward_pre_hooks, attention._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                attention._forward_hooks_always_called.pop(key, None)

    def _join_(self, attention: nn.Module, state: Any, prefix: str, *args: Any) -> None:
        """Make one of the parts' tensors in a state that is about to be loaded.

        A checkpoint has them apart, as trainers that resume hand them over. A state of this very
        model has them merged and stays as it is, as does one that does not fit: loading says why.
        """
        places = [f"{prefix}{name}." for name in self.names]
        if not places or not all(f"{place}header" in state for place in places):
            return
        found = [
            {key.removeprefix(place): state[key] for key in state if key.startswith(place)}
            for place in places
        ]
        biases = [tensors.pop("bias", None) for tensors in found]
        kind = FORMATS[self.format]
        try:
            joined = kind.cat([kind.from_state_dict(tensors) for tensors in found]).state_dict()
        except (ValueError, KeyError):
            return
        if self.bias is not None and all(bias is not None for bias in biases):
            joined["bias"] = torch.cat(biases)
        for place in places:
            for key in [key for key in state if key.startswith(place)]:
                del state[key]
        state.update({f"{places[0]}{name}": tensor for name, tensor in joined.items()})

    def _begin(self, attention: nn.Module, args: Any) -> None:
        self._running, self._waiting = True, None

    def _end(self, attention: nn.Module, args: Any, output: Any) -> None:
        self._running, self._waiting = False, None

    def forward(self, x: Tensor, index: int = 0) -> Tensor:
        """Projection `index` of x (..., in_features).

        The parts come through here too, so that accelerate's hook, which brings offloaded weights
        in and stands in front of `forward`, is in front of theirs.
        """
        if not self._running:
            return self._alone(x, index)
        if index == 0:
            first, *rest = torch.split(super().forward(x), self.sizes, -1)
            self._waiting = (x, _state_of(x), rest)
            return first
        waiting = self._waiting
        if waiting is None or waiting[0] is not x or waiting[1] != _state_of(x):
            return self._alone(x, index)
        if index == len(self.sizes) - 1:
            self._waiting = None
        return waiting[2][index - 1]

    def _alone(self, x: Tensor, index: int) -> Tensor:
        bias = None if self.bias is None else torch.split(self.bias, self.sizes)[index]
        return self._product(x, self.weight.split(self.sizes)[index], bias)

    def parts(self) -> list[PackedLinear]:
        """The projections as layers of their own; they share this one's memory."""
        weights = self.weight.split(self.sizes)
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
        for part in made:
            part.dtype = self.dtype
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
        # `forward` and not a call: the hooks of the first projection are not this one's
        return self.owner.forward(x, self.index)


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
        down: Any = self._modules[self._parts[2]]
        projected: Tensor = down(self.gated(x))
        return projected

    @property
    def projections(self) -> tuple[PackedLinear, PackedLinear]:
        """Gate and up."""
        gate, up = (self._modules[name] for name in self._parts[:2])
        assert isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)
        return gate, up

    def gated(self, x: Tensor) -> Tensor:
        """SiLU(gate(x))·up(x), in one kernel unless hooks want to see the two layers called."""
        gate, up = self.projections
        hooked = _hooked(gate) or _hooked(up)
        types = None if hooked else computed_in(x, gate.dtype, gate.weight.dtype)
        if types is None:
            return F.silu(gate(x)) * up(x)
        compute, result = types
        fused = FORMATS[gate.format].gate_up
        assert fused is not None
        if compute == result == x.dtype:
            return fused(x, gate.weight, up.weight)
        with torch.autocast(x.device.type, enabled=False):
            return fused(x.to(compute), gate.weight, up.weight).to(result)

    @property
    def original(self) -> nn.Module:
        """The module that this replaced, which shares its projections."""
        return self._original[0]


def _state_of(x: Tensor) -> object:
    """What results for x depend on beside its identity: in-place changes, and gradients."""
    # inference tensors count no changes, and inside a compiled graph nothing else can change them
    counted = not (torch.compiler.is_compiling() or x.is_inference())
    return (x._version if counted else None, torch.is_grad_enabled())


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _hooked(module: nn.Module) -> bool:
    """Whether anything beside its own `forward` happens when a module is called."""
    return "forward" in vars(module) or any(vars(module)[name] for name in _HOOKS)


def share_hooks_(new: nn.Module, old: nn.Module) -> None:
    """Let `new`, which takes the place of `old`, call its hooks; their handles keep working."""
    for name in _HOOKS:
        vars(new)[name] = vars(old)[name]
    vars(new)["_is_full_backward_hook"] = vars(old).get("_is_full_backward_hook")


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


def check_module(model: Any) -> None:
    """Raise a PrunekitError unless `model` is a module of torch."""
    if not isinstance(model, nn.Module):
        raise PrunekitError(
            f"{type(model).__name__} is no model: pass one, as prunekit.load gives it"
        )
