"""The instructions of a PTX module's kernel, as data."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        guard: Predicate that decides which threads execute it, or None.
        negated: Whether those execute it for which the predicate is false.
        opcode: Its name and modifiers.
        operands: Names and numbers as text; lists of them; and (base, offset) for addresses.
        text: What the module says.
    """

    guard: str | None
    negated: bool
    opcode: list[str]
    operands: list[Any]
    text: str


@dataclass
class PtxKernel:
    """The body of the one kernel in a PTX module."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, ptx: str) -> PtxKernel:
        """The kernel of a module that Triton emitted."""
        number = itertools.count()
        ptx = re.sub(
            r"// begin inline asm(.*?)// end inline asm",
            lambda match: _own_labels(match.group(1), next(number)),
            ptx,
            flags=re.S,
        )
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


def _own_labels(block: str, number: int) -> str:
    """An inline-assembly block whose labels no other block has: braces scope them."""
    for label in re.findall(r"^\s*([\w$]+):\s*$", block, flags=re.M):
        own = f"$L_inline{number}_{label.lstrip('$')}"
        block = re.sub(rf"(?<![\w$]){re.escape(label)}(?![\w$])", lambda _, own=own: own, block)
    return block


def _enter_block(match: re.Match[str]) -> str:
    names = re.findall(r"\.reg\s+\.\w+\s+([^;]*);", match.group(1))
    return f"\nforget {{{', '.join(name.strip() for name in names)}}};\n"


def _decode(text: str) -> Instruction:
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
    return Instruction(guard, negated == "!", opcode.split("."), operands, text)
