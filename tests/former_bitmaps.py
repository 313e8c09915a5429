"""Bitmap weights as version 2 of their format stored them."""

from __future__ import annotations

import itertools

import torch


def version_2(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state that version 2 stored of a weight, by its description, one element at a time."""
    rows, columns = weight.shape
    lines, blocks = -(-rows // 16), -(-columns // 64)
    padded = torch.zeros(16 * lines, 64 * blocks, dtype=weight.dtype)
    padded[:rows, :columns] = weight
    bitmap, values, starts = torch.zeros(lines, blocks, 32, dtype=torch.int64), [], [0]
    for line in range(lines):
        for block in range(blocks):
            tile = padded[16 * line : 16 * line + 16, 64 * block : 64 * block + 64]
            for step, u, lane, h, c in itertools.product(*map(range, (4, 2, 32, 2, 2))):
                value = tile[lane // 4 + 8 * h, 16 * step + 8 * u + 2 * (lane % 4) + c]
                if value != 0:
                    bitmap[line, block, lane] |= 1 << 8 * step + 4 * u + 2 * h + c
                    values.append(value)
            values += [torch.zeros((), dtype=weight.dtype)] * (-len(values) % 8)
            starts.append(len(values) // 8)
    words = torch.where(bitmap >= 2**31, bitmap - 2**32, bitmap).to(torch.int32)
    code = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}[weight.dtype]
    return {
        "bitmap": words,
        "starts": torch.tensor(starts, dtype=torch.int32),
        "values": torch.stack(values),
        "header": torch.tensor([2, rows, columns, code]),
    }
