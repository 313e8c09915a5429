"""One program (thread block) of a kernel: its threads, in which order they run, and its memory."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ptx import tensor_cores
from ptx.memory import GlobalMemory, SharedMemory
from ptx.parsing import Instruction, PtxKernel
from ptx.tensor_copies import TensorCopies
from ptx.warpgroups import Warpgroups

Array = np.ndarray

#: The product of e4m3 values, sparse ones and dense ones.
E4M3 = "sp::ordered_metadata.sync.aligned.m16n8k64.row.col.f32.e4m3.e4m3.f32"
#: Instructions that all threads of a warp must execute together.
_COLLECTIVE = ("bar", "elect", "ldmatrix", "mma", "redux", "shfl", "stmatrix")


class Program(TensorCopies, Warpgroups):
    """One program of a kernel.

    Its warps run in step, or, with a random `order`, some instructions of one and then of another;
    the threads of a warp that are furthest behind go first.

    Args:
        kernel: What to execute.
        memory: Global memory.
        parameters: The kernel's arguments.
        ids: Which program of the grid this is.
        grid: How many there are.
        shared_bytes: Size of its shared memory.
        threads: How many it has.
        lazy: Copies land as late as they may, else at once.
        order: Which warp goes next, and when bulk copies land; None for warps in step.
    """

    def __init__(
        self,
        kernel: PtxKernel,
        memory: GlobalMemory,
        parameters: Sequence[int],
        ids: tuple[int, int, int],
        grid: tuple[int, int, int],
        shared_bytes: int,
        threads: int = 128,
        lazy: bool = True,
        order: random.Random | None = None,
    ) -> None:
        super().__init__(threads)
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        self.lazy, self.order = lazy, order
        # bits that the adder of e4m3 products keeps; None: all
        self.mantissa: int | None = None
        self.shared = SharedMemory(shared_bytes, threads)
        self.warp = np.arange(threads) // 32
        for axis, here, size in zip("xyz", ids, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(threads, here, np.uint64)
            self.special[f"%nctaid.{axis}"] = np.full(threads, size, np.uint64)
        # the next instruction of each thread, and who waits for the others' arrival
        self.at = np.zeros(threads, np.int64)
        self.waiting, self.spinning = np.zeros(threads, bool), np.zeros(threads, bool)
        # who waits for the rest of its warpgroup at a common instruction
        self.meeting = np.zeros(threads, bool)
        # how often in succession nobody could go on
        self.failed = 0
        # the warps that run, for so many instructions more
        self.turn, self.left = np.ones(threads, bool), 0

    def run(self, limit: int = 1_000_000) -> None:
        """Execute until every thread returned."""
        end = len(self.kernel.instructions)
        for _ in range(limit):
            alive = self.at < end
            if not alive.any():
                if self.flying:
                    raise ValueError("a bulk copy is in flight when the program ends")
                return
            ready = alive & ~self.waiting
            if not ready.any():
                if not alive.all():
                    raise ValueError("only some threads arrive: others returned before a barrier")
                self.waiting[:] = False
                self.shared.synchronise()
                continue
            ready &= ~self.meeting
            if not (ready & ~self.spinning).any():
                if not ready.any():
                    raise ValueError("only some warps of a warpgroup arrive")
                self.spinning[:] = False
                self.failed += 1
                if self.failed > 200:
                    raise ValueError("a wait for an mbarrier that never ends")
            chosen = self._choose(ready & ~self.spinning)
            group = self._meet(chosen & (self.at == self.at[chosen].min()))
            if group.any():
                self._step(group, end)
        raise ValueError("the program does not end")

    def _choose(self, ready: Array) -> Array:
        """The threads whose turn it is, some of these."""
        if self.order is None:
            return ready
        if self.left <= 0 or not (self.turn & ready).any():
            if self.flying and self.order.random() < 0.5:
                self.land(self.order.randrange(len(self.flying)))
            warp = self.order.choice(np.unique(self.warp[ready]).tolist())
            self.turn, self.left = self.warp == warp, self.order.choice([3, 30, 300])
        self.left -= 1
        self.happen()
        return self.turn & ready

    def _meet(self, group: Array) -> Array:
        """Those of these threads, all at one instruction, that may execute it now.

        Warps wait at a `wgmma` for the rest of their warpgroup, and then take it along.
        """
        here = int(self.at[np.argmax(group)])
        if self.kernel.instructions[here].opcode[0] != "wgmma":
            return group
        self.meeting |= group
        complete = (self.meeting & (self.at == here)).reshape(-1, 128).all(1)
        together = np.repeat(complete, 128)
        self.meeting &= ~together
        return together

    def _step(self, group: Array, end: int) -> None:
        """Threads that are at the same instruction execute it."""
        here = int(self.at[np.argmax(group)])
        instruction = self.kernel.instructions[here]
        active = group
        if instruction.guard is not None:
            active = group & (self.registers[instruction.guard].astype(bool) ^ instruction.negated)
        self.at[group] = here + 1
        name = instruction.opcode[0]
        if name == "bra":
            self.at[active] = self.kernel.labels[instruction.operands[0]]
        elif name == "ret":
            self.at[active] = end
        elif active.any():
            self._execute(instruction, active)

    def _execute(self, instruction: Instruction, active: Array) -> None:
        name = instruction.opcode[0]
        together = 128 if name == "wgmma" else 32 if name in _COLLECTIVE else 1
        arrived = active.reshape(-1, together)
        if (arrived.any(1) != arrived.all(1)).any():
            raise ValueError(f"only some threads arrive: {instruction.text}")
        handler = getattr(self, f"_{name}", None)
        if handler is None:
            raise ValueError(f"unknown instruction: {instruction.text}")
        handler(instruction.opcode, instruction.operands, active)

    # Addresses.

    def _global(self, address: Array, width: int, active: Array) -> Array:
        at = self.memory.at(address[active], width)
        if (at[:, 0] % width).any():
            raise ValueError(f"global access of {width} bytes is not aligned")
        return at

    def _local(self, address: Array, width: int, active: Array, writes: bool) -> Array:
        at = address[active][:, None] + np.arange(width)
        if (at[:, 0] % width).any():
            raise ValueError(f"shared access of {width} bytes is not aligned")
        self.shared.touch(at, np.flatnonzero(active), writes)
        return at

    # Memory.

    def _ld(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1] == "param":
            held = np.array([p & (2**64 - 1) for p in self.parameters], np.uint64)
            at = np.where(active, self._address(operands[1]) // 8, 0)
            self._set(operands[0], held[at], active)
            return
        names = operands[0] if isinstance(operands[0], list) else [operands[0]]
        width = int(opcode[-1][1:]) // 8
        address = self._address(operands[1])
        if "global" in opcode:
            held = self.memory.bytes[self._global(address, width * len(names), active)]
        else:
            held = self.shared.bytes[self._local(address, width * len(names), active, writes=False)]
        for i, name in enumerate(names):
            values = np.zeros(self.threads, f"uint{8 * width}")
            part = np.ascontiguousarray(held[:, i * width : (i + 1) * width])
            values[active] = part.view(values.dtype)[:, 0]
            self._set(name, values, active)

    def _st(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        names = operands[1] if isinstance(operands[1], list) else [operands[1]]
        width = int(opcode[-1][1:]) // 8
        address = self._address(operands[0])
        values = np.stack([self._value(n, f"u{8 * width}")[active] for n in names], 1)
        held = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        if "global" in opcode:
            self.memory.bytes[self._global(address, width * len(names), active)] = held
        else:
            at = self._local(address, width * len(names), active, writes=True)
            self.shared.bytes[at] = held

    def _atom(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[-2:] != ["add", "u32"] or active.sum() != 1:
            raise ValueError("only one thread's atom.add.u32 is known")
        at = self._global(self._address(operands[1]), 4, active)
        old = np.ascontiguousarray(self.memory.bytes[at]).view(np.uint32)[:, 0]
        new = old + self._value(operands[2], "u32")[active]
        self.memory.bytes[at] = new[:, None].view(np.uint8)
        values = np.zeros(self.threads, np.uint32)
        values[active] = old
        self._set(operands[0], values, active)

    # What the threads of a warp do together.

    def _of_warps(self, names: Iterable[str], kind: str, active: Array) -> Array:
        """Registers (active warps, 32, names)."""
        whole = active.reshape(-1, 32)[:, 0]
        return np.stack([self._value(n, kind).reshape(-1, 32)[whole] for n in names], 2)

    def _set_of_warps(self, name: str, values: Array, active: Array) -> None:
        full = np.zeros((self.threads // 32, 32), values.dtype)
        full[active.reshape(-1, 32)[:, 0]] = values
        self._set(name, full.reshape(-1), active)

    def _ldmatrix(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        rows = self._address(operands[1]).reshape(-1, 32)
        for i, name in enumerate(operands[0]):
            row = rows[:, 8 * i + np.arange(32) // 4] + 4 * (np.arange(32) % 4)
            at = self._local(row.reshape(-1), 4, active, writes=False)
            values = np.zeros(self.threads, np.uint32)
            values[active] = np.ascontiguousarray(self.shared.bytes[at]).view(np.uint32)[:, 0]
            self._set(name, values, active)

    def _mma(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        d, *abc = operands[:4]
        kinds = "u32", "u32", "s32" if "s32" in opcode else "f32"
        parts = [self._of_warps(n, k, active) for n, k in zip(abc, kinds, strict=True)]
        form = ".".join(opcode[1:])
        product: Callable[..., Array]
        if match := re.fullmatch(
            r"sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(b?f16)\.\1\.f32", form
        ):
            (metadata,) = self._of_warps([operands[4]], "u32", active).transpose(2, 0, 1)
            parts += [metadata, int(operands[5], 0), match[1]]
            product = tensor_cores.mma_sp_m16n8k32
        elif form == E4M3:
            (metadata,) = self._of_warps([operands[4]], "u32", active).transpose(2, 0, 1)
            parts += [metadata, int(operands[5], 0), self.mantissa]
            product = tensor_cores.mma_sp_m16n8k64_e4m3
        elif match := re.fullmatch(
            r"sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32", form
        ):
            parts += [match[1]]
            product = tensor_cores.mma_m16n8k16
        else:
            known = {
                "m16n8k32.row.col.s32.u8.u8.s32": tensor_cores.mma_m16n8k32_u8,
                "m16n8k128.row.col.s32.b1.b1.s32.and.popc": tensor_cores.mma_m16n8k128_b1,
                "m16n8k256.row.col.s32.b1.b1.s32.and.popc": tensor_cores.mma_m16n8k256_b1,
            }
            if form.removeprefix("sync.aligned.") not in known:
                raise ValueError(f"unknown shape: {form}")
            product = known[form.removeprefix("sync.aligned.")]
        result = product(*parts)
        for i, name in enumerate(d):
            self._set_of_warps(name, result[:, :, i], active)

    def _shfl(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1:] != ["sync", "bfly", "b32"] or operands[3] != "31":
            raise ValueError(f"unknown instruction: {opcode}")
        source = np.arange(self.threads) ^ int(operands[2], 0)
        self._set(operands[0], self._value(operands[1], "u32")[source], active)

    def _redux(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        reduce = {"add": np.add, "max": np.maximum}.get(opcode[2])
        if opcode[1] != "sync" or opcode[3] != "s32" or reduce is None:
            raise ValueError(f"unknown instruction: {opcode}")
        values = reduce.reduce(self._value(operands[1], "s32").reshape(-1, 32), axis=1)
        self._set(operands[0], np.repeat(values.astype(np.int32), 32), active)

    # Order.

    def _bar(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1] == "warp":
            self.shared.synchronise_lanes(np.unique(self.warp[active]))
        else:
            self.waiting |= active

    def _fence(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1:3] != ["proxy", "async"]:
            raise ValueError(f"unknown instruction: {opcode}")

    def _griddepcontrol(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        """Programs run one after another: the kernel before is over."""
