"""y = activation(x·Wᵀ + bias) with W packed as a bitmap and its non-zero values.

The eager implementation expands the weight, on a CPU some lines at a time, and uses the dense
matrix multiplication: on a GPU that is also the path for many tokens. Kernels that read the packed
tensors are `bitmap.portable` and `bitmap.mma`; the format is `bitmap.layout`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.runtime import Kernel, Op, plain, register
from prunekernels.sparse.bitmap.expand import bitmap_unpack, product
from prunekernels.sparse.bitmap.layout import check_parts
from prunekernels.sparse.bitmap.tuning import bitmap_order
from prunekernels.sparse.layer import (
    ACTIVATIONS,
    Calls,
    Expected,
    call_key,
    check_epilogue,
    check_gated,
    check_input,
    expands_by_kernel,
    expected_of,
    gradients,
    problem_of,
)

if TYPE_CHECKING:
    from prunekernels.sparse.bitmap.format import BitmapSparse

OP = Op(
    "bitmap_linear",
    {
        "triton": Kernel("prunekernels.sparse.bitmap.portable", "forward"),
        "mma": Kernel("prunekernels.sparse.bitmap.mma", "forward", tensor_cores=True),
    },
    order=bitmap_order,
    what="bitmap layers",
    eager="the weight is expanded for each call, smaller in memory but not faster",
)
register(OP)
_calls = Calls(OP)


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
    direct, key = plain(x, bias), None
    if direct and getattr(w, "format", None) == "bitmap":
        key = call_key(x, w, w.records.device, bias, activation, impl, w.chunks)
        weight = w.records, w.starts
        y: Tensor | None = _calls.again(key, x, weight, bias)
        if y is not None:
            return y
    check_input(x, w, "bitmap", "bitmap_pack(weight)")
    name = check_epilogue("bitmap_linear", x, w.shape, bias, activation)
    OP.check_impl(impl)
    parts = w.records, w.starts, w.chunks
    if direct:
        return _linear(x, *parts, *w.shape, bias, name, impl, key)
    return torch.ops.prunekernels.bitmap_linear(x, *parts, *w.shape, bias, name, impl)


def bitmap_gate_up(x: Tensor, gate: BitmapSparse, up: BitmapSparse, impl: str = "auto") -> Tensor:
    """The gated half of a Llama MLP: SiLU(x·Wgᵀ)·(x·Wuᵀ).

    Equivalent to `F.silu(bitmap_linear(x, gate)) * bitmap_linear(x, up)`. The "mma" kernel computes
    it in one launch and rounds once; other implementations, and traced or differentiated calls,
    compute the two products.

    Args:
        x: (..., K), the type and device of both weights.
        gate: Packed (N, K) weight.
        up: Packed (N, K) weight.
        impl: As in `bitmap_linear`.

    Returns:
        (..., N), the type of `x`, contiguous.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    key = None
    if plain(x) and getattr(gate, "format", None) == getattr(up, "format", None) == "bitmap":
        # what up has as gate has needs no place in the key
        alike = (gate.shape, gate.dtype, gate.device) == (up.shape, up.dtype, up.device)
        chunks = max(gate.chunks, up.chunks)
        key = call_key(x, gate, gate.device, None, "gated", impl, alike, chunks)
        weights = gate.records, gate.starts, up.records, up.starts
        y: Tensor | None = _calls.again(key, x, weights, None)
        if y is not None:
            return y
    check_gated("bitmap_gate_up", x, gate, up, "bitmap", "bitmap_pack(weight)")
    OP.check_impl(impl)
    rows, columns = gate.shape
    flat = x.reshape(-1, columns)
    if key is not None and OP.select(problem_of(flat, rows), impl).name == "mma":
        parts = gate.records, gate.starts, chunks, rows, None, "silu", (up.records, up.starts)
        y = _calls.run(flat, rows, impl, parts, key)
        if y is not None:
            return y.view(*x.shape[:-1], rows)
    gated = F.silu(bitmap_linear(x, gate, impl=impl))
    return gated * bitmap_linear(x, up, impl=impl)


def bitmap_expected(tokens: int, w: BitmapSparse) -> Expected:
    """What a bitmap layer gains over the dense one where `w` is (a GPU is tested the first time).

    Args:
        tokens: M, the tokens of a call.
        w: The packed weight.

    Returns:
        The expected speed-up, the implementation and the reason.
    """
    return expected_of(OP, tokens, w)


def expand(records: Tensor, starts: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """The dense weight, by the expanding kernel on a GPU that Triton can use."""
    if not expands_by_kernel(records):
        return bitmap_unpack(records, starts, dtype, rows, columns)
    dense: Tensor = OP.kernels["triton"].load().expand(records, starts, dtype, rows, columns)
    return dense


@torch.library.custom_op("prunekernels::bitmap_expand", mutates_args=())
def _expand_op(
    records: Tensor, starts: Tensor, dtype: torch.dtype, rows: int, columns: int
) -> Tensor:
    return expand(records, starts, dtype, rows, columns)


@_expand_op.register_fake
def _(records: Tensor, starts: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    return records.new_empty((rows, columns), dtype=dtype)


@torch.library.custom_op("prunekernels::bitmap_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    return _linear(x, records, starts, chunks, rows, columns, bias, activation, impl)


def _linear(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
    key: Any = None,
) -> Tensor:
    flat = x.reshape(-1, columns)
    parts = records, starts, chunks, rows, bias, activation
    y = _calls.run(flat, rows, impl, parts, key)
    if y is None:
        if x.device.type == "cpu":
            z = product(flat, records, starts, rows, bias)
        else:
            z = F.linear(flat, expand(records, starts, x.dtype, rows, columns), bias)
        y = ACTIVATIONS[activation](z)
    return y.view(*x.shape[:-1], rows)


@_linear_op.register_fake
def _(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    chunks: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    check_parts(records, starts, chunks, x.dtype, rows, columns)
    return x.new_empty((*x.shape[:-1], rows))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, records, starts, _, ctx.rows, ctx.columns, bias, ctx.activation, _ = inputs
    ctx.dtype = x.dtype
    kept = x if ctx.activation != "none" else None
    ctx.save_for_backward(kept, records, starts, bias)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, records, starts, bias = ctx.saved_tensors
    parts = records, starts, ctx.dtype, ctx.rows, ctx.columns
    dense = torch.ops.prunekernels.bitmap_expand(*parts)
    dx, dbias = gradients(ctx, grad, x, dense, bias, 6)
    return dx, None, None, None, None, None, dbias, None, None


_linear_op.register_autograd(_linear_backward, setup_context=_save_linear)
