"""Packed 2:4 weights expanded with torch: whole, or piece by piece inside a product on a CPU.

A group of four columns is (low if first = 0, low if first = 1 or high if second = 1, low if
first = 2 or high if second = 2, high if second = 3), and each condition is one metadata bit, or
what is left over. So every step below is one shift or one logical operation over a whole block.

Blocks come out transposed, (columns, rows of some lines), with the rows of a line in the order
0, 8, 1, 9, …: the words of rows g and g + 8 are neighbours in the buffer and move together, and a
row of the result is long enough for vector instructions. Format: `two_four.layout`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekernels.sparse.two_four.layout import (
    ROWS,
    TAIL_K,
    TAIL_STEPS,
    UNIT_K,
    UNIT_STEPS,
    bits_type,
    block_words,
    line_blocks,
    value_words,
)

# Elements expanded at once, where that is enough lines: temporaries stay in cache, and calls are
# few beside the work.
_CHUNK = 1 << 19
# Fewest lines in a block: shorter rows would cost more calls of inner loops than work.
_LINES = 4

# Inverts the bits of the second index, which is 1, 2 or 3: then the lower one says "it is 2" and
# the upper one "it is 1", as those of the first index, 0, 1 or 2, say "it is 1" and "it is 2".
_INVERT_SECOND = 0xCCCC - (1 << 16)


def sparse24_unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense (rows, columns) weight held by a packed buffer.

    Args:
        packed: int32, shape `packed_shape(rows, columns, dtype)`.
        rows: N.
        columns: K.
        dtype: Type of the values.

    Returns:
        A new contiguous tensor, on the buffer's device.
    """
    dense = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    for first, block in _blocks(packed, rows, columns, dtype):
        # transposed first: rows then are put in order by copying whole ones
        wide = block[:columns].t().contiguous().view(-1, ROWS // 2, 2, columns).transpose(1, 2)
        target = dense[first : first + block.shape[1]]
        whole = len(target) // ROWS
        target[: ROWS * whole].view(whole, 2, ROWS // 2, columns).copy_(wide[:whole])
        if len(target) % ROWS:
            target[ROWS * whole :] = wide[whole].reshape(ROWS, columns)[: len(target) % ROWS]
    return dense


def product(x: Tensor, packed: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b, expanding some lines of the weight at a time.

    Equivalent to `F.linear(x, sparse24_unpack(...), bias)` without ever holding that weight, and
    faster on a CPU, where an expanded block is multiplied while it is in cache.

    Args:
        x: (M, K), of the values' type.
        packed: int32, shape `packed_shape(rows, K, x.dtype)`.
        rows: N.
        bias: (N,) or None.

    Returns:
        (M, N), contiguous.
    """
    tokens, columns = x.shape
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, -rows % ROWS))
        bias = bias.view(-1, 2, ROWS // 2).transpose(1, 2).flatten()
    y = x.new_empty((tokens, rows))
    for first, block in _blocks(packed, rows, columns, x.dtype):
        weight = block[:columns]
        if x.dtype == torch.float16:
            # CPUs multiply float16 by rows only, many times faster than this copy
            weight = weight.t().contiguous().t()
        count = block.shape[1]
        if bias is None:
            part = torch.mm(x, weight)
        else:
            part = torch.addmm(bias[first : first + count], x, weight)
        part = part.view(tokens, count // ROWS, ROWS // 2, 2).transpose(2, 3)
        y[:, first : first + count] = part.reshape(tokens, count)[:, : rows - first]
    return y


def _blocks(
    packed: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """The first row of some lines, and their weights (padded columns, 16·lines), transposed.

    Each block is overwritten by the next.
    """
    lines, units, tails = line_blocks(rows, columns)
    width = units * UNIT_K + tails * TAIL_K
    # blocks of equal size, as long as that matters
    count = -(-lines // min(lines, max(_LINES, _CHUNK // (ROWS * width))))
    at_once = -(-lines // count)
    scratch = packed.new_empty(width * ROWS * at_once, dtype=bits_type(dtype))
    for first in range(0, lines, at_once):
        part = packed[first : first + at_once]
        out = scratch[: width * ROWS * len(part)].view(width, -1)
        _expand(part, units, tails, dtype, out)
        yield first * ROWS, out.view(dtype)


def _expand(words: Tensor, units: int, tails: int, dtype: torch.dtype, out: Tensor) -> None:
    """Write the bits of some lines.

    Args:
        words: int32 (lines, words of a line).
        units: Units of a line.
        tails: Tails of a line.
        dtype: Type of the values.
        out: (padded columns, 16·lines), of `bits_type(dtype)`.
    """
    lines, rows, planes = len(words), ROWS * len(words), value_words(dtype)
    groups = len(out) // 4
    # as 64-bit elements, which are the words of two rows
    pairs = words.new_empty((planes, groups, rows // 2), dtype=torch.int64)
    # metadata words, which are the halves of two rows
    meta = words.new_empty((groups // 4, rows // 2))
    start, group = 0, 0
    for blocks, steps in ((units, UNIT_STEPS), (tails, TAIL_STEPS)):
        if not blocks:
            continue
        size, count = block_words(steps, dtype), blocks * steps * 8
        block = words[:, start : start + size * blocks].view(lines, blocks, size)
        values, indices = torch.split(block, [steps * planes * 128, steps * 16], 2)
        # (plane, block, step, upper, t, line, g)
        values = values.view(lines, blocks, steps, planes, 8, 4, 2, 2).view(torch.int64)
        values = values.squeeze(-1).permute(3, 1, 2, 6, 5, 0, 4)
        pairs[:, group : group + count].view(values.shape).copy_(values)
        # (block, pair of steps, step of the pair, upper, line, g)
        indices = indices.view(lines, blocks, 8, 2, 2, steps // 2).permute(1, 5, 3, 4, 0, 2)
        meta[group // 4 : (group + count) // 4].view(indices.shape).copy_(indices)
        start, group = start + size * blocks, group + count
    planar = pairs.view(torch.int32)
    quads = meta.view(torch.int16).view(groups // 4, 1, rows) ^ _INVERT_SECOND
    # the nibble of group t comes to the top, so that its bits become signs one by one
    shift = torch.tensor([1 << 12, 1 << 8, 1 << 4, 1], dtype=torch.int16, device=words.device)
    nibbles = (quads * shift[:, None]).view(groups, rows)
    if planes == 1:
        low, high = planar[0].to(torch.int16), (planar[0] >> 16).to(torch.int16)
    else:
        low, high = planar
    in_1 = high & _sign(nibbles, out.dtype)
    in_2 = high & _sign(nibbles.add_(nibbles), out.dtype)
    low_2 = low & _sign(nibbles.add_(nibbles), out.dtype)
    low_1 = low & _sign(nibbles.add_(nibbles), out.dtype)
    column = out.view(groups, 4, rows)
    # what no bit has claimed is in the outer columns
    torch.bitwise_xor(low.bitwise_xor_(low_1), low_2, out=column[:, 0])
    torch.bitwise_or(low_1, in_1, out=column[:, 1])
    torch.bitwise_or(low_2, in_2, out=column[:, 2])
    torch.bitwise_xor(high.bitwise_xor_(in_1), in_2, out=column[:, 3])


def _sign(x: Tensor, dtype: torch.dtype) -> Tensor:
    """All bits of the integer type `dtype` where int16 x is negative, none elsewhere."""
    return (x >> 15).to(dtype)
