"""y = activation(x·Wᵀ + bias) with W packed 2:4 in 8 or 4 bits, and SiLU(x·Wgᵀ)·(x·Wuᵀ).

The eager implementation expands the weight block by block, on a GPU into one scratch that stays in
its cache, and multiplies densely: that is also the path for many tokens. `mma_sp` makes the values
16-bit in registers and uses NVIDIA's sparse tensor cores; it and the portable kernel only run when
asked for by name, as they have not run on hardware.
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
    check_packed,
    expands_by_kernel,
    expected_of,
    gated_gradient,
    gradients,
)
from prunekernels.sparse.two_four.quantized.expand import product, unpack
from prunekernels.sparse.two_four.quantized.layout import (
    KINDS,
    Parts,
    filled,
    group_of,
    packed_shape,
)
from prunekernels.sparse.two_four.quantized.tuning import SCRATCH_BYTES, quantized24_order

if TYPE_CHECKING:
    from prunekernels.sparse.two_four.quantized.format import Quantized24

OP = Op(
    "quantized24_linear",
    {
        "triton": Kernel("prunekernels.sparse.two_four.quantized.portable", "forward"),
        "mma_sp": Kernel(
            "prunekernels.sparse.two_four.quantized.mma", "forward", tensor_cores=True
        ),
    },
    order=quantized24_order,
    what="2:4 layers with 8- and 4-bit values",
    eager="the weight is expanded for each call, smaller in memory but not faster",
)
register(OP)
_calls = Calls(OP)
_PACKED_BY = "quantized24_round(weight, kind)"


def quantized24_linear(
    x: Tensor,
    w: Quantized24,
    bias: Tensor | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a packed 2:4 weight of 8- or 4-bit values.

    Equivalent to `act(torch.nn.functional.linear(x, w.to_dense(), bias))`; the kernels do not round
    (code − zero)·scale to 16 bits, keep the sum, the bias and the activation in float32, and round
    once. Differentiable in `x` and `bias`; the weight cannot be trained while packed.

    Args:
        x: (..., K), the type and device of `w`.
        w: Packed (N, K) weight.
        bias: (N,), like `x`, or None.
        activation: None, "silu", "gelu_tanh", "gelu" (erf) or "relu".
        impl: "auto", "eager" (expand, then dense), "triton" (any GPU, and the interpreter) or
            "mma_sp" (NVIDIA's sparse tensor cores, 16-bit x). "auto" takes "eager": the kernels
            have not run on hardware.

    Returns:
        (..., N), the type of `x`, contiguous.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    kind, key = getattr(w, "format", None), None
    direct = plain(x, bias) and kind in KINDS
    if direct:
        grouped = w.scales.shape[1], w.zeros is None
        key = call_key(x, w, w.packed.device, bias, activation, impl, kind, grouped)
        given = filled((w.packed, w.scales, w.zeros))
        y: Tensor | None = _calls.again(key, x, given, bias)
        if y is not None:
            return y
    check_packed(w, KINDS, _PACKED_BY)
    check_input(x, w, w.format, _packed_by(w.format))
    name = check_epilogue("quantized24_linear", x, w.shape, bias, activation)
    OP.check_impl(impl)
    parts = w.packed, w.scales, w.zeros
    if direct:
        return _linear(x, parts, *w.shape, w.format, bias, name, impl, key)
    return torch.ops.prunekernels.quantized24_linear(
        x, *parts, *w.shape, w.format, bias, name, impl
    )


def quantized24_gate_up(
    x: Tensor, gate: Quantized24, up: Quantized24, impl: str = "auto"
) -> Tensor:
    """The gated half of a Llama MLP: SiLU(x·Wgᵀ)·(x·Wuᵀ), by the kernels in one launch.

    Equivalent to `F.silu(F.linear(x, gate.to_dense())) * F.linear(x, up.to_dense())` without
    writing the two intermediate activations.

    Args:
        x: (..., K), the type and device of both weights.
        gate: Packed (N, K) weight.
        up: Packed (N, K) weight, packed like the gate's.
        impl: As in `quantized24_linear`.

    Returns:
        (..., N), the type of `x`, contiguous.

    Raises:
        ValueError: If shapes, types or devices do not fit, or the implementation cannot run here.
    """
    kind, key = getattr(gate, "format", None), None
    direct = plain(x) and kind in KINDS and getattr(up, "format", None) == kind
    if direct:
        # what up has as gate has needs no place in the key
        alike = _likeness(gate) == _likeness(up)
        grouped = gate.scales.shape[1], gate.zeros is None
        key = call_key(x, gate, gate.device, None, "gated", impl, kind, grouped, alike)
        ours = filled((gate.packed, gate.scales, gate.zeros))
        theirs = filled((up.packed, up.scales, up.zeros))
        y: Tensor | None = _calls.again(key, x, (*ours, *theirs), None)
        if y is not None:
            return y
    check_packed(gate, KINDS, _PACKED_BY, "gate")
    check_gated("quantized24_gate_up", x, gate, up, gate.format, _packed_by(gate.format))
    if _likeness(gate) != _likeness(up):
        raise ValueError(f"quantized24_gate_up: {up} does not fit {gate}: pack them alike")
    OP.check_impl(impl)
    parts = gate.packed, gate.scales, gate.zeros
    others = up.packed, up.scales, up.zeros
    if direct:
        return _gate_up(x, parts, others, *gate.shape, gate.format, impl, key)
    return torch.ops.prunekernels.quantized24_gate_up(
        x, *parts, *others, *gate.shape, gate.format, impl
    )


def quantized24_expected(tokens: int, w: Quantized24) -> Expected:
    """What such a layer gains over the dense one where `w` is (a GPU is tested the first time).

    Args:
        tokens: M, the tokens of a call.
        w: The packed weight.

    Returns:
        The expected speed-up, the implementation and the reason.
    """
    return expected_of(OP, tokens, w)


def expand(parts: Parts, rows: int, columns: int, kind: str, dtype: torch.dtype) -> Tensor:
    """The dense weight, by the expanding kernel on a GPU that Triton can use."""
    packed, scales, zeros = parts
    if not expands_by_kernel(packed):
        return unpack(packed, scales, zeros, rows, columns, KINDS[kind], dtype)
    dense = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    OP.kernels["triton"].load().expand(parts, kind, dense)
    return dense


def _likeness(w: Quantized24) -> Any:
    return w.format, w.shape, w.dtype, w.device, w.scales.shape, w.zeros is None


def _packed_by(kind: str) -> str:
    return f'quantized24_round(weight, "{kind}")'


@torch.library.custom_op("prunekernels::quantized24_expand", mutates_args=())
def _expand_op(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    return expand((packed, scales, zeros), rows, columns, kind, dtype)


@_expand_op.register_fake
def _(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((rows, columns), dtype=dtype)


@torch.library.custom_op("prunekernels::quantized24_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    return _linear(x, (packed, scales, zeros), rows, columns, kind, bias, activation, impl)


def _linear(
    x: Tensor,
    parts: Parts,
    rows: int,
    columns: int,
    kind: str,
    bias: Tensor | None,
    activation: str,
    impl: str,
    key: Any = None,
) -> Tensor:
    flat = x.reshape(-1, columns)
    y = _calls.run(flat, rows, impl, (parts, None, rows, kind, bias, activation), key)
    if y is None:
        y = ACTIVATIONS[activation](_dense_product(flat, parts, rows, kind, bias))
    return y.view(*x.shape[:-1], rows)


@_linear_op.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    bias: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    _check_buffer(packed, scales, rows, columns, kind)
    return x.new_empty((*x.shape[:-1], rows))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, ctx.rows, ctx.columns, ctx.kind, bias, ctx.activation, _ = inputs
    kept = x if ctx.activation != "none" else None
    ctx.save_for_backward(kept, packed, scales, zeros, bias)
    ctx.dtype = output.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scales, zeros, bias = ctx.saved_tensors
    dense = torch.ops.prunekernels.quantized24_expand(
        packed, scales, zeros, ctx.rows, ctx.columns, ctx.kind, ctx.dtype
    )
    dx, dbias = gradients(ctx, grad, x, dense, bias, 7)
    return dx, None, None, None, None, None, None, dbias, None, None


_linear_op.register_autograd(_linear_backward, setup_context=_save_linear)


@torch.library.custom_op("prunekernels::quantized24_gate_up", mutates_args=())
def _gate_up_op(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    impl: str,
) -> Tensor:
    parts, others = (gate, gate_scales, gate_zeros), (up, up_scales, up_zeros)
    return _gate_up(x, parts, others, rows, columns, kind, impl)


def _gate_up(
    x: Tensor,
    gate: Parts,
    up: Parts,
    rows: int,
    columns: int,
    kind: str,
    impl: str,
    key: Any = None,
) -> Tensor:
    flat = x.reshape(-1, columns)
    y = _calls.run(flat, rows, impl, (gate, up, rows, kind, None, "silu"), key)
    if y is None:
        y = F.silu(_dense_product(flat, gate, rows, kind, None))
        y = y * _dense_product(flat, up, rows, kind, None)
    return y.view(*x.shape[:-1], rows)


@_gate_up_op.register_fake
def _(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    impl: str,
) -> Tensor:
    _check_buffer(gate, gate_scales, rows, columns, kind)
    return x.new_empty((*x.shape[:-1], rows))


def _save_gate_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *parts, ctx.rows, ctx.columns, ctx.kind, _ = inputs
    ctx.save_for_backward(x, *parts)


def _gate_up_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *parts = ctx.saved_tensors
    expand_op = torch.ops.prunekernels.quantized24_expand
    rest = ctx.rows, ctx.columns, ctx.kind, x.dtype
    gate, up = expand_op(*parts[:3], *rest), expand_op(*parts[3:], *rest)
    return gated_gradient(grad, x, gate, up), *(None,) * 10


_gate_up_op.register_autograd(_gate_up_backward, setup_context=_save_gate_up)


def _dense_product(x: Tensor, parts: Parts, rows: int, kind: str, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b with the weight expanded block by block."""
    packed, scales, zeros = parts
    if not expands_by_kernel(packed):
        return product(x, packed, scales, zeros, rows, KINDS[kind], bias)
    columns = x.shape[1]
    at_once = max(16, SCRATCH_BYTES // (columns * x.element_size()) // 16 * 16)
    scratch = x.new_empty((min(at_once, rows), columns))
    y = x.new_empty((x.shape[0], rows))
    module = OP.kernels["triton"].load()
    for first in range(0, rows, at_once):
        block = scratch[: min(at_once, rows - first)]
        lines = slice(first // 16, first // 16 + -(-len(block) // 16))
        some = packed[lines], scales[lines], None if zeros is None else zeros[lines]
        module.expand(some, kind, block)
        out = y[:, first : first + len(block)]
        if bias is None:
            torch.mm(x, block.t(), out=out)
        else:
            torch.addmm(bias[first : first + len(block)], x, block.t(), out=out)
    return y


def _check_buffer(packed: Tensor, scales: Tensor, rows: int, columns: int, kind: str) -> None:
    if (
        tuple(packed.shape) != packed_shape(rows, columns, KINDS[kind].bits)
        or group_of(columns, scales.shape[1]) is None
    ):
        raise ValueError(
            f"packed buffer {tuple(packed.shape)} with scales {tuple(scales.shape)} does not hold "
            f"a ({rows}, {columns}) weight of {kind}: pass the tensors and shape of one weight"
        )
