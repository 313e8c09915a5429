"""Registers of machine code that `wgmma`s in flight still use, and what touches them too early."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from prunekernels.compilation import Instruction

#: Instructions whose operands are all read.
_NO_RESULT = (
    "ST",
    "RED",
    "BRA",
    "BSSY",
    "BSYNC",
    "EXIT",
    "WARPGROUP",
    "UBLKPF",
    "UTMALDG",
    "SYNCS",
)
#: Instructions whose results are predicates.
_PREDICATES = ("ISETP", "FSETP", "PLOP3", "VOTE", "UISETP", "HSETP2", "BAR")


def _registers(text: str, count: int = 1) -> set[int]:
    match = re.match(r"-?[|~]?R(\d+)\b", text.strip())
    return {int(match[1]) + i for i in range(count)} if match else set()


def _width(opcode: str) -> int:
    if ".128" in opcode:
        return 4
    wide = ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R"
    return 2 if wide and ".U64" not in opcode else 1


def hazards(code: Sequence[Instruction]) -> Iterator[str]:
    """Instructions that write what `wgmma`s in flight use, or read their sums, before the wait.

    Hardware does not guard these registers: the assembler must keep to them. It knows the sums and
    A, but not until when the metadata is read. Code is taken in the order in which it stands.
    """
    sums: set[int] = set()
    used: set[int] = set()
    for instruction in code:
        name, operands = instruction.opcode, instruction.operands.split(",")
        if name.startswith("WARPGROUP.DEPBAR"):
            sums, used = set(), set()
        elif name.startswith("HGMMA"):
            shape = re.search(r"\.64x(\d+)x", name)
            assert shape is not None, name
            own = _registers(operands[0], int(shape[1]) // 2)
            sums |= own
            used |= own | _registers(operands[1], 4) | _registers(operands[4])
        elif used and not name.startswith("R2UR"):
            results = [o for o in operands if not re.match(r"\s*!?U?P(\d|T)", o)][:1]
            if name.startswith((*_NO_RESULT, *_PREDICATES)):
                results = []
            written = set().union(*(_registers(o, _width(name)) for o in results))
            read = {int(r) for r in re.findall(r"\bR(\d+)\b", instruction.operands)} - written
            if written & used:
                yield f"writes: {name} {instruction.operands}"
            elif read & sums:
                yield f"reads: {name} {instruction.operands}"
