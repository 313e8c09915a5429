"""Compile Triton and Gluon kernels without a GPU and read what the machine code became.

A kernel module lists what it compiles to in a function `compile_cases()`, from the calls that it
launches (`prunekernels.launch`):

    def compile_cases() -> list[KernelCase]:
        x, out = meta((8, 4096), torch.bfloat16), meta((8,), torch.float32)
        return [sums(x, out).case("sums/bf16", opcodes=("MUFU.EX2",), archs=(80, 90))]

Tests call `compile_case(case, 90)` and assert on the report:

    report = compile_case(case, 90)
    assert report.spills == 0 and not report.missing

Architectures are compute capabilities as integers (80, 89, 90, ...) or an AMD name ("gfx942",
plain Triton only; opcodes are then read from the AMD assembly, and loops are not analysed).
Triton's own wheel carries the `cuobjdump` and `nvdisasm` used here. Importing this module does
not import Triton. `prunekit doctor --kernels` and `python -m prunekernels.compilation [arch ...]`
print every case that `discover` finds.

Instructions per element = instructions of one iteration of the hot loop, times 32 lanes, over the
elements that one warp handles in the iteration. The hot loop is the innermost loop holding most of
the `per_iteration` (else the first meant) opcode; `per_iteration` also undoes unrolling by ptxas.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Arch = int | str

#: Instructions of tensor cores: NVIDIA's machine code by family, AMD's assembly in lower case.
TENSOR_CORE: tuple[str, ...] = (
    "HMMA",
    "HGMMA",
    "IMMA",
    "IGMMA",
    "QMMA",
    "QGMMA",
    "BMMA",
    "DMMA",
    "UTC",
    "OMMA",
)
TENSOR_CORE += ("v_mfma", "v_smfmac", "v_wmma", "v_swmmac")

#: Bytes of shared memory one program may use, by compute capability (CUDA programming guide).
SHARED_LIMIT: dict[Arch, int] = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class KernelCase:
    """One specialisation of a kernel, and what its machine code is meant to contain.

    Attributes:
        name: Unique label, shown in reports.
        kernel: The `@triton.jit` or `@gluon.jit` function.
        signature: Type of every non-constant argument, such as `"*bf16"`, `"i32"`.
        constants: Value of every `constexpr` argument.
        num_warps: Warps per program.
        num_stages: Software pipelining depth (plain Triton).
        options: Further options of the compiler.
        divisible: Arguments that are multiples of 16 (pointers: aligned to 16 bytes).
        opcodes: Opcode prefixes that must occur, such as `"HMMA.SP.16832.F32.BF16"`; names in lower
            case are looked for on AMD only, others on NVIDIA only.
        elements_per_iteration: Elements one warp handles in one source-level loop iteration;
            0 leaves instructions per element out of the report.
        per_iteration: `(opcode prefix, count)` in one source-level iteration; None = not unrolled.
        rare: Opcode prefix that marks a rarely taken part of the hot loop: the largest part with
            it that a forward branch skips is not counted per element.
        archs: Where the case is meant to compile.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, int] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    opcodes: Sequence[str] = ()
    elements_per_iteration: int = 0
    per_iteration: tuple[str, int] | None = None
    rare: str = ""
    archs: Sequence[Arch] = (80, 89, 90)

    @property
    def dtype(self) -> str:
        """Type of the first floating-point array that the kernel takes ("" if there is none)."""
        given = (self.signature.get(name, "") for name in self.kernel.arg_names)
        return next((kind[1:] for kind in given if kind in _FLOATS), "")


_FLOATS = ("*bf16", "*fp16", "*fp32", "*fp64")


@dataclass(frozen=True)
class CompiledReport:
    """What one case became on one architecture.

    Attributes:
        name: The case's name.
        arch: The architecture compiled for.
        registers: Registers per thread (AMD: vector registers).
        spills: Local-memory loads and stores in the machine code (AMD: spilled vector registers).
        shared_bytes: Shared memory per program, in bytes.
        opcodes: How often each meant opcode prefix occurs in the whole kernel.
        loop_instructions: Instructions in the hot loop as compiled (0 if there is no loop).
        instructions_per_element: Per-lane instructions per element, or None if not asked for.
        instructions: Instructions in the whole kernel.
        loop_opcodes: Opcode (first component) counts in the hot loop.
        loop_loads: Global loads in the hot loop, by width ("LDG.E.64"), rare part left out.
        loop_spills: Local-memory loads and stores in the hot loop, rare part left out.
        tensor_core: How often each instruction of the tensor cores occurs in the whole kernel.
        dtype: The case's dtype.
    """

    name: str
    arch: Arch
    registers: int
    spills: int
    shared_bytes: int
    opcodes: Mapping[str, int]
    loop_instructions: int
    instructions_per_element: float | None
    instructions: int
    loop_opcodes: Mapping[str, int]
    loop_loads: Mapping[str, int] = field(default_factory=dict)
    loop_spills: int = 0
    tensor_core: Mapping[str, int] = field(default_factory=dict)
    dtype: str = ""

    @property
    def missing(self) -> list[str]:
        """Meant opcodes that the machine code lacks."""
        return [name for name, count in self.opcodes.items() if count == 0]

    @property
    def fits(self) -> bool:
        """Whether the shared memory is within the architecture's limit."""
        return self.shared_bytes <= SHARED_LIMIT[self.arch]

    @property
    def fault(self) -> str:
        """What is wrong with the machine code, in a few words ("" if nothing is)."""
        found = [f"no {name}" for name in self.missing]
        found += [f"{self.spills} spills"] if self.spills else []
        found += [] if self.fits else [f"{self.shared_bytes} B shared is too much"]
        return ", ".join(found)


def compile_case(case: KernelCase, arch: Arch) -> CompiledReport:
    """Compile `case` for `arch` and read the result; needs Triton's wheel, not a GPU.

    Args:
        case: What to compile.
        arch: Compute capability (80, 89, 90, ...) or an AMD architecture name.

    Returns:
        The report.

    Raises:
        ValueError: If kernels are being interpreted, or arguments and constants do not match.
    """
    compiled = _compile(case, arch)
    shared = int(compiled.metadata.shared)
    if not isinstance(arch, int):
        return _read_amd(case, arch, compiled.asm["amdgcn"], shared)
    code, registers = read_cubin(compiled.asm["cubin"])
    return _read_sass(case, arch, code, registers, shared)


def read_cubin(cubin: bytes) -> tuple[list[Instruction], int]:
    """Machine code of NVIDIA's assembler as instructions, and registers per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        text = _tool("cuobjdump", "-sass", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage!r}")
    return parse_sass(text), int(registers.group(1))


def machine_code(case: KernelCase, arch: int) -> list[Instruction]:
    """Machine code of a case for an NVIDIA architecture."""
    return read_cubin(_compile(case, arch).asm["cubin"])[0]


def compile_ptx(case: KernelCase, arch: int) -> tuple[str, int]:
    """PTX of a case for an NVIDIA architecture, and the bytes of shared memory it uses."""
    compiled = _compile(case, arch)
    return compiled.asm["ptx"], int(compiled.metadata.shared)


def _compile(case: KernelCase, arch: Arch) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    kernel = case.kernel
    if not isinstance(kernel, JITFunction):
        raise ValueError("compile-only checks need compiled kernels: unset TRITON_INTERPRET")
    given = set(case.signature) | set(case.constants)
    if given != set(kernel.arg_names):
        odd = sorted(given ^ set(kernel.arg_names))
        raise ValueError(f"{case.name}: signature and constants disagree with the kernel on {odd}")
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible
    }
    source = source_type(kernel)(kernel, signature, dict(case.constants), attributes)
    kind = ("cuda", arch, 32) if isinstance(arch, int) else ("hip", arch, 64)
    options = {"num_warps": case.num_warps, **case.options}
    if not kernel.is_gluon():
        options["num_stages"] = case.num_stages
    return triton.compile(source, target=GPUTarget(*kind), options=options)


def source_type(kernel: Any) -> Any:
    """Triton's class of sources for a plain Triton or a Gluon kernel."""
    from triton.compiler import ASTSource

    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def discover() -> list[KernelCase]:
    """All cases that the package's kernel modules register through `compile_cases()`."""
    package = importlib.import_module(__package__ or "prunekernels")
    cases: list[KernelCase] = []
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if info.name == __name__:
            continue
        module = importlib.import_module(info.name)
        if hasattr(module, "compile_cases"):
            cases += module.compile_cases()
    return cases


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: byte address, opcode with modifiers, operands as text."""

    address: int
    opcode: str
    operands: str


_SASS_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M
)


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of the text that `cuobjdump -sass` prints, without predicates."""
    # Blackwell's scheduling notes (&req=…, ?trans5) follow the operands
    return [
        Instruction(int(address, 16), opcode, re.split(r"\s+[&?]", operands)[0].strip())
        for address, opcode, operands in _SASS_LINE.findall(text)
    ]


def innermost_loops(code: Sequence[Instruction], marker: str = "") -> list[list[Instruction]]:
    """Bodies of the loops that contain no other loop, from backward branches.

    With an opcode prefix, only loops that hold it count: one that waits inside them does not.
    """
    spans: list[tuple[int, int]] = []
    for instruction in code:
        if instruction.opcode.split(".")[0] != "BRA":
            continue
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        # a branch to itself pads the end of every kernel
        if target is not None and int(target.group(1), 16) < instruction.address:
            spans.append((int(target.group(1), 16), instruction.address))
    held = [i.address for i in code if i.opcode.startswith(marker)]
    spans = [span for span in spans if any(span[0] <= at <= span[1] for at in held)]
    inner = [
        span
        for span in spans
        if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)
    ]
    return [[i for i in code if first <= i.address <= last] for first, last in inner]


def _count(code: Iterable[Instruction], prefix: str) -> int:
    return sum(i.opcode.startswith(prefix) for i in code)


def _tally(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names))


def _without_rare(loop: Sequence[Instruction], marker: str) -> list[Instruction]:
    skipped: list[Instruction] = []
    for branch in loop:
        target = re.search(r"0x([0-9a-f]+)\s*$", branch.operands)
        # code that is kept outside of the loop is nothing that a branch skips
        if branch.opcode.split(".")[0] != "BRA" or target is None:
            continue
        if int(target.group(1), 16) > loop[-1].address:
            continue
        part = [i for i in loop if branch.address < i.address < int(target.group(1), 16)]
        if _count(part, marker) and len(part) > len(skipped):
            skipped = part
    left_out = {i.address for i in skipped}
    return [i for i in loop if i.address not in left_out]


def _read_sass(
    case: KernelCase, arch: Arch, code: Sequence[Instruction], registers: int, shared: int
) -> CompiledReport:
    # lower-case names are meant for AMD
    found = {prefix: _count(code, prefix) for prefix in case.opcodes if not prefix.islower()}
    marker = case.per_iteration[0] if case.per_iteration else next(iter(case.opcodes), "")
    loops = innermost_loops(code, marker) or innermost_loops(code)

    def weight(body: list[Instruction]) -> tuple[int, int, int]:
        # of loops with as many, the one that has most of what is meant
        meant = sum(_count(body, prefix) > 0 for prefix in found)
        return _count(body, marker), meant, len(body)

    loop = max(loops, key=weight, default=[])
    usual = _without_rare(loop, case.rare) if case.rare else loop
    per_element = None
    if case.elements_per_iteration and loop:
        unrolled = 1.0
        if case.per_iteration is not None:
            unrolled = _count(loop, marker) / case.per_iteration[1]
        if unrolled:
            per_element = 32 * len(usual) / (unrolled * case.elements_per_iteration)
    return CompiledReport(
        name=case.name,
        arch=arch,
        registers=registers,
        spills=_count(code, "STL") + _count(code, "LDL"),
        shared_bytes=shared,
        opcodes=found,
        loop_instructions=len(loop),
        instructions_per_element=per_element,
        instructions=len(code),
        loop_opcodes=_tally(i.opcode.split(".")[0] for i in loop),
        loop_loads=_tally(i.opcode for i in usual if i.opcode.startswith("LDG")),
        loop_spills=_count(usual, "STL") + _count(usual, "LDL"),
        tensor_core=_tally(i.opcode for i in code if i.opcode.startswith(TENSOR_CORE)),
        dtype=case.dtype,
    )


def _read_amd(case: KernelCase, arch: Arch, text: str, shared: int) -> CompiledReport:
    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(match.group(1)) if match else 0

    lines = re.findall(r"^\t([a-z]\w+)", text, re.M)
    # upper-case names are NVIDIA's
    found = {n: sum(i.startswith(n) for i in lines) for n in case.opcodes if n.islower()}
    return CompiledReport(
        name=case.name,
        arch=arch,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        shared_bytes=shared,
        opcodes=found,
        loop_instructions=0,
        instructions_per_element=None,
        instructions=len(lines),
        loop_opcodes={},
        tensor_core=_tally(line for line in lines if line.startswith(TENSOR_CORE)),
        dtype=case.dtype,
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # cuobjdump finds nvdisasm through PATH
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [str(folder / name), *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def format_report(report: CompiledReport) -> str:
    """One line: name, architecture, registers, spills, shared memory, opcodes, loop."""
    meant = ", ".join(f"{name} ×{count}" for name, count in report.opcodes.items())
    density = report.instructions_per_element
    return (
        f"{report.name:<40} {report.arch!s:>7}  {report.registers:3d} registers  "
        f"{report.spills} spills  {report.shared_bytes:6d} B shared  "
        f"loop {report.loop_instructions:4d} instructions"
        + (f" = {density:.3f} per element" if density is not None else "")
        + (f"  {meant}" if meant else "")
    )


def planned(cases: Sequence[KernelCase], archs: Sequence[Arch] = ()) -> list[tuple[Any, Arch]]:
    """Pairs of a case and an architecture it is meant for; `archs` leaves out all others.

    Raises:
        ValueError: No case is meant for one of `archs`.
    """
    known = {arch for case in cases for arch in case.archs}
    for arch in archs:
        if arch not in known:
            listed = ", ".join(sorted(map(str, known)))
            raise ValueError(f"no kernel is meant for architecture {arch}; choose from {listed}")
    return [(case, arch) for case in cases for arch in case.archs if not archs or arch in archs]


def parse_arch(text: str) -> Arch:
    """An architecture as people write it: "90", "sm_90" or "gfx942"."""
    number = text.strip().removeprefix("sm_")
    return int(number) if number.isdigit() else number


def main(arguments: Sequence[str]) -> int:
    """Compile every registered case for its architectures, or for those named, and print."""
    failed = 0
    for case, arch in planned(discover(), [parse_arch(text) for text in arguments]):
        report = compile_case(case, arch)
        failed += bool(report.fault)
        print(("FAIL " if report.fault else "ok   ") + format_report(report))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
