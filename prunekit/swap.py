"""Put packed sparse weights and their kernels into a model, and take them out again.

`swap_` replaces linear layers of one model instance whose weight already fits a sparse format;
nothing is pruned, no class is patched. It keeps a layer dense where packing would not pay, and says
why for each. `unswap_` restores ordinary dense layers, equal bit for bit (−0.0 becomes 0.0); those
of 8 and 4 bits remember their numbers, and are packed with them again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from prunekernels import quantized24_pack
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.causal import check_causal
from prunekit.models.packed_saving import save_packed_
from prunekit.models.weight_refs import expert_tensors
from prunekit.packed.formats import FORMATS, PackedWeight
from prunekit.packed.modules import (
    FusedGatedMLP,
    MergedLinear,
    MergedPart,
    PackedLinear,
    check_module,
    packed_layers,
    share_hooks_,
)
from prunekit.packed.remembered import remembered
from prunekit.packed.warming import warm_up_
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import track
from prunekit.pruning.report import align
from prunekit.pruning.rounding import attached

# Saving less than a tenth is not worth a layer that may be slower.
_WORTHWHILE = 0.9


@dataclass(frozen=True)
class ModuleSwap:
    """The outcome for one linear layer: its format, or the reason why it stayed dense.

    Attributes:
        name: Its name in the model.
        shape: (out, in).
        format: "2:4" where it was packed, "" where it stayed dense.
        reason: Why it stayed dense, or what runs it.
        dense_bytes: Bytes of the dense weight.
        bytes: Bytes of the weight now.
        speedup: Expected speed-up, or None where it stayed dense.
        measured: Whether layers like it were measured on this kind of GPU; else it is predicted.
        fused: What computes it together with others: "q_proj+k_proj+v_proj", "gate_proj+up_proj".
    """

    name: str
    shape: tuple[int, ...]
    format: str
    reason: str
    dense_bytes: int
    bytes: int
    speedup: float | None = None
    measured: bool = False
    fused: str = ""


@dataclass(frozen=True)
class SwapReport:
    """The report of `swap_`: the outcome for every linear layer.

    Attributes:
        modules: Every linear layer of the model, in its order.
        device: Type of the device that the model is on.
        tokens: Tokens per call that the decisions are for.
        min_speedup: The smallest expected speed-up that a layer was packed for.
    """

    modules: tuple[ModuleSwap, ...]
    device: str
    tokens: int
    min_speedup: float

    @property
    def swapped(self) -> tuple[ModuleSwap, ...]:
        """The layers that are packed now."""
        return tuple(module for module in self.modules if module.format)

    @property
    def left_dense(self) -> tuple[ModuleSwap, ...]:
        """The layers that stayed dense."""
        return tuple(module for module in self.modules if not module.format)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the packed layers' weights before."""
        return sum(module.dense_bytes for module in self.swapped)

    @property
    def bytes(self) -> int:
        """Bytes of the packed layers' weights now."""
        return sum(module.bytes for module in self.swapped)

    @property
    def faster(self) -> bool:
        """Whether any packed layer is expected to be faster than the dense one, here."""
        return any((module.speedup or 0.0) > 1.0 for module in self.swapped)

    @property
    def verdict(self) -> str:
        """One or two sentences that state the gain."""
        if not self.swapped:
            return "Nothing was packed: see the reasons."
        ratio = self.bytes / self.dense_bytes
        gained = (
            f"Packed {len(self.swapped)} of {len(self.modules)} linear layers: their weights take "
            f"{ratio:.4f} of the dense bytes."
        )
        if self.faster:
            at = f"{self.tokens} token(s) a call"
            return f"{gained} Expected to be faster at {at} ({self._known})."
        why = next(iter(self.swapped)).reason
        return f"{gained} Smaller, but not faster on this machine (slower, rather): {why}."

    @property
    def _known(self) -> str:
        """What the expected speed-ups stand on."""
        faster = [module for module in self.swapped if (module.speedup or 0.0) > 1.0]
        measured = sum(module.measured for module in faster)
        if measured == 0:
            return "predicted"
        if measured == len(faster):
            return "measured on this kind of GPU"
        return f"measured on this kind of GPU for {measured} of {len(faster)}, else predicted"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "device": self.device,
            "tokens": self.tokens,
            "min_speedup": self.min_speedup,
            "packed": len(self.swapped),
            "dense_bytes": self.dense_bytes,
            "bytes": self.bytes,
            "faster": self.faster,
            "verdict": self.verdict,
            "modules": [
                {**dataclasses.asdict(module), "shape": list(module.shape)}
                for module in self.modules
            ],
        }

    def table(self, *, verbose: bool = False) -> str:
        """A plain-text table: a line per kind of layer and decision, or per layer if `verbose`."""
        rows = [("layer", "count", "shape", "format", "bytes", "of dense", "why")]
        groups: dict[Any, list[ModuleSwap]] = {}
        for module in self.modules:
            kind = module.name
            if not verbose:
                kind = ".".join(part for part in kind.split(".") if not part.isdigit())
            why = module.reason if verbose else module.reason.partition(": ")[0]
            groups.setdefault((kind, module.shape, module.format, why), []).append(module)
        for (kind, shape, format_, why), members in groups.items():
            size, dense = sum(m.bytes for m in members), sum(m.dense_bytes for m in members)
            rows.append(
                (
                    kind,
                    str(len(members)),
                    "×".join(map(str, shape)),
                    format_ or "dense",
                    f"{size:,}",
                    f"{size / dense:.4f}",
                    why,
                )
            )
        return "\n".join(align(rows))


@usual_torch()
def swap_(
    model: PreTrainedModel,
    *,
    min_speedup: float | None = None,
    tokens: int = 1,
    formats: Sequence[str] | None = None,
    merge: bool = True,
    warm_up: Sequence[int] = (),
    progress: bool = False,
) -> SwapReport:
    """Pack the linear layers of `model` whose weights fit a sparse format, in place.

    The output head, tied weights, fused experts and subclasses of `nn.Linear` stay as they are. A
    layer that does not fit stays dense; nothing is pruned. Packed weights cannot be trained.

    Args:
        model: A causal language model, anywhere but on the meta device.
        min_speedup: Pack a layer only if it is expected to be at least so much faster at `tokens`
            tokens a call. None: 1.0 on a GPU; elsewhere packing saves memory but never time, so
            everything that fits is packed.
        tokens: Tokens per call (batch × new tokens) to decide for: 1 is decoding one sequence.
        formats: Names of the formats to try, in order; None: all that keep every value. "2:4-int8",
            "2:4-fp8" and "2:4-int4" round to nearest, and only run when they are named, or keep
            every value because pruning in this process rounded the layer (`bits`), or because it
            was unpacked from such a format.
        merge: Whether to compute q/k/v together, and gate/up with their SiLU, where the
            architecture allows it.
        warm_up: Numbers of tokens a call for which kernels are compiled and tested at once (see
            `warm_up_`): needed before a CUDA graph is captured.
        progress: Whether to show a progress bar.

    Returns:
        What became of each linear layer, and why.

    Raises:
        PrunekitError: An argument, the model or its device does not fit; the model is unchanged.
    """
    check_causal(model)
    if merge:
        Architecture(model)  # what `merge_` asks for is known before anything is packed
    chosen = None if formats is None else _checked_formats(formats)
    if tokens < 1 or min(warm_up, default=1) < 1:
        given = min((tokens, *warm_up))
        raise PrunekitError(f"tokens is {given}: give the tokens per call, from 1")
    device = _device(model)
    least = min_speedup
    if least is None:
        least = 1.0 if device.type == "cuda" else 0.0
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    head = model.get_output_embeddings()
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or expert_tensors(module)
    ]
    decisions: dict[str, ModuleSwap] = {}
    try:
        for name, module in track(linears, "Packing", enabled=progress):
            blocker = _blocker(module, module is head, uses)
            if blocker is not None:
                decisions[name] = _left(name, module, blocker)
            else:
                tried = keeping_formats(module) if chosen is None else chosen
                decisions[name] = _pack_(model, name, module, tried, least, tokens)
        fused = merge_(model) if merge else {}
        save_packed_(model)
        if warm_up:
            warm_up_(model, warm_up, progress=progress)
    except BaseException:
        unswap_(model)
        raise
    done = [dataclasses.replace(d, fused=fused.get(n, "")) for n, d in decisions.items()]
    return SwapReport(tuple(done), device.type, tokens, least)


def exact_formats() -> list[str]:
    """Names of the formats that hold weights as they are, unrounded."""
    return [name for name, kind in FORMATS.items() if kind.exact]


def keeping_formats(module: nn.Module) -> list[str]:
    """Names of the formats that hold a layer's weight as it is, in the order to try them.

    The first is that of the numbers that pruning chose, or that the layer was unpacked from.
    """
    chosen = (remembered(module), attached(module))
    rounded = next((held.format for held in chosen if held is not None), None)
    return exact_formats() if rounded is None else [rounded, *exact_formats()]


def _checked_formats(formats: Sequence[str]) -> list[str]:
    chosen = list(formats)
    for name in chosen:
        if name not in FORMATS:
            raise PrunekitError(f"unknown format {name!r}: use one of {', '.join(FORMATS)}")
    return chosen


def _device(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices):
        raise PrunekitError("weights are on the meta device or offloaded: load the model whole")
    return max(devices, key=lambda device: device.type == "cuda", default=torch.device("cpu"))


def _blocker(module: nn.Module, is_head: bool, uses: Counter[int]) -> str | None:
    """The reason why a module cannot be packed at all, or None."""
    if not isinstance(module, nn.Linear | Conv1D):
        return "experts stored as one tensor"
    if is_head:
        return "output head"
    if type(module) not in (nn.Linear, Conv1D):
        return f"is a {type(module).__name__}"
    if "weight" not in module._parameters:
        return "its weight is computed from other tensors"
    if uses[id(module.weight)] > 1:
        return "shares its weight with another module"
    return None


def _left(name: str, module: Any, reason: str) -> ModuleSwap:
    held = expert_tensors(module) or [module.weight]
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    shape = tuple(held[0].shape)
    return ModuleSwap(
        name, shape[::-1] if type(module) is Conv1D else shape, "", reason, size, size
    )


def _pack_(
    model: nn.Module, name: str, module: Any, formats: Iterable[str], least: float, tokens: int
) -> ModuleSwap:
    """Pack one layer if a format fits and pays."""
    conv1d = isinstance(module, Conv1D)
    dense = module.weight.detach()
    if conv1d:
        dense = dense.t()
    rows, columns = dense.shape
    fit = fitting(module, dense, formats, least, tokens)
    if fit.weight is None:
        return _left(name, module, fit.reason)
    packed = fit.weight
    made = PackedLinear(
        packed,
        module.bias,
        packed.format,
        conv1d=conv1d,
        trainable=module.weight.requires_grad,
    )
    _replace_(model, name, made.train(module.training))
    size = dense.numel() * dense.element_size()
    told = (name, (rows, columns), packed.format, fit.reason, size, packed.nbytes)
    return ModuleSwap(*told, fit.speedup, fit.measured)


class Fit(NamedTuple):
    """What a matrix is best stored as.

    Attributes:
        weight: The packed weight, None where the matrix stays dense.
        speedup: Expected speed-up over the dense matrix.
        reason: What runs it, or why it stays dense.
        measured: Whether the speed-up was measured on this kind of GPU.
    """

    weight: PackedWeight | None
    speedup: float
    reason: str
    measured: bool = False


def fitting(
    module: nn.Module, dense: Tensor, formats: Iterable[str], least: float, tokens: int
) -> Fit:
    """The first format that holds a matrix and pays.

    Args:
        module: The layer that it is of, which may hold numbers that pruning chose.
        dense: (out, in).
        formats: Names of the formats to try.
        least: Smallest expected speed-up.
        tokens: Tokens per call to decide for.
    """
    size = dense.numel() * dense.element_size()
    reasons = []
    for name in formats:
        try:
            packed = _packed(name, module, dense)
        except ValueError as error:
            reasons.append(str(error).partition(";")[0])
            continue
        if packed.nbytes > _WORTHWHILE * size:
            part = packed.nbytes / size
            reasons.append(f"hardly smaller as {name}: {part:.2f} of the dense bytes")
            continue
        gain = packed.expected(tokens)
        if gain.speedup < least:
            reasons.append(f"slower as {name}: expected {gain.speedup:.2f}× ({gain.reason})")
            continue
        return Fit(packed, gain.speedup, gain.reason, gain.measured)
    return Fit(None, 1.0, "; ".join(reasons))


def _packed(format_: str, module: nn.Module, dense: torch.Tensor) -> PackedWeight:
    """`dense` in a format: with the numbers that were chosen, where they are of this format."""
    held = remembered(module)
    if held is not None and held.format == format_:
        return held
    rounded = attached(module)
    if rounded is None or rounded.format != format_:
        return FORMATS[format_].pack(dense)
    codes, kept = rounded.codes, rounded.codes.float() != 0
    return quantized24_pack(codes, kept, rounded.scales, kind=format_, dtype=dense.dtype)


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    share_hooks_(module, model.get_submodule(name))
    setattr(model.get_submodule(parent), attribute, module)


def merge_(model: PreTrainedModel) -> dict[str, str]:
    """Compute packed q/k/v projections together, and gate/up with their SiLU.

    Args:
        model: A model with packed layers of a supported architecture.

    Returns:
        For each layer that is computed with others, by name, which ones. Layers that accelerate
        offloads stay apart: they are filled one by one when they run.
    """
    arch = Architecture(model)
    fused: dict[str, str] = {}
    for index in range(len(arch.layers)):
        for projections in list(arch.shared_projections(index)):
            fused |= _merge_(model, projections)
        for path, names in list(arch.silu_mlps(index)):
            mlp = model.get_submodule(path)
            both = (f"{path}.{names.gate}", f"{path}.{names.up}")
            if _fusable(getattr(mlp, names.gate), getattr(mlp, names.up)):
                parts = (names.gate, names.up, names.down)
                _replace_(model, path, FusedGatedMLP(mlp, parts).train(mlp.training))
                fused |= dict.fromkeys(both, f"{names.gate}+{names.up}")
            else:
                fused |= _merge_(model, both)
    return fused


def _merge_(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Compute these projections of one input together, if they fit; what `merge_` returns."""
    parts: list[Any] = [model.get_submodule(name) for name in names]
    if not _mergeable(parts):
        return {}
    own = [name.rpartition(".")[2] for name in names]
    owner = MergedLinear(parts, own).train(parts[0].training)
    owner.watch_(model.get_submodule(names[0].rpartition(".")[0]))
    _replace_(model, names[0], owner)
    for place, name in enumerate(names[1:], start=1):
        _replace_(model, name, MergedPart(owner, place))
    return dict.fromkeys(names, "+".join(own))


def _mergeable(parts: Sequence[Any]) -> bool:
    first = parts[0]
    if not all(type(part) is PackedLinear for part in parts):
        return False
    multiple = FORMATS[first.format].row_multiple
    return (
        len({(part.likeness, part.bias is None) for part in parts}) == 1
        and first.weight.device.type != "meta"
        and not any(part.out_features % multiple for part in parts[:-1])
    )


def _fusable(gate: Any, up: Any) -> bool:
    return (
        type(gate) is PackedLinear
        and type(up) is PackedLinear
        and gate.likeness == up.likeness
        and FORMATS[gate.format].gate_up is not None
        and gate.bias is None
        and up.bias is None
        and gate.out_features == up.out_features
        and gate.weight.device.type != "meta"
    )


@usual_torch()
def unswap_(model: nn.Module) -> list[str]:
    """Make every packed layer of `model` a dense one again, in place.

    Args:
        model: A swapped model; one without packed layers is left alone.

    Returns:
        Names of the layers that are dense now.

    Raises:
        PrunekitError: It is no module.
    """
    check_module(model)
    vars(model).pop("save_pretrained", None)
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedGatedMLP):
            _replace_(model, name, module.original)
    for name, module in list(model.named_modules()):
        if isinstance(module, MergedLinear):
            module.unwatch_(model.get_submodule(name.rpartition(".")[0]))
    for name, module in list(packed_layers(model)):
        _replace_(model, name, module)
    restored = [n for n, module in model.named_modules() if isinstance(module, PackedLinear)]
    # one at a time, so that at most one is held twice
    for name in restored:
        packed: Any = model.get_submodule(name)
        _replace_(model, name, packed.to_dense())
    return restored
