"""Hopper's copies of tiles (TMA) and what goes with them: prefetch, `elect.sync`, `stmatrix`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.copies import Copies

Array = np.ndarray


@dataclass
class TensorMap:
    """What a tensor descriptor of 16-bit values says: the matrix, and rows of a box of 64 columns.

    Boxes are written in rows of 128 bytes, swizzled by 128 bytes; zeros stand outside the matrix.
    """

    matrix: Array
    rows: int


class TensorCopies(Copies):
    """TMA of a program whose first parameter is a tensor descriptor."""

    tensor_map: TensorMap | None = None

    def _cp_bulk(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[3] == "tensor":
            self._copy_box(opcode, operands, active)
        elif opcode[3:5] == ["prefetch", "L2"]:
            size = int(operands[1], 0)
            at = self._address(operands[0])[active]
            if size % 16 or (at % 16).any():
                raise ValueError("a prefetch that is not aligned")
            self.memory.at(at, size)
        else:
            super()._cp_bulk(opcode, operands, active)

    def _copy_box(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        box = self.tensor_map
        if opcode[4] != "2d" or opcode[-1] != "mbarrier::complete_tx::bytes" or box is None:
            raise ValueError(f"unknown instruction: {opcode}")
        if active.sum() != 1:
            raise ValueError("several threads start one copy")
        thread = int(np.flatnonzero(active)[0])
        # [map, {column, row}]
        _, column_name, row_name = operands[1][0].replace("{", "").replace("}", "").split(",")
        start, barrier = (int(self._address(operands[i])[thread]) for i in (0, 2))
        column, row = (int(self._value(n, "s32")[thread]) for n in (column_name, row_name))
        if start % 1024:
            raise ValueError("a swizzled tile starts at a multiple of 1024 bytes")
        tile = np.zeros((box.rows, 64), np.uint16)
        part = box.matrix[row : row + box.rows, column : column + 64]
        tile[: part.shape[0], : part.shape[1]] = part
        at = start + np.arange(box.rows * 128)
        self.fly(at ^ (at >> 7 & 7) << 4, tile.view(np.uint8).reshape(-1), barrier, thread)

    def _cvta(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._set(operands[0], self._value(operands[1], "u64"), active)

    def _elect(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        """The first lane of each warp; which one hardware takes is not specified."""
        chosen = np.zeros(self.threads, bool)
        for warp in np.unique(self.warp[active]):
            chosen[np.flatnonzero(active & (self.warp == warp))[0]] = True
        self._set(operands[0].split("|")[1], chosen, active)

    def _stmatrix(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        """Lane l holds (row l / 4, columns 2·(l % 4) and the next) of each 8 × 8 matrix."""
        form, count = opcode[3:5], {"x1": 1, "x2": 2, "x4": 4}.get(opcode[4], 0)
        if form[0] != "m8n8" or opcode[5:7] != ["trans", "shared"] or not count:
            raise ValueError(f"unknown instruction: {opcode}")
        address = self._address(operands[0]).reshape(-1, 32)
        lane = np.arange(32)
        for number, name in enumerate(operands[1]):
            words = self._value(name, "u32").reshape(-1, 32)
            for warp in np.unique(self.warp[active]):
                matrix = np.zeros((8, 8), np.uint16)
                matrix[lane // 4, 2 * (lane % 4)] = words[warp] & 0xFFFF
                matrix[lane // 4, 2 * (lane % 4) + 1] = words[warp] >> 16
                at = address[warp, 8 * number : 8 * number + 8][:, None] + np.arange(16)
                if (at[:, 0] % 16).any():
                    raise ValueError("stmatrix to rows that are not aligned")
                # lane l writes the words that hold its own numbers' columns, transposed
                self.shared.touch(at, 32 * warp + np.arange(8), writes=True)
                self.shared.bytes[at] = np.ascontiguousarray(matrix.T).view(np.uint8)
