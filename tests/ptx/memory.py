"""What a program's threads can address, and who may touch what when.

Shared memory keeps vector clocks, one for each warp: two warps that touch a byte, one of them
writing, must be ordered by a barrier or an mbarrier between, however they happened to run. Inside a
warp the same holds for its lanes and `bar.warp.sync`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


class GlobalMemory:
    """Arrays at 256-byte boundaries of one address space, with gaps that must not be touched."""

    BASE = 1 << 40

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.arrays = list(arrays)
        self.addresses: list[int] = []
        size = 256
        for array in arrays:
            self.addresses.append(self.BASE + size)
            size += -(-array.nbytes // 256) * 256 + 256
        self.bytes = np.zeros(size, np.uint8)
        self.valid = np.zeros(size, bool)
        for array, address in zip(arrays, self.addresses, strict=True):
            start = address - self.BASE
            self.bytes[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
            self.valid[start : start + array.nbytes] = True

    def at(self, address: Array, width: int) -> Array:
        """Indices (n, width) of the bytes at addresses (n,); raises if they may not be touched."""
        at = (address - self.BASE)[:, None] + np.arange(width)
        if at.size and (at.min() < 0 or at.max() >= len(self.valid) or not self.valid[at].all()):
            raise ValueError("global access outside every array")
        return at

    def result(self, number: int) -> Array:
        """What an array holds now."""
        array, start = self.arrays[number], self.addresses[number] - self.BASE
        held = self.bytes[start : start + array.nbytes].copy()
        return held.view(array.dtype).reshape(array.shape)


class SharedMemory:
    """A program's shared memory, poisoned at first; raises where threads race.

    Attributes:
        bytes: What it holds.
        clock: clock[v, w]: up to which time of w it is known to v what happened; v's own is the
            present. v and w are the warps and, last, the engine that makes bulk copies.
        reserved: Bytes that hold mbarriers.
        coming: Bytes that a copy in flight will write.
        reading: How many `wgmma`s in flight read each byte.
    """

    #: Thread number where several threads used a byte.
    SEVERAL = -1

    def __init__(self, size: int, threads: int) -> None:
        agents = threads // 32 + 1
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.clock = np.zeros((agents, agents), np.int64)
        np.fill_diagonal(self.clock, 1)
        self.reserved, self.coming = np.zeros(size, bool), np.zeros(size, bool)
        self.reading = np.zeros(size, np.int16)
        # when each agent last read and wrote each byte
        self._read = np.zeros((agents, size), np.int64)
        self._written = np.zeros((agents, size), np.int64)
        # which thread last read and wrote each byte, and in which stretch between two of its warp's
        # synchronisations; no two warps have the same stretches
        self._stretch = np.arange(1, agents)
        self._reader, self._writer = np.zeros((2, size), np.int64), np.zeros((2, size), np.int64)

    def check(self, at: Array, threads: Array, writes: bool) -> None:
        """Raise ValueError unless threads (n,) may use the bytes at indices (n, width) now."""
        if at.min() < 0 or at.max() >= len(self.bytes):
            raise ValueError("shared access outside the allocation")
        if self.reserved[at].any():
            raise ValueError("an mbarrier is used as if it were data")
        if self.coming[at].any():
            raise ValueError("shared bytes are used while a copy in flight writes them")
        if writes and self.reading[at].any():
            raise ValueError("shared bytes are written that a wgmma in flight reads")
        warp = threads // 32
        for other in range(len(self.clock)):
            foreign = warp != other
            if not foreign.any():
                continue
            known, bytes_ = self.clock[warp[foreign], other][:, None], at[foreign]
            if (self._written[other, bytes_] > known).any() or (
                writes and (self._read[other, bytes_] > known).any()
            ):
                who = "two warps use" if other < len(self.clock) - 1 else "a bulk copy writes"
                raise ValueError(f"{who} the same shared bytes without a barrier between")
        if self._others(self._writer, at, threads).any() or (
            writes and self._others(self._reader, at, threads).any()
        ):
            raise ValueError("two lanes use the same shared bytes without bar.warp.sync between")

    def touch(self, at: Array, threads: Array, writes: bool) -> None:
        """`check`, and remember that the threads did."""
        if not at.size:
            return
        self.check(at, threads, writes)
        warp = threads // 32
        (self._written if writes else self._read)[warp[:, None], at] = self.clock[warp, warp][
            :, None
        ]
        log = self._writer if writes else self._reader
        several = self._others(log, at, threads)
        log[0, at], log[1, at] = threads[:, None], self._stretch[warp][:, None]
        # lanes that use a byte together
        several |= log[0, at] != threads[:, None]
        log[0, at[several]] = self.SEVERAL

    def _others(self, log: Array, at: Array, threads: Array) -> Array:
        """Whether another lane used the bytes in the warp's present stretch."""
        return (log[1, at] == self._stretch[threads // 32][:, None]) & (
            log[0, at] != threads[:, None]
        )

    def land(self, at: Array, held: Array) -> Array:
        """A bulk copy writes bytes; returns what who waits for it will know."""
        self.coming[at] = False
        self.bytes[at] = held
        self._writer[:, at] = 0
        self._written[-1, at] = self.clock[-1, -1]
        return self.release(-1)

    def synchronise(self) -> None:
        """All warps wait for each other."""
        warps = np.arange(len(self.clock) - 1)
        self.clock[warps] = self.clock[warps].max(0)
        self.clock[warps, warps] += 1
        self.synchronise_lanes(warps)

    def synchronise_lanes(self, warps: Array) -> None:
        """The lanes of these warps wait for each other."""
        self._stretch[warps] = self._stretch.max() + 1 + np.arange(len(warps))

    def release(self, agent: int) -> Array:
        """What a warp or the engine knows now, for others to acquire."""
        known = self.clock[agent].copy()
        # what it does next is not part of it
        self.clock[agent, agent] += 1
        return known

    def acquire(self, warp: int, known: Array) -> None:
        """The warp learns what was released."""
        own = self.clock[warp, warp]
        self.clock[warp] = np.maximum(self.clock[warp], known)
        assert self.clock[warp, warp] == own
