"""`prunekit swap`: pack the sparse weights of a pruned model and save it packed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.swap import SwapReport

SUMMARY = "pack a pruned model's sparse weights: smaller in memory and on disk"
DESCRIPTION = """\
Pack the linear layers of a pruned model whose weights fit a sparse format, say for each layer what
was decided and why, and save the model packed. Nothing is pruned: what does not fit stays dense.

On an NVIDIA GPU, layers that are expected to be slower than dense at --tokens tokens a call stay
dense (--min-speedup). Elsewhere packing saves memory, not time, and everything that fits is packed.
A packed model is turned back into a dense one with --format dense.
"""
EXAMPLE = "prunekit swap out/wanda24 --output out/packed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    options.add_output(parser, "folder for the checkpoint")
    add_packing(parser.add_argument_group("packing"))
    parser.add_argument(
        "--format",
        default="auto",
        help="how it is written: auto (packed), dense, or compressed-tensors' former layouts "
        "sparse-24-bitmask and sparse-bitmask",
    )
    parser.add_argument("--verbose", action="store_true", help="a line per layer in the table")
    options.add_placement(parser.add_argument_group("loading the model"))
    options.add_common(parser)


def add_packing(group: Any) -> None:
    """Options that decide what is packed."""
    group.add_argument(
        "--min-speedup",
        type=options.fraction,
        metavar="X",
        help="pack a layer only if expected to be X times as fast (1 on a GPU, else 0)",
    )
    group.add_argument(
        "--tokens", type=options.positive, default=1, help="tokens per call to decide for (1)"
    )


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    folder = options.output(args, options.CHECKPOINT)

    from prunekit import checkpoint
    from prunekit.packed.described import is_packed
    from prunekit.packed.modules import packed_layers

    checkpoint.check_format(args.format)
    model, tokenizer = options.load(source, args)
    already = sum(1 for _ in packed_layers(model))
    report = pack(model, args)
    if not is_packed(model):
        reasons = [m.reason for m in report.left_dense if m.reason != "output head"]
        why = reasons[0] if reasons else "it has no linear layers"
        raise PrunekitError(
            f"nothing of {source} was packed (first layer: {why}): prune it first, for example "
            f"with prunekit prune --pattern 2:4, or lower --min-speedup"
        )
    checkpoint.save(
        model,
        tokenizer,
        folder,
        format=args.format,
        overwrite=args.overwrite,
        report={"swap": report.to_dict()},
    )
    sizes = facts(model, folder)
    options.emit(
        args,
        answer,
        lambda: {
            "model": source,
            "output": folder,
            "packed_before": already,
            **sizes,
            "report": report.to_dict(),
        },
        lambda: _shown(report, already, args, sizes["folder_bytes"]),
    )


def pack(model: Any, args: argparse.Namespace) -> SwapReport:
    """Pack `model` as the options say."""
    from prunekit.swap import swap_

    return swap_(model, min_speedup=args.min_speedup, tokens=args.tokens, progress=not args.quiet)


def facts(model: Any, folder: str) -> dict[str, int]:
    """Sizes in memory and on disk."""
    from prunekit import packed
    from prunekit.commands import measures

    return {
        "parameters_bytes": packed.weight_bytes(model),
        "folder_bytes": measures.folder_bytes(folder),
    }


def _shown(report: SwapReport, already: int, args: argparse.Namespace, size: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    lines = []
    if already:
        lines.append(f"{already} layers of {args.model} were packed before.")
    if report.swapped or not already:
        lines += [report.table(verbose=args.verbose), "", report.verdict]
    if args.format == "dense":
        lines.append("Packed layers were written as dense tensors.")
    lines.append(f"Saved to {args.output} ({terminal.size(size)}).")
    return Group(*(Text(line) for line in lines))
