"""Compiles the package's Triton kernels without a GPU (`prunekit doctor --kernels`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekernels.compilation import CompiledReport


def compiled(archs: Sequence[str], *, progress: bool) -> list[CompiledReport]:
    """Compile every case that a kernel module registers, for the named architectures.

    Args:
        archs: Such as "90", "sm_90" or "gfx942".
        progress: Show a progress bar on a terminal.

    Raises:
        PrunekitError: There is no Triton, kernels are being interpreted, or no kernel is meant for
            one of the architectures.
    """
    from prunekernels import compilation, runtime

    from prunekit.process.progress import track

    if not runtime.triton_installed():
        raise PrunekitError(
            "Triton is not installed, and kernels cannot be compiled without it: on Linux x86-64, "
            "pip install triton (elsewhere prunekernels runs in plain torch)"
        )
    if runtime.interpreting():
        raise PrunekitError("TRITON_INTERPRET is set: unset it to compile kernels")
    try:
        wanted = [compilation.parse_arch(text) for text in archs]
        plan = compilation.planned(compilation.discover(), wanted)
    except ValueError as error:
        raise PrunekitError(f"--arch: {error}") from error
    return [
        compilation.compile_case(case, arch)
        for case, arch in track(plan, "compiling kernels", enabled=progress)
    ]


def data(reports: Sequence[CompiledReport]) -> dict[str, Any]:
    """The reports and the versions they belong to, as JSON-able data."""
    import torch
    import triton

    rows = [{**asdict(report), "fault": report.fault or None} for report in reports]
    return {"versions": {"torch": torch.__version__, "triton": triton.__version__}, "kernels": rows}


def shown(reports: Sequence[CompiledReport]) -> Any:
    """One line per kernel, architecture and dtype, and what is wrong."""
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    faults = [report for report in reports if report.fault]
    said = f"{len(reports)} compiled, {len(faults)} with a fault"
    rows = [_row(report) for report in reports]
    return Group(terminal.records("Kernels as compiled", rows), Text(f"\n{said}"))


def _row(report: CompiledReport) -> Mapping[str, Any]:
    density = report.instructions_per_element
    return {
        "kernel": report.name,
        "arch": report.arch,
        "dtype": report.dtype,
        "registers": report.registers,
        "spills": report.spills,
        "shared B": report.shared_bytes,
        "tensor-core instructions": ", ".join(f"{k} ×{n}" for k, n in report.tensor_core.items()),
        "instr/element": "" if density is None else f"{density:.3f}",
        "fault": report.fault,
    }
