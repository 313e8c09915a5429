"""`prunekit doctor`: what this machine can do, and which implementation runs for each op."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from typing import Any, TextIO

from prunekit.commands import options
from prunekit.errors import install

SUMMARY = "say what runs on this machine, and why"
DESCRIPTION = """\
Print the versions at work, the devices, which implementation runs for each op and why, whether the
embedded demo model is there, and which optional packages are installed.

With --kernels: compile every Triton kernel of prunekernels, for GPUs that need not be here, and
print what each became: registers, spills, shared memory, tensor-core instructions, and instructions
per element of its main loop.
"""
EXAMPLE = "prunekit doctor --kernels --arch 80,90"

_PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers")
# package -> what it is for, and the extra that brings it
_EXTRAS = {
    "datasets": f"calibration from Hub data sets: {install('datasets')}",
    "pyarrow": f"calibration from .parquet files: {install('parquet')}",
    "lm_eval": f"lm-eval tasks: {install('eval')}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--kernels", action="store_true", help="compile every Triton kernel (some minutes)"
    )
    parser.add_argument(
        "--arch",
        metavar="LIST",
        default="80,89,90",
        help="for --kernels: compute capabilities or gfx942 (80,89,90)",
    )
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    if args.kernels:
        from prunekit.commands import kernel_reports

        rows = kernel_reports.compiled(args.arch.split(","), progress=not args.quiet)
        data = kernel_reports.data(rows)
        options.emit(args, answer, lambda: data, lambda: kernel_reports.shown(rows))
        return
    found = _facts()
    options.emit(args, answer, lambda: found, lambda: _shown(found))


def own_version() -> str:
    """The version of prunekit."""
    import prunekit

    return prunekit.__version__


def _facts() -> dict[str, Any]:
    import torch
    from prunekernels import runtime

    from prunekit.analysis.provenance import installed
    from prunekit.checkpoint.gguf_reader import demo_file
    from prunekit.errors import PrunekitError

    try:
        demo = str(demo_file())
    except PrunekitError as error:
        demo = f"missing: {error}"
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "versions": {
            "prunekit": own_version(),
            "python": platform.python_version(),
            **{name: installed(name) or "not installed" for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(index) for index in gpus] or ["cpu"],
        "cpu_threads": {"used by torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "ops": runtime.describe(),
        "demo_model": demo,
        "extras": {
            name: "installed" if importlib.util.find_spec(name) else f"missing ({purpose})"
            for name, purpose in _EXTRAS.items()
        },
    }


def _shown(found: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    threads = found["cpu_threads"]
    return Group(
        terminal.facts("Versions", found["versions"].items()),
        Text(),
        terminal.facts(
            "Machine",
            [
                ("platform", found["platform"]),
                ("devices", ", ".join(found["devices"])),
                ("CPU threads", f"{threads['used by torch']} of {threads['cores']} cores"),
                ("demo model", found["demo_model"]),
            ],
        ),
        Text(),
        terminal.records("Which implementation runs, and why", found["ops"]),
        Text(),
        terminal.facts("Optional packages", found["extras"].items()),
    )
