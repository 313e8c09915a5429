"""A NumPy machine for the PTX that Triton emits: runs a compiled kernel without a GPU.

It executes the instructions of all threads of a program together, for the subset of PTX that the
package's kernels compile to (an unknown instruction raises). Memory is checked: reading or writing
outside the given arrays raises, shared memory starts poisoned, and `cp.async` copies take effect
only when `cp.async.wait_group` demands it (`lazy`) or at once (`eager`): right code gives the same
result both ways. Warps must not touch the same shared bytes, one of them writing, without a barrier
between them; that raises too. Programs run one after another.

`mma_sp_m16n8k32`, `mma_m16n8k16`, `mma_m16n8k32_u8` and `mma_m16n8k256_b1` are NVIDIA's tensor-core
instructions, written from the PTX ISA. `Machine` stands where a `@gluon.jit` kernel stands in its
launcher.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from prunekernels.compilation import KernelCase, compile_ptx

Array = np.ndarray
LANE = np.arange(32)[:, None]
REGISTER = np.arange(4)[None, :]


def to_float(bits: Array, kind: str) -> Array:
    """float32 values of 16-bit patterns."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    flat = torch.from_numpy(np.ascontiguousarray(bits).astype(np.uint16).view(np.int16))
    return flat.view(dtype).float().numpy()


def from_float(values: Array, kind: str) -> Array:
    """16-bit patterns of float32 values, rounded to nearest even."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    flat = torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))
    return flat.to(dtype).view(torch.int16).numpy().view(np.uint16)


def mma_sp_m16n8k32(a: Array, b: Array, c: Array, e: Array, selector: int, kind: str) -> Array:
    """D (16×8) = A (16×32, 2:4) · B (32×8) + C for each warp: `mma.sp::ordered_metadata`.

    Args:
        a: uint32 (warps, 32 lanes, 4): register r of a lane holds the two non-zeros of one chunk
            of four columns: row lane/4 for r = 0, 2 and lane/4 + 8 for r = 1, 3; chunk lane%4 for
            r = 0, 1 and lane%4 + 4 for r = 2, 3.
        b: uint32 (warps, 32, 4): register r holds rows k = 2·(lane%4) + 8·r and k + 1 of column
            lane/4.
        c: float32 (warps, 32, 4): element i is row lane/4 + 8·(i/2), column 2·(lane%4) + i%2.
        e: uint32 (warps, 32): 2-bit indices, only read from the two lanes of each quad that the
            selector names (0: lanes 0, 1; 1: lanes 2, 3). The first covers columns 0-15, the
            second 16-31; bits 0-15 are row lane/4, bits 16-31 row lane/4 + 8.
        selector: 0 or 1.
        kind: "bf16" or "f16".

    Returns:
        float32 (warps, 32, 4), laid out like `c`; sums are formed in float64.
    """
    warps = np.arange(a.shape[0])[:, None, None]
    row, chunk = LANE // 4 + 8 * (REGISTER % 2), LANE % 4 + 4 * (REGISTER // 2)
    owner = LANE // 4 * 4 + 2 * selector + chunk // 4
    nibble = e[:, owner] >> (16 * (REGISTER % 2) + 4 * (chunk % 4)) & 0xF
    first, second = nibble & 3, nibble >> 2
    if not (first < second).all():
        raise ValueError("mma.sp::ordered_metadata with indices that do not increase")
    left = np.zeros((a.shape[0], 16, 32))
    left[warps, row, 4 * chunk + first] = to_float(a & 0xFFFF, kind)
    left[warps, row, 4 * chunk + second] = to_float(a >> 16, kind)
    right = np.zeros((a.shape[0], 32, 8))
    right[:, 2 * (LANE % 4) + 8 * REGISTER, LANE // 4] = to_float(b & 0xFFFF, kind)
    right[:, 2 * (LANE % 4) + 8 * REGISTER + 1, LANE // 4] = to_float(b >> 16, kind)
    product = left @ right
    at = product[:, LANE // 4 + 8 * (REGISTER // 2), 2 * (LANE % 4) + REGISTER % 2]
    return (c + at).astype(np.float32)


def mma_m16n8k16(a: Array, b: Array, c: Array, kind: str) -> Array:
    """D (16×8) = A (16×16) · B (16×8) + C for each warp: `mma.m16n8k16`.

    Args:
        a: uint32 (warps, 32 lanes, 4): register r holds columns 2·(lane%4) + 8·(r/2) and the next
            of row lane/4 + 8·(r%2).
        b: uint32 (warps, 32, 2): register r holds rows k = 2·(lane%4) + 8·r and k + 1 of column
            lane/4.
        c: float32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.
        kind: "bf16" or "f16".

    Returns:
        float32 (warps, 32, 4), laid out like `c`; sums are formed in float64.
    """
    left, right = np.zeros((a.shape[0], 16, 16)), np.zeros((a.shape[0], 16, 8))
    for half in (0, 1):
        bits = (lambda words: words >> 16) if half else (lambda words: words & 0xFFFF)
        column = 2 * (LANE % 4) + 8 * (REGISTER // 2) + half
        left[:, LANE // 4 + 8 * (REGISTER % 2), column] = to_float(bits(a), kind)
        row = 2 * (LANE % 4) + 8 * REGISTER[:, :2] + half
        right[:, row, LANE // 4] = to_float(bits(b), kind)
    product = left @ right
    at = product[:, LANE // 4 + 8 * (REGISTER // 2), 2 * (LANE % 4) + REGISTER % 2]
    return (c + at).astype(np.float32)


def mma_m16n8k32_u8(a: Array, b: Array, c: Array) -> Array:
    """D (16×8) = A (16×32) · B (32×8) + C of unsigned bytes for each warp: `mma.m16n8k32`.

    Args:
        a: uint32 (warps, 32 lanes, 4): byte i of register r is column 4·(lane%4) + i + 16·(r/2) of
            row lane/4 + 8·(r%2).
        b: uint32 (warps, 32, 2): byte i of register r is row 4·(lane%4) + i + 16·r of column
            lane/4.
        c: int32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.

    Returns:
        int32 (warps, 32, 4), laid out like `c`.
    """
    return _integer_product(a, b, c, 8)


def mma_m16n8k256_b1(a: Array, b: Array, c: Array) -> Array:
    """D (16×8) = how many bits A (16×256) and B (256×8) share, + C: `mma.m16n8k256.and.popc`.

    Args:
        a: uint32 (warps, 32 lanes, 4): bit i of register r is column 32·(lane%4) + i + 128·(r/2) of
            row lane/4 + 8·(r%2).
        b: uint32 (warps, 32, 2): bit i of register r is row 32·(lane%4) + i + 128·r of column
            lane/4.
        c: int32 (warps, 32, 4), laid out as for `mma_sp_m16n8k32`.

    Returns:
        int32 (warps, 32, 4), laid out like `c`.
    """
    return _integer_product(a, b, c, 1)


def _integer_product(a: Array, b: Array, c: Array, bits: int) -> Array:
    """A·B + C of unsigned integers of so many bits; a lane's registers hold 32 / bits of a row."""
    count = 32 // bits
    part = np.arange(count)
    left = np.zeros((a.shape[0], 16, 8 * count), np.int64)
    right = np.zeros((a.shape[0], 8 * count, 8), np.int64)
    lane, register, part = LANE[..., None], REGISTER[..., None], part[None, None]
    k = count * (lane % 4) + part
    mask = np.uint32(2**bits - 1)
    parts = (bits * part).astype(np.uint32)
    left[:, lane // 4 + 8 * (register % 2), k + 4 * count * (register // 2)] = (
        a[..., None] >> parts & mask
    )
    right[:, k + 4 * count * register[:, :2], lane // 4] = b[..., None] >> parts & mask
    product = left @ right
    at = product[:, LANE // 4 + 8 * (REGISTER // 2), 2 * (LANE % 4) + REGISTER % 2]
    return (c + at).astype(np.int32)


@dataclass
class _Instruction:
    guard: str | None
    negated: bool
    opcode: list[str]
    operands: list[Any]
    text: str


@dataclass
class PtxKernel:
    """The body of the one kernel in a PTX module."""

    instructions: list[_Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, ptx: str) -> PtxKernel:
        body = re.sub(r"//[^\n]*", "", ptx)
        body = body[body.index(".entry") :]
        body = body[body.index("{") + 1 :]
        # the registers of an inline-assembly block hold nothing at its start
        body = re.sub(r"^\s*\{\s*((?:\.reg[^;]*;\s*)+)", _enter_block, body, flags=re.M)
        # declarations and line numbers
        body = re.sub(r"^\s*\.[^\n]*", "", body, flags=re.M)
        kernel = cls()
        blocks = 0
        for statement in re.split(r";|(?<=\w):(?=\s)", body):
            text = " ".join(statement.split())
            if text.startswith("}"):
                if not blocks:
                    break
                blocks -= 1
                text = text[1:].strip()
            blocks += text.startswith("forget ")
            if re.fullmatch(r"\$L\w+", text):
                kernel.labels[text] = len(kernel.instructions)
            elif text:
                kernel.instructions.append(_decode(text))
        return kernel


def _enter_block(match: re.Match[str]) -> str:
    names = re.findall(r"\.reg\s+\.\w+\s+([^;]*);", match.group(1))
    return f"\nforget {{{', '.join(name.strip() for name in names)}}};\n"


def _decode(text: str) -> _Instruction:
    match = re.fullmatch(r"(?:@(!?)(%?\w+) )?([a-z][\w.:]*)(?: (.*))?", text)
    if match is None:
        raise ValueError(f"cannot parse {text!r}")
    negated, guard, opcode, rest = match.groups()
    operands: list[Any] = []
    for piece in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest or ""):
        piece = piece.strip()
        if piece.startswith("{"):
            operands.append([p.strip() for p in piece[1:-1].split(",")])
        elif piece.startswith("["):
            base, _, offset = piece[1:-1].replace(" ", "").partition("+")
            operands.append((base, int(offset or "0", 0)))
        else:
            operands.append(piece)
    return _Instruction(guard, negated == "!", opcode.split("."), operands, text)


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

    def result(self, number: int) -> Array:
        """What an array holds now."""
        array, start = self.arrays[number], self.addresses[number] - self.BASE
        held = self.bytes[start : start + array.nbytes].copy()
        return held.view(array.dtype).reshape(array.shape)


class Program:
    """One program (thread block) of a kernel, all threads in step."""

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
    ) -> None:
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        self.threads, self.lazy = threads, lazy
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)
        # in which stretch between barriers each warp last read and wrote each byte
        self.stretch = 0
        self.read = np.full((threads // 32, shared_bytes), -1)
        self.written = np.full((threads // 32, shared_bytes), -1)
        self.warp = np.arange(threads) // 32
        self.registers: dict[str, Array] = {}
        self.special = {"%tid.x": np.arange(threads, dtype=np.uint64)}
        for axis, here, size in zip("xyz", ids, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(threads, here, np.uint64)
            self.special[f"%nctaid.{axis}"] = np.full(threads, size, np.uint64)
        self.pending: list[Any] = []
        self.groups: list[list[Any]] = []

    def run(self, limit: int = 200_000) -> None:
        """Execute until every thread returned; the threads that are furthest behind go first."""
        end = len(self.kernel.instructions)
        at = np.zeros(self.threads, np.int64)
        for _ in range(limit):
            here = int(at.min())
            if here == end:
                return
            instruction = self.kernel.instructions[here]
            group = at == here
            active = group
            if instruction.guard is not None:
                active = group & (
                    self.registers[instruction.guard].astype(bool) ^ instruction.negated
                )
            at[group] = here + 1
            name = instruction.opcode[0]
            if name == "bra":
                at[active] = self.kernel.labels[instruction.operands[0]]
            elif name == "ret":
                at[active] = end
            elif active.any():
                if name in ("bar", "mma", "wgmma", "ldmatrix", "shfl") and not active.all():
                    raise ValueError(f"only some threads arrive: {instruction.text}")
                handler = getattr(self, f"_{name}", None)
                if handler is None:
                    raise ValueError(f"unknown instruction: {instruction.text}")
                handler(instruction.opcode, instruction.operands, active)
        raise ValueError("the program does not end")

    # Operands.

    def _bits(self, operand: str) -> Array:
        if operand in self.registers:
            return self.registers[operand]
        if operand in self.special:
            return self.special[operand]
        if operand == "global_smem":
            value = 0
        elif operand.startswith("0f"):
            value = int(operand[2:], 16)
        else:
            value = int(operand, 0)
        return np.full(self.threads, value & (2**64 - 1), np.uint64)

    def _value(self, operand: str, kind: str) -> Array:
        bits = self._bits(operand)
        width = int(kind[1:])
        numpy_type = {"f": "float", "s": "int"}.get(kind[0], "uint") + str(width)
        return bits.astype(f"uint{width}").view(numpy_type)

    def _set(self, name: str, values: Array, active: Array) -> None:
        bits = np.ascontiguousarray(values)
        if bits.dtype != bool:
            bits = bits.view(f"uint{8 * bits.itemsize}")
        bits = bits.astype(np.uint64)
        if not active.all():
            held = self.registers.get(name)
            bits = np.where(active, bits, 0xDEADBEEF if held is None else held)
        self.registers[name] = bits

    def _address(self, operand: tuple[str, int]) -> Array:
        return (self._bits(operand[0]) + np.uint64(operand[1] & (2**64 - 1))).astype(np.int64)

    def _global(self, address: Array, width: int, active: Array) -> Array:
        at = (address[active] - GlobalMemory.BASE)[:, None] + np.arange(width)
        if at.size and (at.min() < 0 or at.max() >= len(self.memory.valid)):
            raise ValueError("global access outside every array")
        if not self.memory.valid[at].all():
            raise ValueError("global access outside every array")
        if (at[:, 0] % width).any():
            raise ValueError(f"global access of {width} bytes is not aligned")
        return at

    def _local(self, address: Array, width: int, active: Array, writes: bool) -> Array:
        at = address[active][:, None] + np.arange(width)
        if at.size and (at.min() < 0 or at.max() >= len(self.shared) or (at[:, 0] % width).any()):
            raise ValueError("shared access outside the allocation, or not aligned")
        self._touch(at, self.warp[active], writes)
        return at

    def _touch(self, at: Array, warp: Array, writes: bool) -> None:
        for other in range(len(self.read)):
            foreign = at[warp != other]
            if (self.written[other, foreign] == self.stretch).any() or (
                writes and (self.read[other, foreign] == self.stretch).any()
            ):
                raise ValueError("two warps use the same shared bytes without a barrier between")
        (self.written if writes else self.read)[warp[:, None], at] = self.stretch

    # Memory.

    def _ld(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1] == "param":
            number = int(operands[1][0].rsplit("_", 1)[1])
            value = np.full(self.threads, self.parameters[number] & (2**64 - 1), np.uint64)
            self._set(operands[0], value, active)
            return
        names = operands[0] if isinstance(operands[0], list) else [operands[0]]
        width = int(opcode[-1][1:]) // 8
        address = self._address(operands[1])
        if opcode[1] == "global":
            held = self.memory.bytes[self._global(address, width * len(names), active)]
        else:
            held = self.shared[self._local(address, width * len(names), active, writes=False)]
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
        if opcode[1] == "global":
            self.memory.bytes[self._global(address, width * len(names), active)] = held
        else:
            self.shared[self._local(address, width * len(names), active, writes=True)] = held

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

    def _cp(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1:3] == ["async", "commit_group"]:
            self.groups.append(self.pending)
            self.pending = []
        elif opcode[1:3] == ["async", "wait_group"]:
            while len(self.groups) > int(operands[0], 0):
                for target, held, warp in self.groups.pop(0):
                    self._touch(target, warp, writes=True)
                    self.shared[target] = held
        else:
            width = int(operands[2], 0)
            size = self._value(operands[3], "u32") if len(operands) > 3 else width
            used = active & (np.broadcast_to(size, active.shape) == width)
            held = np.zeros((self.threads, width), np.uint8)
            source = self._global(self._address(operands[1]), width, used)
            held[used] = self.memory.bytes[source]
            target = self._local(self._address(operands[0]), width, active, writes=True)
            if self.lazy:
                self.pending.append((target, held[active], self.warp[active]))
                self.shared[target] = 0xFF
            else:
                self.shared[target] = held[active]

    def _ldmatrix(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        rows = self._address(operands[1]).reshape(-1, 32)
        for i, name in enumerate(operands[0]):
            row = rows[:, 8 * i + np.arange(32) // 4] + 4 * (np.arange(32) % 4)
            at = self._local(row.reshape(-1), 4, active, writes=False)
            self._set(name, np.ascontiguousarray(self.shared[at]).view(np.uint32)[:, 0], active)

    def _mma(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        def fragment(names: Iterable[str], kind: str) -> Array:
            return np.stack([self._value(n, kind).reshape(-1, 32) for n in names], 2)

        d, a, b, c = operands[:4]
        sums = "s32" if "s32" in opcode else "f32"
        parts = fragment(a, "u32"), fragment(b, "u32"), fragment(c, sums)
        if opcode[1:6] == ["sp::ordered_metadata", "sync", "aligned", "m16n8k32", "row"]:
            metadata = self._value(operands[4], "u32").reshape(-1, 32)
            result = mma_sp_m16n8k32(*parts, metadata, int(operands[5], 0), opcode[8])
        elif opcode[1:5] == ["sync", "aligned", "m16n8k16", "row"]:
            result = mma_m16n8k16(*parts, opcode[7])
        elif opcode[3] == "m16n8k32" and opcode[4:] == ["row", "col", "s32", "u8", "u8", "s32"]:
            result = mma_m16n8k32_u8(*parts)
        elif opcode[3] == "m16n8k256" and opcode[6:] == ["s32", "b1", "b1", "s32", "and", "popc"]:
            result = mma_m16n8k256_b1(*parts)
        else:
            raise ValueError(f"unknown shape: {opcode}")
        for i, name in enumerate(d):
            self._set(name, np.ascontiguousarray(result[:, :, i]).reshape(-1), active)

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
            result = mma_sp_m16n8k32(left, fragment, sums, metadata, int(selector, 0), opcode[7])
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
        if at.max() >= len(self.shared):
            raise ValueError("shared access outside the allocation")
        for warp, used in enumerate(at):
            used = used.reshape(-1, 4)
            self._touch(used, np.full(len(used), warp), writes=False)
        return np.ascontiguousarray(self.shared[at]).view(np.uint32)[..., 0]

    def _fence(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1:3] != ["proxy", "async"]:
            raise ValueError(f"unknown instruction: {opcode}")

    def _shfl(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[1:] != ["sync", "bfly", "b32"] or operands[3] != "31":
            raise ValueError(f"unknown instruction: {opcode}")
        source = np.arange(self.threads) ^ int(operands[2], 0)
        self._set(operands[0], self._value(operands[1], "u32")[source], active)

    def _prmt(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        low, high = (self._value(o, "u32").astype(np.uint64) for o in operands[1:3])
        both, selector = low | high << np.uint64(32), int(operands[3], 0)
        result = np.zeros(self.threads, np.uint64)
        for byte in range(4):
            chosen = np.uint64(8 * (selector >> 4 * byte & 7))
            result |= (both >> chosen & np.uint64(0xFF)) << np.uint64(8 * byte)
        self._set(operands[0], result.astype(np.uint32), active)

    def _forget(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        for name in operands[0]:
            self.registers.pop(name, None)

    def _bar(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self.stretch += 1

    # Arithmetic.

    def _mov(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        target, source = operands
        if isinstance(source, list):
            low, high = (self._value(s, "u16").astype(np.uint32) for s in source)
            self._set(target, low | high << 16, active)
        elif isinstance(target, list):
            bits = self._value(source, "u32")
            self._set(target[0], (bits & 0xFFFF).astype(np.uint16), active)
            self._set(target[1], (bits >> 16).astype(np.uint16), active)
        else:
            width = "8" if opcode[-1] == "pred" else opcode[-1][1:]
            self._set(target, self._value(source, f"u{width}"), active)

    def _binary(self, opcode: list[str], operands: list[Any], active: Array, function: Any) -> None:
        kind = opcode[-1].replace("b", "u") if opcode[-1] != "pred" else "u8"
        left, right = self._value(operands[1], kind), self._value(operands[2], kind)
        with np.errstate(all="ignore"):
            self._set(operands[0], function(left, right).astype(left.dtype), active)

    def _add(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.add)

    def _sub(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.subtract)

    def _div(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.divide)

    def _min(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.minimum)

    def _max(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.maximum)

    def _and(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.bitwise_and)

    def _or(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.bitwise_or)

    def _xor(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._binary(opcode, operands, active, np.bitwise_xor)

    def _not(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._set(operands[0], ~self._value(operands[1], opcode[-1].replace("b", "u")), active)

    def _shift(self, opcode: list[str], operands: list[Any], active: Array, function: Any) -> None:
        value = self._value(operands[1], opcode[-1].replace("b", "u"))
        count = self._value(operands[2], "u32").astype(value.dtype)
        self._set(operands[0], function(value, count), active)

    def _shl(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._shift(opcode, operands, active, np.left_shift)

    def _shr(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._shift(opcode, operands, active, np.right_shift)

    def _bfe(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        value, start, count = (self._value(o, "u32") for o in operands[1:])
        field = value >> start & ((np.uint32(1) << count) - np.uint32(1))
        if opcode[-1] == "s32":
            sign = np.uint32(1) << count - np.uint32(1)
            field = (field ^ sign) - sign
        self._set(operands[0], field, active)

    def _mul(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if "wide" in opcode:
            kind = opcode[-1]
            wide = "int64" if kind[0] == "s" else "uint64"
            left, right = (self._value(o, kind).astype(wide) for o in operands[1:])
            self._set(operands[0], left * right, active)
        else:
            self._binary(opcode, operands, active, np.multiply)

    def _mad(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._mul(["mul", *opcode[1:]], [operands[0], *operands[1:3]], active)
        kind = opcode[-1][0] + ("64" if "wide" in opcode else opcode[-1][1:])
        self._binary(["add", kind], [operands[0], operands[0], operands[3]], active, np.add)

    def _fma(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        a, b, c = (self._value(o, "f32").astype(np.float64) for o in operands[1:])
        with np.errstate(all="ignore"):
            self._set(operands[0], (a * b + c).astype(np.float32), active)

    def _abs(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._set(operands[0], np.abs(self._value(operands[1], opcode[-1])), active)

    def _neg(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._set(operands[0], -self._value(operands[1], opcode[-1]), active)

    def _copysign(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        sign, size = (self._value(o, "f32") for o in operands[1:])
        self._set(operands[0], np.copysign(size, sign), active)

    def _ex2(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        with np.errstate(all="ignore"):
            self._set(operands[0], np.exp2(self._value(operands[1], "f32")), active)

    def _setp(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        functions = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
        functions |= {"eq": np.equal, "ne": np.not_equal}
        kind = opcode[-1].replace("b", "u")
        left, right = (self._value(o, kind) for o in operands[1:])
        result = functions[opcode[1][:2]](left, right)
        if opcode[1].endswith("u"):
            # unordered: also true of a NaN
            result |= np.isnan(left) | np.isnan(right)
        self._set(operands[0], result, active)

    def _selp(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        width = "u" + opcode[-1][1:]
        left, right = (self._value(o, width) for o in operands[1:3])
        self._set(operands[0], np.where(self._bits(operands[3]) != 0, left, right), active)

    def _cvt(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        target, source = opcode[-2:]
        if target in ("bf16x2", "f16x2"):
            high, low = (from_float(self._value(o, "f32"), target[:-2]) for o in operands[1:])
            values = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
        elif target in ("bf16", "f16"):
            values = from_float(self._value(operands[1], "f32"), target)
        elif source in ("bf16", "f16"):
            values = to_float(self._value(operands[1], "u16"), source)
        else:
            kind = "int" if target[0] == "s" else "uint"
            values = self._value(operands[1], source).astype(f"{kind}{target[1:]}")
        self._set(operands[0], values, active)


TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
TYPES[torch.float32] = "*fp32"


class Machine:
    """Stands where the `@gluon.jit` kernel stands in the launcher: `machine[grid](...)`."""

    def __init__(self, kernel, arch: int, lazy: bool) -> None:
        self.kernel, self.arch, self.lazy = kernel, arch, lazy
        self.shuffle = random.Random(0)
        self.launches = 0

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.run(grid, arguments, constants)

    def run(self, grid, arguments, constants):
        self.launches += 1
        warps = constants.pop("num_warps")
        names = self.kernel.arg_names[: len(arguments)]
        signature, constants, divisible = {}, dict(constants), []
        for name, value in zip(names, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                assert value.data_ptr() % 16 == 0, "launches assume 16-byte aligned tensors"
                divisible.append(name)
            elif value == 1:
                # as Triton does: a 1 is a constant
                constants[name] = 1
            else:
                signature[name] = "i32"
                divisible += [name] * (value % 16 == 0)
        case = KernelCase("machine", self.kernel, signature, constants, warps, divisible=divisible)
        ptx, shared = compile_ptx(case, self.arch)
        # one array per allocation, however often it is passed
        tensors = {a.data_ptr(): a for a in arguments if isinstance(a, torch.Tensor)}
        memory = GlobalMemory([_bits(t) for t in tensors.values()])
        address = dict(zip(tensors, memory.addresses, strict=True))
        parameters = [
            address[v.data_ptr()] if isinstance(v, torch.Tensor) else v
            for n, v in zip(names, arguments, strict=True)
            if n in signature
        ]
        # Triton adds two scratch pointers
        parameters += [0, 0]
        kernel = PtxKernel.parse(ptx)
        programs = [
            (i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])
        ]
        self.shuffle.shuffle(programs)
        for ids in programs:
            Program(kernel, memory, parameters, ids, grid, shared, 32 * warps, self.lazy).run()
        for number, tensor in enumerate(tensors.values()):
            held = torch.from_numpy(memory.result(number))
            tensor.view(torch.uint8).reshape(-1).copy_(held)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).reshape(-1).numpy().copy()
