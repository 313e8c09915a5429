"""Instructions of a warpgroup, which four warps execute together: sparse `wgmma`.

They are asynchronous: a `wgmma` reads its registers and shared memory, and adds, somewhere between
its start and the wait for its group; until then its sums are poisoned, and nobody may write what it
reads. In `lazy` programs that happens when the wait demands it, else at once; in programs with a
random order at a random time.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import tensor_cores
from ptx.arithmetic import Registers
from ptx.memory import SharedMemory
from ptx.tensor_cores import LANE, REGISTER

Array = np.ndarray
_NAN = np.uint32(0xFFFFFFFF)


@dataclass
class _Multiply:
    """A `wgmma` that was started: its operands by name, and where its 32 columns of B are.

    at: indices (tokens, 16 words, 4) into shared memory; a warpgroup reads them all.
    """

    sums: list[str]
    a: list[str]
    e: str
    at: Array
    selector: int
    kind: str


class Warpgroups(Registers):
    """`wgmma` of a program."""

    shared: SharedMemory
    lazy: bool
    order: random.Random | None

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        groups = -(-threads // 128)
        # what was started, in order; None ends a group. The first `done` of them read and added.
        self.started: list[list[_Multiply | None]] = [[] for _ in range(groups)]
        self.done = [0] * groups
        # sums in flight, by name
        self.sums: list[dict[str, Array]] = [{} for _ in range(groups)]

    def _wgmma(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        for group in np.flatnonzero(active[::128]):
            started = self.started[group]
            if opcode[1] == "commit_group":
                started.append(None)
            elif opcode[1] == "wait_group":
                self._wait(int(group), int(operands[0], 0))
            elif opcode[1] != "fence":
                started.append(self._start(int(group), opcode, operands))
                if self.order is None and not self.lazy:
                    self._advance(int(group))

    def happen(self) -> None:
        """In a random order: a `wgmma` that was started may get done."""
        assert self.order is not None
        group = self.order.randrange(len(self.started))
        if self.done[group] < len(self.started[group]) and self.order.random() < 0.1:
            self._advance(group)

    def _start(self, group: int, opcode: list[str], operands: list[Any]) -> _Multiply:
        tokens = re.fullmatch(r"m64n(\d+)k32", opcode[5])
        if opcode[1:5] != ["mma_async", "sp", "sync", "aligned"] or tokens is None:
            raise ValueError(f"unknown shape: {opcode}")
        sums, a, b, e, selector, *scales = operands
        if scales != ["1", "1", "1", "0"]:
            raise ValueError(f"unknown scales: {operands}")
        threads = np.arange(self.threads) // 128 == group
        for name in sums:
            if name not in self.sums[group]:
                self.sums[group][name] = self._value(name, "f32").copy()
                self._set(name, np.full(self.threads, _NAN), threads)
        at = self._swizzled(self._value(b, "u64")[threads], int(tokens[1]))
        for warp in range(4 * group, 4 * group + 4):
            self.shared.check(at[:, :, 0].reshape(1, -1), np.array([32 * warp]), writes=False)
        self.shared.reading[at] += 1
        return _Multiply(sums, a, e, at, int(selector, 0), opcode[7])

    def _wait(self, group: int, pending: int) -> None:
        started = self.started[group]
        ends = [i for i, item in enumerate(started) if item is None]
        over = ends[len(ends) - pending - 1] + 1 if len(ends) > pending else 0
        while self.done[group] < over:
            self._advance(group)
        for item in started[:over]:
            if item is not None:
                self.shared.reading[item.at] -= 1
                at = item.at[:, :, 0].reshape(1, -1)
                for warp in range(4 * group, 4 * group + 4):
                    self.shared.touch(at, np.array([32 * warp]), writes=False)
        del started[:over]
        self.done[group] -= over
        used = {name for item in started if item is not None for name in item.sums}
        threads = np.arange(self.threads) // 128 == group
        for name in [name for name in self.sums[group] if name not in used]:
            self._set(name, self.sums[group].pop(name), threads)

    def _advance(self, group: int) -> None:
        """The oldest `wgmma` that is not done reads its operands and adds."""
        item = self.started[group][self.done[group]]
        self.done[group] += 1
        if item is None:
            return
        warps = slice(4 * group, 4 * group + 4)
        left = np.stack([self._value(n, "u32").reshape(-1, 32)[warps] for n in item.a], 2)
        metadata = self._value(item.e, "u32").reshape(-1, 32)[warps]
        right = np.ascontiguousarray(self.shared.bytes[item.at]).view(np.uint32)[..., 0]
        tiles = len(right) // 8
        # (tile, lane, register) of B, every warp's
        b = right.reshape(tiles, 8, 16)[:, LANE // 4, LANE % 4 + 4 * REGISTER]
        totals = [self.sums[group][n].reshape(-1, 32)[warps] for n in item.sums]
        # (warp, tile, lane, register)
        c = np.stack(totals, 2).reshape(4, 32, tiles, 4).transpose(0, 2, 1, 3)
        result = tensor_cores.mma_sp_m16n8k32(
            np.repeat(left, tiles, 0),
            np.tile(b, (4, 1, 1)),
            c.reshape(-1, 32, 4),
            np.repeat(metadata, tiles, 0),
            item.selector,
            item.kind,
        ).reshape(4, tiles, 32, 4)
        for number, name in enumerate(item.sums):
            total = self.sums[group][name].reshape(-1, 32).copy()
            total[warps] = result[:, number // 4, :, number % 4]
            self.sums[group][name] = total.reshape(-1)

    def _swizzled(self, descriptors: Array, tokens: int) -> Array:
        """Indices (tokens, 16 words, 4) of 32 columns of a K-major matrix, 128-byte swizzled.

        Groups of eight rows of 128 bytes lie `stride` bytes apart; bits 4-6 of an address are
        exclusive-ored with bits 7-9.
        """
        field = int(descriptors[0])
        if (descriptors != descriptors[0]).any():
            raise ValueError("the lanes of a warpgroup disagree on a matrix descriptor")
        if field >> 62 != 1 or field >> 49 & 7:
            raise ValueError("only 128-byte swizzling from an aligned base is known")
        start, stride = (field & 0x3FFF) << 4, (field >> 32 & 0x3FFF) << 4
        row, word = np.arange(tokens)[:, None], 4 * np.arange(16)
        at = start + stride * (row // 8) + row % 8 * 128 + word
        at = (at ^ (at >> 7 & 7) << 4)[..., None] + np.arange(4)
        if at.max() >= len(self.shared.bytes):
            raise ValueError("shared access outside the allocation")
        return at
