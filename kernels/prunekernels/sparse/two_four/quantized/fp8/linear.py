"""y = activation(x̂·Wᵀ + bias) with W packed as `2:4-fp8` and x rounded to e4m3 per token (x̂).

This is another function than `quantized24_linear`, not another way to compute it: rounding
activations costs quality, so it only runs where it is called. `eager` expands the weight in float32
and is the reference; `mma_sp` multiplies codes with codes on the tensor cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekernels.runtime import Kernel, Op, on, register
from prunekernels.sparse.layer import (
    ACTIVATIONS,
    check_epilogue,
    check_input,
    gradients,
    problem_of,
)
from prunekernels.sparse.two_four.quantized.expand import product
from prunekernels.sparse.two_four.quantized.fp8.tokens import quantize_tokens
from prunekernels.sparse.two_four.quantized.layout import KINDS, packed_shape, scales_shape
from prunekernels.sparse.two_four.quantized.tuning import fp8_tokens_order

if TYPE_CHECKING:
    from prunekernels.sparse.two_four.quantized.format import Quantized24

FORMAT = "2:4-fp8"
OP = Op(
    "quantized24_fp8_linear",
    {
        "mma_sp": Kernel(
            "prunekernels.sparse.two_four.quantized.fp8.mma",
            "forward",
            tensor_cores=True,
            types=(torch.bfloat16, torch.float16, torch.float32),
            needs="e4m3 operands need 8.9 or later",
        ),
    },
    order=fp8_tokens_order,
    what="2:4 layers with e4m3 weights and activations",
    eager="the weight is expanded in float32 for each call",
)
register(OP)


def quantized24_fp8_linear(
    x: Tensor,
    w: Quantized24,
    bias: Tensor | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a packed `2:4-fp8` weight and activations rounded to e4m3.

    Equivalent to `act(torch.nn.functional.linear(t.codes.float() * t.scales[..., None],
    w.to_dense(), bias))` with `t = quantize_tokens(x)`: products of codes are summed in float32,
    scaled by the row's and the token's scale, and rounded once. Where the tensor cores multiply
    e4m3 values (sm_89, sm_120), they add 128 products at most before float32 takes over, because
    sm_89's adder keeps 13 or 14 bits of what it adds: each sum is then within 4·33·2⁻¹³ of
    Σ|x·w|, typically within a thousandth of itself (`fp8.mma`). Differentiable in `x` and `bias` as
    if x were not rounded; the weight cannot be trained while packed.

    Args:
        x: (..., K), the type and device of `w`.
        w: Packed (N, K) weight of format "2:4-fp8".
        bias: (N,), like `x`, or None.
        activation: None, "silu", "gelu_tanh", "gelu" (erf) or "relu".
        impl: "auto", "eager" (expand in float32, then dense) or "mma_sp" (sparse tensor cores of
            compute capability 8.9 or later). "auto" takes "eager": the kernel has not run on
            hardware.

    Returns:
        (..., N), the type of `x`, contiguous. Tokens with a NaN or an infinity give NaN.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    check_input(x, w, FORMAT, 'quantized24_round(weight, "2:4-fp8")')
    name = check_epilogue("quantized24_fp8_linear", x, w.shape, bias, activation)
    OP.check_impl(impl)
    return torch.ops.prunekernels.quantized24_fp8_linear(
        x, w.packed, w.scales, *w.shape, bias, name, impl
    )


@torch.library.custom_op("prunekernels::quantized24_fp8_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    flat = x.reshape(-1, columns)
    choice = OP.select(problem_of(flat, rows), impl)
    if choice.name == "eager" or flat.shape[0] == 0:
        y = _eager(flat, packed, scales, rows, bias, activation)
    else:
        with on(flat):
            y = OP.kernels[choice.name].run(flat, packed, scales, rows, bias, activation)
    return y.view(*x.shape[:-1], rows)


def _eager(
    x: Tensor, packed: Tensor, scales: Tensor, rows: int, bias: Tensor | None, activation: str
) -> Tensor:
    codes, token_scales = quantize_tokens(x)
    y = product(codes.float(), packed, scales, None, rows, KINDS[FORMAT], None)
    y *= token_scales[:, None]
    if bias is not None:
        y += bias.float()
    return ACTIVATIONS[activation](y).to(x.dtype)


@_linear_op.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    wanted = packed_shape(rows, columns, 8), scales_shape(rows, columns, 0)
    if (tuple(packed.shape), tuple(scales.shape)) != wanted:
        raise ValueError(
            f"packed buffer {tuple(packed.shape)} with scales {tuple(scales.shape)} does not hold "
            f"a ({rows}, {columns}) weight of {FORMAT}: pass the tensors and shape of one weight"
        )
    return x.new_empty((*x.shape[:-1], rows))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, ctx.rows, ctx.columns, bias, ctx.activation, _ = inputs
    kept = x if ctx.activation != "none" else None
    ctx.save_for_backward(kept, packed, scales, bias)
    ctx.dtype = output.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scales, bias = ctx.saved_tensors
    dense = torch.ops.prunekernels.quantized24_expand(
        packed, scales, None, ctx.rows, ctx.columns, FORMAT, ctx.dtype
    )
    dx, dbias = gradients(ctx, grad, x, dense, bias, 5)
    return dx, None, None, None, None, dbias, None, None


_linear_op.register_autograd(_backward, setup_context=_save)
