"""y = activation(x·Wᵀ + bias) with W packed 2:4, and the fused pair SiLU(x·Wgᵀ)·(x·Wuᵀ).

The eager implementation expands the weight for the duration of the call, on a CPU piece by piece,
and uses the dense matrix multiplication: on a GPU that is also the path for many tokens. `mma_sp`
uses NVIDIA's sparse tensor cores; `wgmma_sp` and `wgmma_tma`, Hopper's ways, only run when asked
for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.runtime import Kernel, Op, plain, register
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
    gated_gradient,
    gradients,
)
from prunekernels.sparse.two_four.expand import product, sparse24_unpack
from prunekernels.sparse.two_four.layout import packed_shape
from prunekernels.sparse.two_four.tuning import sparse24_order

if TYPE_CHECKING:
    from prunekernels.sparse.two_four.format import Sparse24

OP = Op(
    "sparse24_linear",
    {
        "triton": Kernel("prunekernels.sparse.two_four.portable", "forward"),
        "mma_sp": Kernel("prunekernels.sparse.two_four.mma", "forward", tensor_cores=True),
        "wgmma_sp": Kernel("prunekernels.sparse.two_four.wgmma", "forward", tensor_cores=True),
        "wgmma_tma": Kernel("prunekernels.sparse.two_four.wgmma_tma", "forward", tensor_cores=True),
    },
    order=sparse24_order,
    what="2:4 layers",
    eager="the weight is expanded for each call, smaller in memory but not faster",
)
register(OP)
_calls = Calls(OP)


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
            "mma_sp" (NVIDIA's sparse tensor cores), "wgmma_sp" or "wgmma_tma" (Hopper's, which
            "auto" never takes: the one is slower than dense, the other has not run on hardware).

    Returns:
        (..., N), the type of `x`, contiguous.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    direct, key = plain(x, bias), None
    if direct and getattr(w, "format", None) == "2:4":
        key = call_key(x, w, w.packed.device, bias, activation, impl, 1)
        y: Tensor | None = _calls.again(key, x, (w.packed,), bias)
        if y is not None:
            return y
    check_input(x, w, "2:4", "sparse24_pack(weight)")
    name = check_epilogue("sparse24_linear", x, w.shape, bias, activation)
    OP.check_impl(impl)
    if direct:
        return _linear(x, w.packed, *w.shape, bias, name, impl, key)
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
    direct, key = plain(x), None
    if direct and getattr(gate, "format", None) == getattr(up, "format", None) == "2:4":
        # what up has as gate has needs no place in the key
        first, second = gate.packed, up.packed
        place = first.device
        alike = gate.shape == up.shape and gate.dtype == up.dtype and place == second.device
        key = call_key(x, gate, place, None, "gated", impl, alike)
        y: Tensor | None = _calls.again(key, x, (first, second), None)
        if y is not None:
            return y
    check_gated("sparse24_gate_up", x, gate, up, "2:4", "sparse24_pack(weight)")
    OP.check_impl(impl)
    if direct:
        return _gate_up(x, gate.packed, up.packed, *gate.shape, impl, key)
    return torch.ops.prunekernels.sparse24_gate_up(x, gate.packed, up.packed, *gate.shape, impl)


def sparse24_expected(tokens: int, w: Sparse24) -> Expected:
    """What a 2:4 layer gains over the dense one where `w` is (on a GPU, runs the self-test once).

    Args:
        tokens: M, the tokens of a call.
        w: The packed weight.

    Returns:
        The expected speed-up, the implementation and the reason.
    """
    return expected_of(OP, tokens, w)


def expand(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight, by the expanding kernel on a GPU that Triton can use."""
    if not expands_by_kernel(packed):
        return sparse24_unpack(packed, rows, columns, dtype)
    dense: Tensor = OP.kernels["triton"].load().expand(packed, rows, columns, dtype)
    return dense


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
    return _linear(x, packed, rows, columns, bias, activation, impl)


def _linear(
    x: Tensor,
    packed: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    activation: str,
    impl: str,
    key: Any = None,
) -> Tensor:
    flat = x.reshape(-1, columns)
    y = _calls.run(flat, rows, impl, (packed, None, rows, bias, activation), key)
    if y is None:
        y = ACTIVATIONS[activation](_dense_product(flat, packed, rows, bias))
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
    return _gate_up(x, gate, up, rows, columns, impl)


def _gate_up(
    x: Tensor, gate: Tensor, up: Tensor, rows: int, columns: int, impl: str, key: Any = None
) -> Tensor:
    flat = x.reshape(-1, columns)
    y = _calls.run(flat, rows, impl, (gate, up, rows, None, "silu"), key)
    if y is None:
        # one dense weight at a time
        y = F.silu(_dense_product(flat, gate, rows, None))
        y = y * _dense_product(flat, up, rows, None)
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
    return gated_gradient(grad, x, wide_gate, wide_up), None, None, None, None, None


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
