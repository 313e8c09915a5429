"""Registers, and the instructions that only use them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.tensor_cores import from_float, to_e4m3, to_float

Array = np.ndarray


class Registers:
    """The registers of all threads of a program, by name, as 64-bit patterns."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.registers: dict[str, Array] = {}
        lanes = np.arange(threads, dtype=np.uint64)
        self.special = {"%tid.x": lanes, "%laneid": lanes % np.uint64(32)}

    def _bits(self, operand: str) -> Array:
        if operand in self.registers:
            return self.registers[operand]
        if operand in self.special:
            return self.special[operand]
        if operand == "global_smem":
            value = 0
        elif "_param_" in operand:
            # the name of a parameter is its address: parameter i stands at 8·i
            value = 8 * int(operand.rsplit("_", 1)[1])
        elif operand.startswith("%"):
            # a register that nothing was loaded into
            value = 0xDEADBEEF
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

    def _forget(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        for name in operands[0]:
            held = self.registers.pop(name, None)
            if held is not None and not active.all():
                self.registers[name] = np.where(active, np.uint64(0xDEADBEEF), held)

    def _prmt(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        low, high = (self._value(o, "u32").astype(np.uint64) for o in operands[1:3])
        both, selector = low | high << np.uint64(32), self._value(operands[3], "u32")
        result = np.zeros(self.threads, np.uint64)
        for byte in range(4):
            chosen = (selector >> np.uint32(4 * byte) & np.uint32(0xF)).astype(np.uint64)
            if (chosen > 7).any():
                raise ValueError("prmt that copies a sign")
            result |= (both >> chosen * np.uint64(8) & np.uint64(0xFF)) << np.uint64(8 * byte)
        self._set(operands[0], result.astype(np.uint32), active)

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
        if opcode[-1] == "pred":
            self._set(operands[0], self._bits(operands[1]) == 0, active)
            return
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
        kind = opcode[-1][0] + ("64" if "wide" in opcode else opcode[-1][1:])
        # read before the product is written: it may be the same register
        addend = self._value(operands[3], kind)
        self._mul(["mul", *opcode[1:]], operands[:3], active)
        with np.errstate(all="ignore"):
            self._set(operands[0], self._value(operands[0], kind) + addend, active)

    def _fma(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        if opcode[-1] in ("bf16x2", "f16x2"):
            # products of two 16-bit floats are exact in float64; the sum is rounded to float32
            # and then to 16 bits, which is once wherever float32 holds it
            kind, words = opcode[-1][:-2], [self._value(o, "u32") for o in operands[1:]]
            halves = []
            for shift in (np.uint32(0), np.uint32(16)):
                a, b, c = (to_float(w >> shift & 0xFFFF, kind).astype(np.float64) for w in words)
                exact = a * b + c
                if not (exact.astype(np.float32) == exact).all():
                    raise ValueError("fma of 16-bit floats with a sum that float32 does not hold")
                halves.append(from_float(exact, kind).astype(np.uint32) << shift)
            self._set(operands[0], halves[0] | halves[1], active)
            return
        a, b, c = (self._value(o, "f32").astype(np.float64) for o in operands[1:])
        with np.errstate(all="ignore"):
            self._set(operands[0], (a * b + c).astype(np.float32), active)

    def _lop3(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        """Bit i is bit (a, b, c) of the table, a the highest."""
        a, b, c = (self._value(o, "u32") for o in operands[1:4])
        table, result = int(operands[4], 0), np.zeros(self.threads, np.uint32)
        for case in range(8):
            if table >> case & 1:
                terms = (v if case >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0)))
                result |= np.bitwise_and.reduce(list(terms))
        self._set(operands[0], result, active)

    def _shf(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        """The upper (l) or lower (r) word of two words, high and low, shifted by 0 … 31 (wrap)."""
        low, high, count = (self._value(o, "u32").astype(np.uint64) for o in operands[1:])
        both, count = high << np.uint64(32) | low, count & np.uint64(31)
        if opcode[1:3] == ["l", "wrap"]:
            shifted = both << count >> np.uint64(32)
        elif opcode[1:3] == ["r", "wrap"]:
            shifted = both >> count
        else:
            raise ValueError(f"unknown instruction: {opcode}")
        self._set(operands[0], shifted.astype(np.uint32), active)

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
        left, right = (self._value(o, kind) for o in operands[1:3])
        result = functions[opcode[1][:2]](left, right)
        if opcode[1].endswith("u"):
            # unordered: also true of a NaN
            result |= np.isnan(left) | np.isnan(right)
        if opcode[2] == "and":
            result &= self._bits(operands[3]) != 0
        self._set(operands[0], result, active)

    def _selp(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        width = "u" + opcode[-1][1:]
        left, right = (self._value(o, width) for o in operands[1:3])
        self._set(operands[0], np.where(self._bits(operands[3]) != 0, left, right), active)

    def _cvt(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        target, source = opcode[-2:]
        if source == "e4m3x2":
            both = self._value(operands[1], "u16")
            low, high = (from_float(to_e4m3(both >> 8 * i & 0xFF), target[:-2]) for i in (0, 1))
            values = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
        elif target in ("bf16x2", "f16x2"):
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

    def _popc(self, opcode: list[str], operands: list[Any], active: Array) -> None:
        self._set(
            operands[0], np.bitwise_count(self._value(operands[1], "u32")).astype(np.uint32), active
        )
