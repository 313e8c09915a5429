"""Compressed copies of a model on disk, part by part, and the model made of any mix of them.

A part is one sublayer of a decoder layer: its modules and its norms. A copy's file holds the
tensors of its parts that differ from the dense model's, and what each part costs; of matrices with
8- or 4-bit values the packed weights, too. The mixed model is the dense one with some parts'
tensors overwritten; a dropped part is silenced by zeros in the matrices that write into the
residual stream, which computes what a model without it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.divergence.capture import save_tensors
from prunekit.divergence.processes import by_main, together
from prunekit.errors import PrunekitError
from prunekit.mixing.mixes import Costs, Mix
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_sublayers_
from prunekit.models.layouts import SUBLAYERS
from prunekit.models.weight_refs import WeightRef
from prunekit.packed import FORMATS, PackedWeight
from prunekit.packed.remembered import remember_
from prunekit.pruning.rounding import forget_
from prunekit.swap import fitting, keeping_formats, unswap_

DENSE, DROP = "dense", "drop"
#: In a copy's file, between a matrix's name and that of a tensor of its packed weight.
_PACKED = ".packed:"


@dataclass(frozen=True)
class Part:
    """One sublayer of a decoder layer.

    Attributes:
        layer: Index of the layer.
        sublayer: "attn" or "mlp".
    """

    layer: int
    sublayer: str


def parts_of(arch: Architecture) -> list[Part]:
    """The sublayers that are there, in the order in which they run."""
    return [
        Part(index, sublayer)
        for index in range(len(arch.layers))
        for sublayer in SUBLAYERS
        if not arch.is_dropped(index, sublayer)
    ]


def parameters_of(arch: Architecture, part: Part) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a part's modules and norms."""
    branch = arch.branch(part.sublayer)
    layer = arch.layers[part.layer]
    for child in (branch.norm, *branch.modules, branch.post_norm):
        if child is not None:
            prefix = f"{arch.layout.layers}.{part.layer}.{child}"
            yield from getattr(layer, child).named_parameters(prefix=prefix)


@dataclass(frozen=True)
class Cost:
    """What a part, or all that belongs to none, costs.

    Attributes:
        bytes: Of its tensors, as they are stored.
        read: Bytes that a dense layer reads in the time that this takes in decoding: `bytes` of
            dense tensors, of others dense bytes over the expected speed-up, if there is one.
    """

    bytes: int
    read: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.read + other.read)


def cost_of(arch: Architecture, part: Part, tokens: int) -> Cost:
    """What a part costs as it is: masked matrices count as the format that would hold them.

    Args:
        arch: A dense or masked model.
        part: One of its parts.
        tokens: Tokens per call that the speed is for.
    """
    return _held(arch, part, tokens)[0]


def _held(arch: Architecture, part: Part, tokens: int) -> tuple[Cost, dict[str, PackedWeight]]:
    """What a part costs, and by name the packed weights of its matrices whose values round."""
    total = Cost(0, 0.0)
    rounded: dict[str, PackedWeight] = {}
    matrices = set()
    for ref in _refs(arch, part):
        matrix = ref.matrix
        matrices.add(id(getattr(ref.module, ref.parameter)))
        held = (
            fitting(ref.module, matrix, keeping_formats(ref.module), 0.0, tokens)
            if ref.expert is None
            else None
        )
        if held is None or held.weight is None:
            total += Cost(matrix.nbytes, float(matrix.nbytes))
            continue
        total += Cost(held.weight.nbytes, matrix.nbytes / max(held.speedup, 1.0))
        if not held.weight.exact:
            rounded[ref.name] = held.weight
    for _, parameter in parameters_of(arch, part):
        if id(parameter) not in matrices:
            total += Cost(parameter.nbytes, float(parameter.nbytes))
    return total, rounded


def _refs(arch: Architecture, part: Part) -> list[WeightRef]:
    return [ref for ref in arch.weights(part.layer) if ref.sublayer == part.sublayer]


def fixed_cost(arch: Architecture) -> Cost:
    """What belongs to no part; of it, decoding reads the head."""
    inside = {id(p) for part in parts_of(arch) for _, p in parameters_of(arch, part)}
    rest = sum(p.nbytes for p in arch.model.parameters() if id(p) not in inside)
    return Cost(rest, float(arch.head.weight.nbytes))


class Mixture:
    """A model whose parts can each be made dense, dropped, or those of a copy.

    Args:
        model: The dense model; `apply_` changes it in place.
        folder: Where the dense model's and the copies' tensors are kept.
        made_of: What the dense model is: see `has`.
        tokens: Tokens per call that speeds are for.

    Attributes:
        choices: Names of the choices, "dense" first.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, made_of: str, tokens: int = 1) -> None:
        self.arch = Architecture(model)
        self.parts = parts_of(self.arch)
        self.choices = [DENSE]
        self._folder, self._tokens = folder, tokens
        self._files = ExitStack()
        self._tensors: list[Any] = []  # open files of choices, None for "drop"
        self._costs: list[list[Cost]] = []
        self._rounded: list[dict[str, str]] = []  # per choice: formats of rounded matrices
        self._now: Mix = (0,) * len(self.parts)
        self._fixed = fixed_cost(self.arch)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.has(DENSE, made_of):
            tensors = {n: p.data for part in self.parts for n, p in parameters_of(self.arch, part)}
            costs = [cost_of(self.arch, part, tokens) for part in self.parts]
            self._write(DENSE, tensors, costs, {}, made_of)
        self._open(DENSE)

    def has(self, name: str, made_of: str) -> bool:
        """Whether the copy is on disk, made of just that, for all processes."""
        return together(lambda: self._has(name, made_of))

    def _has(self, name: str, made_of: str) -> bool:
        try:
            with safe_open(self._path(name), framework="pt") as held:
                told = json.loads(held.metadata()["copy"])
                return bool(told["made_of"] == made_of) and "rounded" in told
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return False

    def write(self, name: str, model: PreTrainedModel, made_of: str) -> None:
        """Put a copy on disk; under several processes each has the copy, and the main one writes.

        Args:
            name: The choice that it becomes.
            model: The copy: masked, packed or changed, but of the same shapes. It is converted to
                the dense model's type and unpacked; 8- and 4-bit values are kept beside. May be
                this mixture's own model, which `restore_` makes dense again.
            made_of: What it was made of: see `has`.

        Raises:
            PrunekitError: It lacks a sublayer, or differs elsewhere than in a sublayer.
        """
        arch = Architecture(model)
        lacking = [part for part in self.parts if part not in parts_of(arch)]
        if len(arch.layers) != len(self.arch.layers) or lacking:
            raise PrunekitError(
                f"{name} lacks sublayers of the dense model: name only copies that have all, the "
                "search drops sublayers itself (--choices drop)"
            )
        if model.dtype != self.arch.model.dtype:
            model.to(self.arch.model.dtype)
        unswap_(model)
        costs: list[Cost] = []
        rounded: dict[str, PackedWeight] = {}
        changed = {}
        dense = self._tensors[0]
        for part in self.parts:
            cost, weights = _held(arch, part, self._tokens)
            costs.append(cost)
            rounded |= weights
            for path, parameter in parameters_of(arch, part):
                original = dense.get_tensor(path)
                if parameter.shape != original.shape:
                    raise PrunekitError(
                        f"{name}: {path} has shape {tuple(parameter.shape)}, the dense model's "
                        f"{tuple(original.shape)}: name copies of one model"
                    )
                tensor = parameter.data.to("cpu", original.dtype)
                if not torch.equal(tensor, original):
                    changed[path] = tensor.contiguous()
        if model is not self.arch.model:
            self._check_rest(name, model)
        self._write(name, changed, costs, rounded, made_of)

    def add(self, name: str) -> None:
        """Offer a choice: "drop", or a copy that is on disk."""
        self.choices.append(name)
        if name == DROP:
            self._tensors.append(None)
            self._costs.append([Cost(0, 0.0)] * len(self.parts))
            self._rounded.append({})
        else:
            self._open(name)

    def costs(self, what: str) -> Costs:
        """What the choices cost.

        Args:
            what: "bytes" or "read".
        """
        table = [[float(getattr(cost, what)) for cost in column] for column in self._costs]
        return Costs(np.array(table, np.float64).T, float(getattr(self._fixed, what)))

    def apply_(self, mix: Mix) -> None:
        """Make the model this mix; parts that have their choice already are not touched."""
        for part, former, choice in zip(self.parts, self._now, mix, strict=True):
            if former != choice:
                self._set_(part, former, choice)
        self._now = tuple(mix)

    def restore_(self) -> None:
        """Make all parts dense, whatever happened to the model's weights."""
        for part in self.parts:
            for path, parameter in parameters_of(self.arch, part):
                parameter.data.copy_(self._tensors[0].get_tensor(path))
            for ref in _refs(self.arch, part):
                forget_(ref.module)
        self._now = (0,) * len(self.parts)

    def keep_(self, mix: Mix) -> None:
        """Make the model this mix, for good: dropped parts are gone, `swap_` packs rounded ones."""
        self.apply_(mix)
        for part, choice in zip(self.parts, mix, strict=True):
            for ref in _refs(self.arch, part):
                if ref.name in self._rounded[choice]:
                    remember_(ref.module, self._packed(choice, ref.name))
        gone = {sublayer: self.dropped(mix, sublayer) for sublayer in SUBLAYERS}
        if any(gone.values()):
            drop_sublayers_(self.arch.model, **gone)

    def dropped(self, mix: Mix, sublayer: str) -> list[int]:
        """Layers whose sublayer a mix drops."""
        named = zip(self.parts, mix, strict=True)
        return [
            part.layer
            for part, choice in named
            if part.sublayer == sublayer and self.choices[choice] == DROP
        ]

    def close(self) -> None:
        """Close the copies' files."""
        self._files.close()

    def _set_(self, part: Part, former: int, choice: int) -> None:
        dense, before, after = (self._tensors[index] for index in (0, former, choice))
        kept = set() if before is None or former == 0 else set(before.keys())
        new = set() if after is None or choice == 0 else set(after.keys())
        for path, parameter in parameters_of(self.arch, part):
            if path in new:
                parameter.data.copy_(after.get_tensor(path))
            elif path in kept or before is None:
                parameter.data.copy_(dense.get_tensor(path))
        if after is None:
            for tensor in self.arch.last_projection(part.layer, part.sublayer):
                tensor.zero_()

    def _check_rest(self, name: str, model: PreTrainedModel) -> None:
        """See that another model differs from the dense one in its parts alone."""
        inside = set(self._tensors[0].keys())
        theirs = dict(model.named_parameters())
        for path, tensor in self.arch.model.named_parameters():
            if path in inside:
                continue
            other = theirs.get(path)
            if other is None or not torch.equal(other.to(tensor.device, tensor.dtype), tensor):
                raise PrunekitError(
                    f"{name} differs in {path}, which belongs to no sublayer: only sublayers can "
                    "be mixed"
                )

    def _packed(self, choice: int, name: str) -> PackedWeight:
        """The rounded matrix of this name in a choice's copy."""
        held, prefix = self._tensors[choice], f"{name}{_PACKED}"
        state = {
            key.removeprefix(prefix): held.get_tensor(key)
            for key in held.keys()  # noqa: SIM118 (a file, which is no mapping)
            if key.startswith(prefix)
        }
        return FORMATS[self._rounded[choice][name]].from_state_dict(state)

    def _path(self, name: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in name)
        return self._folder / f"{safe}.safetensors"

    def _write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        costs: Sequence[Cost],
        rounded: Mapping[str, PackedWeight],
        made_of: str,
    ) -> None:
        packed = {
            f"{path}{_PACKED}{key}": tensor
            for path, weight in rounded.items()
            for key, tensor in weight.state_dict().items()
        }
        told = {
            "made_of": made_of,
            "costs": [[cost.bytes, cost.read] for cost in costs],
            "rounded": {path: weight.format for path, weight in rounded.items()},
        }
        facts = {"copy": json.dumps(told)}
        by_main(lambda: save_tensors(self._path(name), {**tensors, **packed}, facts))

    def _open(self, name: str) -> None:
        held = self._files.enter_context(safe_open(self._path(name), framework="pt"))
        told = json.loads(held.metadata()["copy"])
        self._costs.append([Cost(int(size), float(read)) for size, read in told["costs"]])
        self._rounded.append(told["rounded"])
        self._tensors.append(held)
