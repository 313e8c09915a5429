"""y = activation(x·Wᵀ + bias) with W packed 2:4, and the fused pair SiLU(x·Wgᵀ)·(x·Wuᵀ).

The eager implementation expands the weight for the duration of the call, on a CPU piece by piece,
and uses the dense matrix multiplication: on a GPU that is also the path for many tokens. Kernels
that read the packed buffer are chosen by `two_four.dispatch.DISPATCH`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.sparse.layer import (
    ACTIVATIONS,
    check_epilogue,
    check_input,
    gradients,
    slope,
)
from prunekernels.sparse.two_four.dispatch import DISPATCH, expand
from prunekernels.sparse.two_four.expand import product
from prunekernels.sparse.two_four.format import Sparse24
from prunekernels.sparse.two_four.layout import packed_shape


def sparse24_linear(
    x: Tensor,
    w: Sparse24,
    bias: Tensor | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a packed 2:4 weight.

    Equivalent to `act(torch.nn.functional.linear(x, w.to_dense(), bias))`; the kernels keep the
    sum, the bias and the activation in float32 and round once. Differentiable in `x` and `bias`;
    the weight cannot be trained while packed.

    Args:
        x: (..., K), the type and device of `w`.
        w: Packed (N, K) weight.
        bias: (N,), like `x`, or None.
        activation: None, "silu", "gelu_tanh", "gelu" (erf) or "relu".
        impl: "auto", "eager" (expand, then dense), "triton" (any GPU, and the interpreter),
            "mma_sp" (NVIDIA's sparse tensor cores) or "wgmma_sp" (Hopper's, not proven on hardware
            yet: "auto" never takes it).

    Returns:
        (..., N), the type of `x`, contiguous.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    check_input(x, w, Sparse24, "sparse24_pack")
    name = check_epilogue("sparse24_linear", x, w.shape, bias, activation)
    DISPATCH.check_impl(impl)
    return torch.ops.prunekernels.sparse24_linear(x, w.packed, *w.shape, bias, name, impl)


def sparse24_gate_up(x: Tensor, gate: Sparse24, up: Sparse24, impl: str = "auto") -> Tensor:
    """The gated half of a Llama MLP in one kernel: SiLU(x·Wgᵀ)·(x·Wuᵀ).

    Equivalent to `F.silu(F.linear(x, gate.to_dense())) * F.linear(x, up.to_dense())` without
    writing the two intermediate activations.

    Args:
        x: (..., K), the type and device of both weights.
        gate: Packed (N, K) weight.
        up: Packed (N, K) weight.
        impl: As in `sparse24_linear`.

    Returns:
        (..., N), the type of `x`, contiguous.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    check_input(x, gate, Sparse24, "sparse24_pack", "gate")
    check_input(x, up, Sparse24, "sparse24_pack", "up")
    if gate.shape != up.shape:
        raise ValueError(
            f"sparse24_gate_up: gate and up must have the same shape, not {tuple(gate.shape)} and "
            f"{tuple(up.shape)}"
        )
    DISPATCH.check_impl(impl)
    return torch.ops.prunekernels.sparse24_gate_up(x, gate.packed, up.packed, *gate.shape, impl)


@torch.library.custom_op("prunekernels::sparse24_expand", mutates_args=())
def _expand_op(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return expand(packed, rows, columns, dtype)


@_expand_op.register_fake
def _(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((rows, columns), dtype=dtype)


@torch.library.custom_op("prunekernels::sparse24_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    packed: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    flat = x.reshape(-1, columns)
    choice = DISPATCH.select(flat, rows, impl)
    if choice.name == "eager" or flat.shape[0] == 0:
        y = ACTIVATIONS[activation](_dense_product(flat, packed, rows, bias))
    else:
        parts = flat, packed, None, rows, bias, activation
        y = DISPATCH.call(choice.name, "forward", flat.device, *parts)
    return y.view(*x.shape[:-1], rows)


@_linear_op.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    _check_buffer(packed, rows, columns, x.dtype)
    return x.new_empty((*x.shape[:-1], rows))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, ctx.rows, ctx.columns, bias, ctx.activation, _ = inputs
    ctx.save_for_backward(x if ctx.activation != "none" else None, packed, bias)
    ctx.dtype = output.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, bias = ctx.saved_tensors
    dense = torch.ops.prunekernels.sparse24_expand(packed, ctx.rows, ctx.columns, ctx.dtype)
    dx, dbias = gradients(ctx, grad, x, dense, bias, 4)
    return dx, None, None, None, dbias, None, None


_linear_op.register_autograd(_linear_backward, setup_context=_save_linear)


@torch.library.custom_op("prunekernels::sparse24_gate_up", mutates_args=())
def _gate_up_op(x: Tensor, gate: Tensor, up: Tensor, rows: int, columns: int, impl: str) -> Tensor:
    flat = x.reshape(-1, columns)
    choice = DISPATCH.select(flat, rows, impl)
    if choice.name == "eager" or flat.shape[0] == 0:
        # one dense weight at a time
        y = F.silu(_dense_product(flat, gate, rows, None))
        y = y * _dense_product(flat, up, rows, None)
    else:
        parts = flat, gate, up, rows, None, "silu"
        y = DISPATCH.call(choice.name, "forward", flat.device, *parts)
    return y.view(*x.shape[:-1], rows)


@_gate_up_op.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, rows: int, columns: int, impl: str) -> Tensor:
    _check_buffer(gate, rows, columns, x.dtype)
    return x.new_empty((*x.shape[:-1], rows))


def _save_gate_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, up, ctx.rows, ctx.columns, _ = inputs
    ctx.save_for_backward(x, gate, up)


def _gate_up_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, up = ctx.saved_tensors
    expand = torch.ops.prunekernels.sparse24_expand
    wide_gate = expand(gate, ctx.rows, ctx.columns, x.dtype)
    wide_up = expand(up, ctx.rows, ctx.columns, x.dtype)
    z = F.linear(x, wide_gate)
    dx = (grad * F.linear(x, wide_up) * slope("silu", z)) @ wide_gate
    dx = dx + (grad * F.silu(z)) @ wide_up
    return dx, None, None, None, None, None


_gate_up_op.register_autograd(_gate_up_backward, setup_context=_save_gate_up)


def _dense_product(x: Tensor, packed: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b with the weight expanded: at once on a GPU, piece by piece on a CPU."""
    if x.device.type == "cpu":
        return product(x, packed, rows, bias)
    return F.linear(x, expand(packed, rows, x.shape[1], x.dtype), bias)


def _check_buffer(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
    if tuple(packed.shape) != packed_shape(rows, columns, dtype):
        raise ValueError(
            f"packed buffer {tuple(packed.shape)} does not hold a ({rows}, {columns}) weight of "
            f"{dtype}: pass the packed tensor and shape of one Sparse24"
        )
