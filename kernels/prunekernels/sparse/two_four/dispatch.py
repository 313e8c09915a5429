"""Which implementation multiplies with a packed 2:4 weight, and what it is expected to gain.

`mma_sp` uses NVIDIA's sparse tensor cores through inline assembly; `wgmma_sp`, Hopper's way, is not
proven on hardware yet and only runs when asked for. See `dispatch` for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekernels.runtime import interpreting, triton_installed
from prunekernels.sparse.dispatch import Dispatch, Expected
from prunekernels.sparse.two_four.expand import sparse24_unpack
from prunekernels.sparse.two_four.format import Sparse24
from prunekernels.sparse.two_four.tuning import sparse24_order

DISPATCH = Dispatch(
    op="sparse24_linear",
    what="2:4",
    modules={
        "triton": "prunekernels.sparse.two_four.portable",
        "mma_sp": "prunekernels.sparse.two_four.mma",
        "wgmma_sp": "prunekernels.sparse.two_four.wgmma",
    },
    tensor_cores="mma_sp",
    order=sparse24_order,
    unproven=("wgmma_sp",),
)


def expand(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight, by the expanding kernel on a GPU that Triton can use."""
    if packed.device.type != "cuda" or not triton_installed() or interpreting():
        return sparse24_unpack(packed, rows, columns, dtype)
    parts = packed, rows, columns, dtype
    dense: Tensor = DISPATCH.call("triton", "expand", packed.device, *parts)
    return dense


def sparse24_expected(tokens: int, w: Sparse24) -> Expected:
    """What a 2:4 layer gains over the dense one where `w` is (on a GPU, runs the self-test once).

    Args:
        tokens: M, the tokens of a call.
        w: The packed weight.

    Returns:
        The expected speed-up (predicted, not measured), the implementation and the reason.
    """
    return DISPATCH.expected(tokens, w)
