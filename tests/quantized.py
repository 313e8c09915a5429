"""Quantised 2:4 weights with known integers, for tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from packed_formats import two_of_four
from prunekernels import Quantized24, quantize_tokens, quantized24_pack
from prunekernels.sparse.two_four.quantized.fp8.tokens import Tokens
from torch import Tensor

#: kind, columns of a group (0: a row), with zero points.
EVERY = [
    ("2:4-int8", 0, False),
    ("2:4-int8", 64, False),
    ("2:4-int8", 128, False),
    ("2:4-fp8", 0, False),
    ("2:4-int4", 0, False),
    ("2:4-int4", 64, False),
    ("2:4-int4", 128, False),
    ("2:4-int4", 0, True),
    ("2:4-int4", 64, True),
    ("2:4-int4", 128, True),
]


class Made(NamedTuple):
    """A packed weight and what it stands for.

    Attributes:
        packed: The packed weight.
        exact: (N, K) float64.
    """

    packed: Quantized24
    exact: Tensor


class Integers(NamedTuple):
    """What a weight is packed from: see `quantized24_pack`."""

    integers: Tensor
    mask: Tensor
    scales: Tensor
    zeros: Tensor | None


def integers(rows: int, columns: int, kind: str, group: int, zeros: bool) -> Integers:
    """Random integers over the whole range, a mask, scales and zero points."""
    groups = 1 if group == 0 else -(-columns // group)
    levels = torch.randint(0, 16, (rows, groups), dtype=torch.int8) if zeros else None
    if kind == "2:4-fp8":
        held = torch.randint(0, 256, (rows, columns)).to(torch.uint8)
        held[held & 0x7F == 0x7F] = 0x7E
        values = held.view(torch.float8_e4m3fn)
    else:
        least, most = (-127, 127) if kind == "2:4-int8" else (0, 15) if zeros else (-8, 7)
        values = torch.randint(least, most + 1, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows, groups) + 0.5
    return Integers(values, two_of_four(rows, columns), scales, levels)


def exact(given: Integers) -> Tensor:
    """What integers stand for, (N, K) float64."""
    columns, groups = given.integers.shape[1], given.scales.shape[1]
    size = columns if groups == 1 else 64 if groups == -(-columns // 64) else 128

    def spread(tensor: Tensor) -> Tensor:
        return tensor.double().repeat_interleave(size, 1)[:, :columns]

    values = given.integers.to(torch.float32).double()
    if given.zeros is not None:
        values = values - spread(given.zeros)
    dense: Tensor = values * spread(given.scales) * given.mask
    return dense


def made(
    rows: int,
    columns: int,
    kind: str,
    group: int,
    zeros: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    *,
    whole: bool = False,
) -> Made:
    """A random packed weight; scales of 1 if `whole`, so that all values are integers."""
    given = integers(rows, columns, kind, group, zeros)
    if whole:
        small = given.integers.float().round().clamp(-16, 16).to(given.integers.dtype)
        held = small if kind == "2:4-fp8" else given.integers
        given = given._replace(integers=held, scales=torch.ones_like(given.scales))
    return Made(quantized24_pack(*given, kind=kind, dtype=dtype), exact(given))


def places(columns: int, order: str) -> Tensor:
    """Where each column's code stands: of instruction i, register r and thread t of a quad."""
    place = torch.full((-(-columns // 128) * 128,), -1)
    for start in range(0, len(place), 128):
        for at in range(128):
            word, byte = divmod(at, 4)
            instruction, position = divmod(word, 16)
            if order == "e4m3":
                # two groups of one thread's step: 64 columns apart
                half, pair, apart = position // 8, position % 8 // 2, position % 2
                column = 32 * (half + 2 * apart) + 4 * (pair + 4 * instruction) + byte
            else:
                # a thread's word holds pairs of two registers of one step's operand
                register, thread = divmod(position, 4)
                pair = 4 * (2 * register + byte // 2) + thread
                column = 64 * instruction + 2 * pair + byte % 2
            place[start + column] = start + at
    assert (place >= 0).all()
    return place


def ordered_tokens(x: Tensor, order: str) -> Tokens:
    """Tokens in a product's order, uint8: what the kernel that rounds them writes."""
    codes, scales = quantize_tokens(x)
    place = places(x.shape[1], order)
    out = torch.zeros(len(x), len(place), dtype=torch.uint8)
    out[:, place[: x.shape[1]]] = codes.view(torch.uint8)
    return Tokens(out, scales)
