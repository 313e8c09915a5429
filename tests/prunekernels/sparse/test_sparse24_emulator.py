"""An emulated mma.sp proves the packed order: W·x from the packed words equals the dense product.

The instruction is written from the PTX ISA (`ptx.tensor_cores.mma_sp_m16n8k32`), not from the
packer: its operands are the 32-bit registers of 32 lanes.
"""

from __future__ import annotations

import numpy as np
import ptx
import pytest
import torch
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.layout import line_blocks


def b_fragments(x: torch.Tensor) -> np.ndarray:
    """Registers of B for x (8 tokens, 32 columns of a 16-bit type): uint32 (32, 4)."""
    bits = x.contiguous().view(torch.int16).numpy().view(np.uint32).reshape(8, 16)
    lane, register = np.arange(32)[:, None], np.arange(4)[None, :]
    return bits[lane // 4, lane % 4 + 4 * register]


def emulated_linear(weight: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """x·Wᵀ for up to eight tokens, through the packed words and the instruction only."""
    packed = sparse24_pack(weight)
    words = packed.packed.numpy().view(np.uint32)
    rows, columns = weight.shape
    lines, units, tails = line_blocks(rows, columns)
    wide = torch.zeros(8, units * 256 + tails * 64, dtype=x.dtype)
    wide[: x.shape[0], :columns] = x
    blocks = [(u * 1152, 8, u * 256) for u in range(units)]
    blocks += [(units * 1152 + j * 288, 2, units * 256 + j * 64) for j in range(tails)]
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[weight.dtype]
    # one emulated warp per line of 16 rows
    acc = np.zeros((lines, 32, 4), np.float32)
    for start, steps, k in blocks:
        meta = words[:, start + steps * 128 :][:, : 16 * steps].reshape(lines, 32, steps // 2)
        for step in range(steps):
            a = words[:, start + step * 128 :][:, :128].reshape(lines, 32, 4)
            b = b_fragments(wide[:, k + 32 * step : k + 32 * step + 32])
            b = np.broadcast_to(b, a.shape)
            acc = ptx.tensor_cores.mma_sp_m16n8k32(a, b, acc, meta[:, :, step // 2], step % 2, kind)
    out = np.zeros((8, lines, 16), np.float32)
    lane, i = np.arange(32)[:, None], np.arange(4)[None, :]
    out[2 * (lane % 4) + i % 2, :, lane // 4 + 8 * (i // 2)] = acc.transpose(1, 2, 0)
    return out.reshape(8, -1)[: x.shape[0], :rows]


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A random weight with 0, 1 or 2 non-zeros in each group of four."""
    groups = -(-columns // 4)
    rank = torch.rand(rows, groups, 4).argsort(2).argsort(2)
    kept = rank < torch.randint(0, 3, (rows, groups, 1))
    return (torch.randn(rows, groups, 4) * kept).view(rows, -1)[:, :columns].to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 64), (16, 256), (33, 576), (5, 4), (17, 129), (16, 448)]
)
def test_the_packed_words_multiply_like_the_dense_weight(dtype, rows, columns):
    weight = two_of_four(rows, columns, dtype)
    x = torch.randn(8, columns).to(dtype)
    exact = x.double() @ weight.double().T
    emulated = torch.from_numpy(emulated_linear(weight, x)).double()
    # float32 accumulators, one rounding per step of 32 columns
    torch.testing.assert_close(emulated, exact, rtol=1e-5, atol=1e-5)


def test_every_pair_of_columns_and_every_position():
    # one weight at a time: a swapped lane, word or nibble cannot cancel
    columns = 256
    x = torch.arange(1, columns + 1).float().repeat(8, 1)
    x[:, :] *= torch.arange(1, 9)[:, None]
    x = (x % 251).to(torch.float16)
    weight = torch.zeros(16, columns, dtype=torch.float16)
    for group in range(columns // 4):
        for row in range(16):
            first = (group + row) % 4
            second = (first + 1 + (group // 4) % 3) % 4
            weight[row, 4 * group + first] = 1 + (group * 16 + row) % 61
            weight[row, 4 * group + second] = -(1 + (group * 7 + row) % 59)
    # sums of integers below 2**24 are exact
    exact = (x.double() @ weight.double().T).numpy()
    assert np.abs(exact).max() < 2**24
    assert np.array_equal(emulated_linear(weight, x), exact)
