"""y = activation(x·Wᵀ + bias) with W packed as a bitmap and its non-zero values.

The eager implementation expands the weight, on a CPU some lines at a time, and uses the dense
matrix multiplication: on a GPU that is also the path for many tokens. Kernels that read the packed
tensors are `bitmap.portable` and `bitmap.mma`; the format is `bitmap.layout`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.runtime import interpreting, triton_installed
from prunekernels.sparse.bitmap.expand import bitmap_unpack, product
from prunekernels.sparse.bitmap.format import BitmapSparse
from prunekernels.sparse.bitmap.layout import check_parts
from prunekernels.sparse.bitmap.tuning import bitmap_order
from prunekernels.sparse.dispatch import Dispatch, Expected
from prunekernels.sparse.layer import ACTIVATIONS, check_epilogue, check_input, gradients

DISPATCH = Dispatch(
    op="bitmap_linear",
    what="bitmap",
    modules={
        "triton": "prunekernels.sparse.bitmap.portable",
        "mma": "prunekernels.sparse.bitmap.mma",
    },
    tensor_cores="mma",
    order=bitmap_order,
)


def bitmap_linear(
    x: Tensor,
    w: BitmapSparse,
    bias: Tensor | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a packed weight of any sparsity.

    Equivalent to `act(torch.nn.functional.linear(x, w.to_dense(), bias))`; the kernels keep the
    sum, the bias and the activation in float32 and round once. Differentiable in `x` and `bias`;
    the weight cannot be trained while packed.

    Args:
        x: (..., K), the type and device of `w`.
        w: Packed (N, K) weight.
        bias: (N,), like `x`, or None.
        activation: None, "silu", "gelu_tanh", "gelu" (erf) or "relu".
        impl: "auto", "eager" (expand, then dense), "triton" (any GPU, and the interpreter) or
            "mma" (NVIDIA's tensor cores, 16-bit values).

    Returns:
        (..., N), the type of `x`, contiguous.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    check_input(x, w, BitmapSparse, "bitmap_pack")
    name = check_epilogue("bitmap_linear", x, w.shape, bias, activation)
    DISPATCH.check_impl(impl)
    parts = w.bitmap, w.starts, w.values
    return torch.ops.prunekernels.bitmap_linear(x, *parts, *w.shape, bias, name, impl)


def bitmap_expected(tokens: int, w: BitmapSparse) -> Expected:
    """What a bitmap layer gains over the dense one where `w` is (a GPU is tested the first time).

    Args:
        tokens: M, the tokens of a call.
        w: The packed weight.

    Returns:
        The expected speed-up (predicted, not measured), the implementation and the reason.
    """
    return DISPATCH.expected(tokens, w)


def expand(bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight, by the expanding kernel on a GPU that Triton can use."""
    if bitmap.device.type != "cuda" or not triton_installed() or interpreting():
        return bitmap_unpack(bitmap, starts, values, rows, columns)
    parts = bitmap, starts, values, rows, columns
    dense: Tensor = DISPATCH.call("triton", "expand", bitmap.device, *parts)
    return dense


@torch.library.custom_op("prunekernels::bitmap_expand", mutates_args=())
def _expand_op(bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    return expand(bitmap, starts, values, rows, columns)


@_expand_op.register_fake
def _(bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty((rows, columns))


@torch.library.custom_op("prunekernels::bitmap_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    bitmap: Tensor,
    starts: Tensor,
    values: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    flat = x.reshape(-1, columns)
    choice = DISPATCH.select(flat, rows, impl)
    if choice.name == "eager" or flat.shape[0] == 0:
        if x.device.type == "cpu":
            z = product(flat, bitmap, starts, values, rows, bias)
        else:
            z = F.linear(flat, expand(bitmap, starts, values, rows, columns), bias)
        y = ACTIVATIONS[activation](z)
    else:
        parts = flat, bitmap, starts, values, rows, bias, activation
        y = DISPATCH.call(choice.name, "forward", x.device, *parts)
    return y.view(*x.shape[:-1], rows)


@_linear_op.register_fake
def _(
    x: Tensor,
    bitmap: Tensor,
    starts: Tensor,
    values: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    check_parts(bitmap, starts, values, rows, columns)
    return x.new_empty((*x.shape[:-1], rows))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bitmap, starts, values, ctx.rows, ctx.columns, bias, ctx.activation, _ = inputs
    kept = x if ctx.activation != "none" else None
    ctx.save_for_backward(kept, bitmap, starts, values, bias)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bitmap, starts, values, bias = ctx.saved_tensors
    parts = bitmap, starts, values, ctx.rows, ctx.columns
    dense = torch.ops.prunekernels.bitmap_expand(*parts)
    dx, dbias = gradients(ctx, grad, x, dense, bias, 6)
    return dx, None, None, None, None, None, dbias, None, None


_linear_op.register_autograd(_linear_backward, setup_context=_save_linear)
