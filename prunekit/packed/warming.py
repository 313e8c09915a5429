"""Compile, prove and run what the packed layers of a model will need, before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from prunekernels import warm_up
from torch import nn

from prunekit.errors import PrunekitError
from prunekit.packed.modules import FusedGatedMLP, PackedLinear, check_module, packed_layers
from prunekit.process.progress import counter

#: Where kernels are launched: layers elsewhere have nothing to compile.
DEVICE = "cuda"


def warm_up_(model: nn.Module, tokens: Sequence[int] = (1, 8), *, progress: bool = False) -> int:
    """Make the packed layers of a model ready: their first call takes no longer than the next.

    All kernels that the layers launch at these numbers of tokens are compiled, in processes of
    their own, and tested. After it the model can be captured in a CUDA graph at once; a kernel that
    is first needed inside a capture is an error. Only layers of different shapes take time.
    Nothing about the model changes. On a CPU there is nothing to do.

    Args:
        model: A model with packed layers (`swap_`, or loaded), where it will run.
        tokens: Tokens of a call (batch × new tokens): 1 is decoding one sequence; a prompt's length
            is reading it. Others that the tables treat alike need no compilation either.
        progress: Whether to show a progress bar.

    Returns:
        How many kernels had to be compiled.

    Raises:
        PrunekitError: It is no module, or `tokens` is empty, or holds a number below 1.
    """
    check_module(model)
    if not tokens or min(tokens) < 1:
        raise PrunekitError(f"tokens is {tuple(tokens)}: give tokens per call, each from 1")
    calls = [call for count in dict.fromkeys(tokens) for call in _calls(model, count)]
    with torch.inference_mode(), counter("Compiling kernels", enabled=progress) as show:
        return warm_up(calls, progress=show)


def prove_kernels(model: nn.Module) -> None:
    """Run the self-tests of the kernels that the packed layers use, once per format and device.

    Without it the first call would: too late if that call is captured in a CUDA graph.
    """
    weights = {
        (layer.format, layer.weight.device): layer.weight for _, layer in packed_layers(model)
    }
    for (_, device), weight in weights.items():
        if device.type != "meta":
            weight.expected(1)


def _calls(model: nn.Module, tokens: int) -> list[Callable[[], Any]]:
    """One call for each kind of packed layer on a GPU, on zeros."""
    fused = [module for module in model.modules() if isinstance(module, FusedGatedMLP)]
    inside = {id(part) for module in fused for part in module.projections}
    kinds: dict[Any, Callable[[], Any]] = {}
    for module in model.modules():
        if isinstance(module, FusedGatedMLP):
            layer, run = module.projections[0], module.gated
        elif isinstance(module, PackedLinear) and id(module) not in inside:
            layer, run = module, module.product
        else:
            continue
        weight = layer.weight
        if weight.device.type != DEVICE:
            continue
        bias = layer.bias is not None
        key = (run.__name__, layer.format, weight.shape, layer.dtype, weight.device, bias)
        if key not in kinds:
            kinds[key] = _call(run, tokens, layer)
    return list(kinds.values())


def _call(run: Callable[..., Any], tokens: int, layer: PackedLinear) -> Callable[[], Any]:
    x = torch.zeros(1, tokens, layer.in_features, dtype=layer.dtype, device=layer.weight.device)
    return lambda: run(x)
