"""A NumPy emulation of mma.sp proves the packed order: W·x from the packed words equals dense.

Written from the PTX ISA's description of `mma.sp::ordered_metadata.m16n8k32` for 16-bit types
(sections "Sparse matrix storage" and "Matrix fragments for sparse mma.m16n8k32"), not from the
packer: operands arrive as the 32-bit registers of 32 lanes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prunekernels.sparse.format24 import line_blocks, sparse24_pack


def halves(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 values of the 16-bit halves of 32-bit registers, low half first: (..., 2)."""
    flat = torch.from_numpy(np.ascontiguousarray(words).view(np.int16).copy()).view(dtype)
    return flat.double().numpy().reshape(*words.shape, 2)


def mma_sp_m16n8k32(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, e: np.ndarray, selector: int, dtype: torch.dtype
) -> np.ndarray:
    """One warp's instruction: D (16×8) = A (16×32, sparse) · B (32×8) + C.

    Args:
        a: uint32 (32 lanes, 4): register r of a lane holds the two non-zeros of one chunk of four
            columns; registers 0, 2 are row lane/4, registers 1, 3 row lane/4 + 8; registers 0, 1
            chunk lane%4, registers 2, 3 chunk lane%4 + 4.
        b: uint32 (32, 4): register r holds rows k = 2·(lane%4) + 8·r and k + 1 of column lane/4.
        c: float64 (32, 4): row lane/4 + 8·(i/2), column 2·(lane%4) + i%2.
        e: uint32 (32,): 2-bit indices, only read from the two lanes of each quad that the selector
            names (0: lanes 0, 1; 1: lanes 2, 3). The first covers columns 0-15, the second 16-31;
            bits 0-15 are row lane/4, bits 16-31 row lane/4 + 8.
        selector: 0 or 1.
        dtype: bfloat16 or float16.

    Returns:
        float64 (32, 4), laid out like `c`.
    """
    values = halves(a, dtype)
    dense = np.zeros((16, 32))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            row, chunk = g + 8 * (register % 2), t + 4 * (register // 2)
            owner = 4 * g + 2 * selector + chunk // 4
            shift = 16 * (register % 2) + 4 * (chunk % 4)
            nibble = (int(e[owner]) >> shift) & 0xF
            first, second = nibble & 3, nibble >> 2
            assert first < second, "ordered metadata must be increasing"
            dense[row, 4 * chunk + first] = values[lane, register, 0]
            dense[row, 4 * chunk + second] = values[lane, register, 1]
    pairs = halves(b, dtype)
    right = np.zeros((32, 8))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            right[2 * t + 8 * register : 2 * t + 8 * register + 2, g] = pairs[lane, register]
    product = dense @ right
    lane, i = np.arange(32)[:, None], np.arange(4)[None, :]
    return c + product[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]


def b_fragments(x: torch.Tensor) -> np.ndarray:
    """Registers of B for x (8 tokens, 32 columns of a 16-bit type): uint32 (32, 4)."""
    bits = x.contiguous().view(torch.int16).numpy().view(np.uint32).reshape(8, 16)
    lane, register = np.arange(32)[:, None], np.arange(4)[None, :]
    return bits[lane // 4, lane % 4 + 4 * register]


def emulated_linear(weight: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """x·Wᵀ in float64 for eight tokens, through the packed words and the instruction only."""
    packed = sparse24_pack(weight)
    words = packed.packed.numpy().view(np.uint32)
    rows, columns = weight.shape
    lines, units, tails = line_blocks(rows, columns)
    wide = torch.zeros(8, units * 256 + tails * 64, dtype=x.dtype)
    wide[: x.shape[0], :columns] = x
    out = np.zeros((8, lines * 16))
    blocks = [(u * 1152, 8, u * 256) for u in range(units)]
    blocks += [(units * 1152 + j * 288, 2, units * 256 + j * 64) for j in range(tails)]
    lane, i = np.arange(32)[:, None], np.arange(4)[None, :]
    for line in range(lines):
        acc = np.zeros((32, 4))
        for start, steps, k in blocks:
            meta = words[line, start + steps * 128 :][: 32 * steps // 2].reshape(32, steps // 2)
            for step in range(steps):
                a = words[line, start + step * 128 :][:128].reshape(32, 4)
                b = b_fragments(wide[:, k + 32 * step : k + 32 * step + 32])
                acc = mma_sp_m16n8k32(a, b, acc, meta[:, step // 2], step % 2, weight.dtype)
        out[2 * (lane % 4) + i % 2, line * 16 + lane // 4 + 8 * (i // 2)] = acc
    return out[: x.shape[0], :rows]


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
    emulated = torch.from_numpy(emulated_linear(weight, x))
    torch.testing.assert_close(emulated, exact, rtol=1e-12, atol=1e-12)


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
    exact = (x.double() @ weight.double().T).numpy()
    assert np.array_equal(emulated_linear(weight, x), exact)
