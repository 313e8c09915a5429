"""Activations as e4m3 values with a scale for each token.

    s[m] = max(max_k |x[m, k]| / 448, 2⁻¹²⁶),   c[m, k] = x[m, k] / s[m], rounded to nearest even

in float32, so that the largest magnitude of a token is the largest e4m3 number. A value is off by
at most 2⁻⁴ of itself, or by 2⁻¹⁰·s where that is more; zeros stay zeros. A token with a NaN or an
infinity has the scale NaN, so that all its results are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunekernels.sparse.layer import check_tensor

#: The largest e4m3 number, and the least scale: the smallest normal float32.
MOST, LEAST_SCALE = 448.0, 2.0**-126


class Tokens(NamedTuple):
    """Activations rounded to e4m3.

    Attributes:
        codes: float8_e4m3fn (..., K).
        scales: float32 (...,), each code's multiplier.
    """

    codes: Tensor
    scales: Tensor


def quantize_tokens(x: Tensor) -> Tokens:
    """Round activations to e4m3, each token with a scale of its own.

    Equivalent to `s = x.float().abs().amax(-1) / 448; (x / s[..., None]).to(torch.float8_e4m3fn)`
    where `s` is at least 2⁻¹²⁶; a token with a NaN or an infinity gets the scale NaN.

    Args:
        x: (..., K), bfloat16, float16 or float32, K > 0.

    Raises:
        ValueError: The type or the shape is another.
    """
    check_tensor("quantize_tokens: x", x)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"quantize_tokens takes bfloat16, float16 or float32, not {x.dtype}: convert x first"
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize_tokens takes (..., K) with K > 0, not {tuple(x.shape)}")
    wide = x.detach().float()
    largest = wide.abs().amax(-1)
    # a tensor: a GPU multiplies by the reciprocal of a number
    scales = (largest / torch.full_like(largest, MOST)).clamp_min(LEAST_SCALE)
    scales = scales.masked_fill(~largest.isfinite(), torch.nan)
    return Tokens((wide / scales[..., None]).to(torch.float8_e4m3fn), scales)
