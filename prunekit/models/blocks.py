"""Run a model one decoder layer at a time.

Calibration, scoring and analysis all need a layer's true inputs and the exact keyword arguments
(masks, position embeddings, …) that the installed transformers version calls it with. `capture`
records them by running the model once with its layers stubbed out, which costs an embedding
look-up; `run_layer` and `trace_layer` then replay any layer on any hidden state.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.models.architectures import Architecture

Keywords = dict[str, Any]


@dataclass
class LayerInputs:
    """The inputs that one batch presents to the decoder layers.

    Attributes:
        hidden: (batch, tokens, hidden): the first layer's input.
        kwargs: Per layer, every other argument of its call, by name.
    """

    hidden: Tensor
    kwargs: list[Keywords]


@dataclass(frozen=True)
class LayerTrace:
    """One layer split at its residual additions; every tensor is (batch, tokens, hidden).

    Attributes:
        attn_input: Enters the attention sublayer (before its norm); its residual too.
        attn_out: What attention adds.
        mlp_input: Enters the MLP sublayer (before its norm): equals `mlp_residual` unless the
            architecture runs both in parallel.
        mlp_residual: What the MLP's output is added to.
        mlp_out: What the MLP adds.
    """

    attn_input: Tensor
    attn_out: Tensor
    mlp_input: Tensor
    mlp_residual: Tensor
    mlp_out: Tensor

    @property
    def output(self) -> Tensor:
        """The layer's output."""
        return self.mlp_residual + self.mlp_out


@torch.inference_mode()
def capture(arch: Architecture, input_ids: Tensor) -> LayerInputs:
    """Record the first layer's input and every layer's keyword arguments, running no layer.

    Args:
        arch: The model.
        input_ids: (batch, tokens), int64, on the device of the model's embedding. Padding belongs
            on the right, where causal attention needs no mask for it.
    """
    calls: list[tuple[Tensor, Keywords]] = []

    def recorder(layer: nn.Module) -> Callable[..., Tensor]:
        signature = inspect.signature(type(layer).forward)

        def record(*args: Any, **kwargs: Any) -> Tensor:
            bound = signature.bind(layer, *args, **kwargs).arguments
            del bound["self"]
            hidden = bound.pop("hidden_states")
            calls.append((hidden, {**bound, **bound.pop("kwargs", {})}))
            return hidden

        return record

    with contextlib.ExitStack() as stack:
        for layer in arch.layers:
            stack.enter_context(_forward_replaced(layer, recorder(layer)))
        arch.base(input_ids=input_ids, use_cache=False)
    return LayerInputs(calls[0][0], [kwargs for _, kwargs in calls])


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Give one instance another forward for a while; an instance's own (accelerate's) returns."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_layer(arch: Architecture, index: int, hidden: Tensor, kwargs: Keywords) -> Tensor:
    """Output (batch, tokens, hidden) of layer `index`, through its own forward."""
    out = arch.layers[index](hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def run_layer_with(
    layer: nn.Module, parameters: Mapping[str, Tensor], hidden: Tensor, kwargs: Keywords
) -> Tensor:
    """Output (batch, tokens, hidden) of a layer with other parameters, in the type of `hidden`.

    Differentiable in the parameters, which are rounded on their way in.

    Args:
        layer: A decoder layer; unchanged.
        parameters: Each of its parameters by name, of any floating type.
        hidden: (batch, tokens, hidden): the layer's input.
        kwargs: The other arguments of its call.
    """
    held = {**parameters, **dict(layer.named_buffers())}
    rounded = {
        name: tensor.to(hidden.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in held.items()
    }
    out: Any = torch.func.functional_call(layer, rounded, (hidden,), kwargs)
    return out[0] if isinstance(out, tuple) else out


def trace_layer(arch: Architecture, index: int, hidden: Tensor, kwargs: Keywords) -> LayerTrace:
    """Run layer `index` sublayer by sublayer, keeping what each reads and adds."""
    attn_out = arch.contribution(index, "attn", hidden, kwargs)
    hidden = hidden.to(attn_out.device)  # of a model over several devices
    mlp_residual = hidden + attn_out
    mlp_input = hidden if arch.parallel else mlp_residual
    mlp_out = arch.contribution(index, "mlp", mlp_input, kwargs)
    mlp_residual = mlp_residual.to(mlp_out.device)  # where attention was dropped
    return LayerTrace(hidden, attn_out, mlp_input, mlp_residual, mlp_out)
