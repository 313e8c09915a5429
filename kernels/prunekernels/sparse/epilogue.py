"""What the sparse kernels do to values: from bits, and activations before they round once."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, NAME: tl.constexpr):
    """none, silu, gelu_tanh, gelu (erf) or relu of a float32 tensor."""
    if NAME == "silu":
        return z / (1.0 + tl.exp(-z))
    elif NAME == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        # tanh(u) = 2 / (1 + exp(−2u)) − 1, and 0.5·(1 + tanh(u)) = 1 / (1 + exp(−2u))
        return z / (1.0 + tl.exp(-2.0 * inner))
    elif NAME == "relu":
        return tl.where(z <= 0, 0.0, z)
    else:
        return z


@triton.jit
def operand(bits, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """The weight's values, or their float32 equals if UPCAST."""
    if UPCAST and dtype == tl.bfloat16:
        # a bfloat16 is the upper half of a float32
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif UPCAST:
        return bits.to(dtype, bitcast=True).to(tl.float32)
    else:
        return bits.to(dtype, bitcast=True)
