"""Instructions of a warpgroup, which four warps execute together.

They are done at once: that a program must wait before it uses sums or shared memory again does not
show.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ptx import tensor_cores
from ptx.arithmetic import Registers
from ptx.memory import SharedMemory
from ptx.tensor_cores import LANE, REGISTER

Array = np.ndarray


class Warpgroups(Registers):
    """`wgmma` of a program."""

    shared: SharedMemory

    def _wgmma(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1] in ("fence", "commit_group", "wait_group"):
            return
        # done at once: programs must wait before they use sums or shared memory again
        tokens = re.fullmatch(r"m64n(\d+)k32", opcode[5])
        if opcode[1:5] != ["mma_async", "sp", "sync", "aligned"] or tokens is None:
            raise ValueError(f"unknown shape: {opcode}")
        d, a, b, e, selector, scale_d, *signs = operands
        if [scale_d, *signs] != ["1", "1", "1", "0"]:
            raise ValueError(f"unknown scales: {operands}")
        left = np.stack([self._value(n, "u32").reshape(-1, 32) for n in a], 2)
        metadata = self._value(e, "u32").reshape(-1, 32)
        right = self._swizzled(self._value(b, "u64"), int(tokens[1]))
        for tile in range(int(tokens[1]) // 8):
            names = d[4 * tile : 4 * tile + 4]
            sums = np.stack([self._value(n, "f32").reshape(-1, 32) for n in names], 2)
            part = right[:, 8 * tile : 8 * tile + 8]
            fragment = part[:, LANE // 4, LANE % 4 + 4 * REGISTER]
            result = tensor_cores.mma_sp_m16n8k32(
                left, fragment, sums, metadata, int(selector, 0), opcode[7]
            )
            for i, name in enumerate(names):
                self._set(name, np.ascontiguousarray(result[:, :, i]).reshape(-1), active)

    def _swizzled(self, descriptors: Array, tokens: int) -> Array:
        """uint32 (warps, tokens, 16): 32 columns of a K-major matrix with 128-byte swizzling.

        Groups of eight rows of 128 bytes lie `stride` bytes apart; bits 4-6 of an address are
        exclusive-ored with bits 7-9.
        """
        fields = descriptors.reshape(-1, 32)
        if (fields != fields[:, :1]).any() or (fields.reshape(-1, 128) != fields[::4, :1]).any():
            raise ValueError("the lanes of a warpgroup disagree on a matrix descriptor")
        field = fields[:, 0]
        if (field >> np.uint64(62) != 1).any() or (field >> np.uint64(49) & np.uint64(7)).any():
            raise ValueError("only 128-byte swizzling from an aligned base is known")
        start = (field & np.uint64(0x3FFF)).astype(np.int64) << 4
        stride = (field >> np.uint64(32) & np.uint64(0x3FFF)).astype(np.int64) << 4
        row, word = np.arange(tokens)[:, None], 4 * np.arange(16)
        at = start[:, None, None] + stride[:, None, None] * (row // 8) + row % 8 * 128 + word
        at = (at ^ (at >> 7 & 7) << 4)[..., None] + np.arange(4)
        if at.max() >= len(self.shared.bytes):
            raise ValueError("shared access outside the allocation")
        for warp, used in enumerate(at):
            self.shared.touch(used.reshape(1, -1), np.array([32 * warp]), writes=False)
        return np.ascontiguousarray(self.shared.bytes[at]).view(np.uint32)[..., 0]
