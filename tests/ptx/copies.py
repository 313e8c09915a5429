"""Copies to shared memory that take their time, and the mbarriers that count them.

A copy's bytes must not be touched while it is in flight. In `lazy` programs `cp.async` lands when
`cp.async.wait_group` demands it, and a bulk copy when a wait for its mbarrier fails; else both land
at once. In programs with a random order bulk copies land at random times.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.arithmetic import Registers
from ptx.memory import GlobalMemory, SharedMemory

Array = np.ndarray


@dataclass
class Mbarrier:
    """An mbarrier: `arrivals` left of `count`, and bytes expected, in a phase of this parity.

    maker, made: the warp that made it, and when; released: what those who arrived knew; visible:
    the same of the last phase that is complete.
    """

    maker: int
    count: int
    released: Array
    made: int = field(init=False)
    arrivals: int = field(init=False)
    bytes: int = 0
    phase: int = 0
    visible: Array = field(init=False)

    def __post_init__(self) -> None:
        self.made = int(self.released[self.maker])
        self.arrivals, self.visible = self.count, self.released

    def complete(self, known: Array) -> None:
        """Somebody who knows so much arrived, or bytes did: the phase may be over."""
        self.released = np.maximum(self.released, known)
        if self.arrivals < 0:
            raise ValueError("more arrivals at an mbarrier than it counts")
        if self.arrivals == 0 and self.bytes == 0:
            self.phase, self.arrivals, self.visible = self.phase ^ 1, self.count, self.released


@dataclass
class BulkCopy:
    """A bulk copy in flight: what it will write where, and which mbarrier counts it."""

    target: Array
    held: Array
    barrier: int


class Copies(Registers):
    """`cp.async`, `cp.async.bulk` and `mbarrier` of a program."""

    memory: GlobalMemory
    shared: SharedMemory
    lazy: bool
    order: random.Random | None
    warp: Array
    #: Threads that wait for an mbarrier and would not go on now.
    spinning: Array
    #: How often in succession all did.
    failed: int

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        # for each warp: copies of no group yet, and groups not waited for
        self.pending: list[list[Any]] = [[] for _ in range(threads // 32)]
        self.groups: list[list[list[Any]]] = [[] for _ in range(threads // 32)]
        self.barriers: dict[int, Mbarrier] = {}
        self.flying: list[BulkCopy] = []

    def _cp(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[2] == "commit_group":
            for warp in np.unique(self.warp[active]):
                self.groups[warp].append(self.pending[warp])
                self.pending[warp] = []
        elif opcode[2] == "wait_group":
            for warp in np.unique(self.warp[active]):
                while len(self.groups[warp]) > int(operands[0], 0):
                    for target, held, threads in self.groups[warp].pop(0):
                        self.shared.coming[target] = False
                        self.shared.touch(target, threads, writes=True)
                        self.shared.bytes[target] = held
        elif opcode[2] == "bulk":
            self._cp_bulk(opcode, operands, active)
        else:
            self._cp_async(operands, active)

    def _cp_async(self, operands: list[Any], active: Array) -> None:
        width = int(operands[2], 0)
        size = self._value(operands[3], "u32") if len(operands) > 3 else width
        used = active & (np.broadcast_to(size, active.shape) == width)
        held = np.zeros((self.threads, width), np.uint8)
        held[used] = self.memory.bytes[self._global(self._address(operands[1]), width, used)]
        target = self._local(self._address(operands[0]), width, active, writes=True)
        if not self.lazy:
            self.shared.bytes[target] = held[active]
            return
        threads = np.flatnonzero(active)
        self.shared.coming[target] = True
        for warp in np.unique(threads // 32):
            own = threads // 32 == warp
            self.pending[warp].append((target[own], held[threads[own]], threads[own]))

    def _cp_bulk(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if "mbarrier::complete_tx::bytes" not in opcode or "global" not in opcode:
            raise ValueError(f"unknown instruction: {opcode}")
        targets, sources, barriers = (self._address(operands[i]) for i in (0, 1, 3))
        sizes = self._value(operands[2], "u32").astype(np.int64)
        for thread in np.flatnonzero(active):
            target, source, size = (int(v[thread]) for v in (targets, sources, sizes))
            if size <= 0 or (target | source | size) % 16:
                raise ValueError(f"a bulk copy of {size} bytes, or one that is not aligned")
            held = self.memory.bytes[self.memory.at(np.array([source]), size)][0]
            self.fly(np.arange(target, target + size), held, int(barriers[thread]), int(thread))

    def fly(self, target: Array, held: Array, barrier: int, thread: int) -> None:
        """A thread starts a bulk copy of bytes `held` to shared indices `target`."""
        if barrier not in self.barriers:
            raise ValueError("a bulk copy that an mbarrier counts which was not made")
        self.shared.check(target[None], np.array([thread]), writes=True)
        self.shared.coming[target] = True
        self.flying.append(BulkCopy(target, held, barrier))
        if not self.lazy:
            self.land(len(self.flying) - 1)

    def land(self, number: int) -> None:
        """A bulk copy is complete."""
        copy = self.flying.pop(number)
        barrier = self.barriers[copy.barrier]
        barrier.bytes -= len(copy.target)
        barrier.complete(self.shared.land(copy.target, copy.held))

    def _mbarrier(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        threads = np.flatnonzero(active)
        if opcode[1] == "init":
            count = self._value(operands[1], "u32")
            for thread, address in zip(threads, self._address(operands[0])[active], strict=True):
                at = np.arange(address, address + 8)
                if address % 8:
                    raise ValueError("an mbarrier that is not aligned")
                self.shared.touch(at[None], np.array([thread]), writes=True)
                self.shared.reserved[at] = True
                maker = int(self.warp[thread])
                made = Mbarrier(maker, int(count[thread]), self.shared.release(maker))
                self.barriers[int(address)] = made
        elif opcode[1] == "arrive":
            # what is not used of the state has no register
            operands = [o for o in operands if o != "_"]
            expected = opcode[2] == "expect_tx"
            size = self._value(operands[1], "u32") if expected else np.zeros(self.threads)
            for thread, address in zip(threads, self._address(operands[0])[active], strict=True):
                warp = int(self.warp[thread])
                barrier = self._barrier(int(address), warp)
                barrier.bytes += int(size[thread])
                barrier.arrivals -= 1
                barrier.complete(self.shared.release(warp))
        elif opcode[1:3] == ["try_wait", "parity"]:
            self._try_wait(operands, active)
        elif opcode[1] == "inval":
            for address in self._address(operands[0])[active]:
                del self.barriers[int(address)]
                self.shared.reserved[address : address + 8] = False
        else:
            raise ValueError(f"unknown instruction: {opcode}")

    def _try_wait(self, operands: list[Any], active: Array) -> None:
        address, parity = self._address(operands[1]), self._value(operands[2], "u32")
        over = np.zeros(self.threads, bool)
        for warp in np.unique(self.warp[active]):
            lanes = active & (self.warp == warp)
            for number in np.unique(address[lanes]):
                barrier, these = self._barrier(int(number), int(warp)), lanes & (address == number)
                if barrier.phase == parity[these][0]:
                    self._land_for(int(number))
                over[these] = barrier.phase != parity[these]
                if over[these].any():
                    self.shared.acquire(int(warp), barrier.visible)
        self.spinning |= active & ~over
        if over.any():
            self.failed = 0
        self._set(operands[0], over, active)

    def _barrier(self, address: int, warp: int) -> Mbarrier:
        if address not in self.barriers:
            raise ValueError("an mbarrier is used that was not made")
        barrier = self.barriers[address]
        if barrier.maker != warp and self.shared.clock[warp, barrier.maker] < barrier.made:
            raise ValueError("an mbarrier is used without a barrier after it was made")
        return barrier

    def _land_for(self, barrier: int) -> None:
        """Copies land because a wait needs them: in a random order some, else all of this one."""
        if self.order is not None:
            if self.flying and self.order.random() < 0.5:
                self.land(self.order.randrange(len(self.flying)))
            return
        for number in reversed(range(len(self.flying))):
            if self.flying[number].barrier == barrier:
                self.land(number)
