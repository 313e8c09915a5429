"""What the packed linear layers have in common: activations, their slopes, and the checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def slope(activation: str, z: Tensor) -> Tensor:
    """Derivative of an activation at z, through ATen's own backward functions."""
    one = torch.ones_like(z)
    if activation == "silu":
        return torch.ops.aten.silu_backward(one, z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    kind = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(one, z, approximate=kind)


def gradients(
    ctx: Any, grad: Tensor, x: Tensor | None, dense: Tensor, bias: Tensor | None, bias_index: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of act(x·Wᵀ + b) for x and b; x may be None where there is no activation.

    Args:
        ctx: The op's context, with `activation`.
        grad: (..., N).
        x: (..., K).
        dense: (N, K) the expanded weight.
        bias: (N,) or None.
        bias_index: The op's argument that is the bias.
    """
    if ctx.activation != "none":
        assert x is not None
        grad = grad * slope(ctx.activation, F.linear(x, dense, bias))
    dx = grad @ dense if ctx.needs_input_grad[0] else None
    dbias = None
    if ctx.needs_input_grad[bias_index]:
        dbias = grad.reshape(-1, dense.shape[0]).sum(0)
    return dx, dbias


def check_input(x: Tensor, w: Any, kind: type, pack: str, name: str = "w") -> None:
    """Raise ValueError unless w is packed as `kind` (by `pack`) and x fits it."""
    if not isinstance(w, kind):
        raise ValueError(
            f"a packed weight is needed, not {type(w).__name__}: pack it with {pack}(weight)"
        )
    packed: Any = w
    if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not end in the {packed.shape[1]} columns of {name}, "
            f"whose shape is {tuple(packed.shape)}"
        )
    if x.dtype != packed.dtype:
        raise ValueError(
            f"x is {x.dtype} and {name} {packed.dtype}: convert one, for example "
            f"x.to({packed.dtype})"
        )
    if x.device != packed.device:
        raise ValueError(
            f"x is on {x.device} and {name} on {packed.device}: move it with .to({str(x.device)!r})"
        )


def check_epilogue(
    op: str, x: Tensor, shape: tuple[int, int], bias: Tensor | None, activation: str | None
) -> str:
    """Raise ValueError unless bias and activation fit a weight of this shape; returns its name."""
    if bias is not None:
        if tuple(bias.shape) != (shape[0],):
            raise ValueError(
                f"{op}: bias must have shape ({shape[0]},) for a weight of shape {tuple(shape)}, "
                f"not {tuple(bias.shape)}"
            )
        if bias.dtype != x.dtype or bias.device != x.device:
            raise ValueError(
                f"{op}: bias is {bias.dtype} on {bias.device} and x {x.dtype} on {x.device}; move "
                "it with bias.to(x)"
            )
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}")
    return name
