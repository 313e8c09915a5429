"""`prunekit prune`: set weights to zero and save the checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options, swap
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.pruning import PruneReport, Recipe, Reconstruction
    from prunekit.swap import SwapReport

SUMMARY = "set weights to zero: magnitude, Wanda, RIA, SparseGPT or ADMM"
DESCRIPTION = """\
Set weights of a model's decoder layers to zero and save it as a checkpoint.

A YAML file given with --config may hold any option by name, and instead of one method for all
matrices a mapping 'rules' from name patterns to methods:

  rules:
    "*.mlp.*": {method: sparsegpt, sparsity: 0.6}
    "*": {method: wanda, pattern: 2:4}
"""
EXAMPLE = "prunekit prune demo --method wanda --pattern 2:4 --output out/wanda24"

_METHOD_OPTIONS = (
    "method",
    "pattern",
    "sparsity",
    "update",
    "bits",
    "group",
    "variant",
    "power",
    "permute",
    "block",
    "damping",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.set_defaults(nested_keys=("rules", "budget"), rules=None)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument("--method", help="magnitude, wanda (default), ria, sparsegpt or admm")
    parser.add_argument("--pattern", help="unstructured (default), or N:M with N kept of M: 2:4")
    parser.add_argument(
        "--sparsity", type=options.fraction, help="fraction to prune (0.5, or what N:M implies)"
    )
    parser.add_argument(
        "--update", choices=("admm",), help="refit the kept weights of any method's mask"
    )
    parser.add_argument(
        "--bits", type=bits, help="round the kept weights to 8 or 4 bits, or to fp8, jointly"
    )
    parser.add_argument(
        "--group", type=options.positive, help="columns that share a scale (a row; at 4 bits 128)"
    )
    parser.add_argument("--variant", action="store_true", help="Wanda: thresholds per row (α)")
    parser.add_argument("--power", type=options.fraction, help="RIA: exponent of the inputs (0.5)")
    parser.add_argument(
        "--permute", action="store_true", help="RIA, N:M: order the inputs of gated MLPs' outputs"
    )
    parser.add_argument("--block", type=options.positive, help="SparseGPT: columns at once (128)")
    parser.add_argument(
        "--damping", type=options.fraction, help="SparseGPT, ADMM: of the mean (0.01)"
    )
    parser.add_argument(
        "--budget",
        choices=("uniform", "owl"),
        help="owl: layers with more outliers keep more, in all as many (uniform)",
    )
    parser.add_argument(
        "--owl-outlier", type=options.above_zero, help="OWL: times the mean that is an outlier (5)"
    )
    parser.add_argument(
        "--owl-spread", type=options.fraction, help="OWL: how far layers' sparsity differs (0.08)"
    )
    parser.add_argument(
        "--revive-zeros",
        action="store_true",
        help="SparseGPT: let zeros of an earlier pruning become weights again",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        metavar="GLOB",
        help="name pattern of matrices that stay dense, beside MoE routers; may be repeated",
    )
    group = parser.add_argument_group("local reconstruction")
    group.add_argument(
        "--reconstruct",
        action="store_true",
        help="fit each pruned block to the dense one's outputs by gradient descent, zeros held",
    )
    group.add_argument("--reconstruct-steps", type=options.positive, help="updates per block (64)")
    group.add_argument(
        "--reconstruct-lr", type=options.above_zero, help="most that an update changes (0.01)"
    )
    options.add_output(parser, "folder for the checkpoint")
    parser.add_argument(
        "--swap", action="store_true", help="pack what fits a sparse format (see: prunekit swap)"
    )
    swap.add_packing(parser)
    parser.add_argument("--verbose", action="store_true", help="a line per matrix in the table")
    options.add_calibration(parser)
    parser.add_argument(
        "--offload", choices=("cpu", "disk"), help="where activations wait for their turn"
    )
    parser.add_argument(
        "--no-journal",
        action="store_true",
        help="don't record calibrated layers in DIR.journal, from which a killed run goes on",
    )
    options.add_running(parser, batch_size=None)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    folder = options.output(args, options.CHECKPOINT)
    recipe = _recipe(args)
    reconstruct = _reconstruct(args)
    calibrated = reconstruct is not None or recipe.calibrated
    calibration = options.calibration(args) if calibrated else None

    from prunekit import checkpoint
    from prunekit.process import distributed
    from prunekit.pruning import journal, prune_

    model, tokenizer = options.load(source, args)
    record = journal.beside(folder) if calibrated and not args.no_journal else None
    if record is not None and distributed.is_main() and not args.quiet:
        _say_if_resuming(record)
    report = prune_(
        model,
        recipe,
        calibration,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        calibration_dtype=options.calibration_dtype(args),
        offload=args.offload,
        journal=record,
        reconstruct=reconstruct,
        progress=not args.quiet,
    )
    if not distributed.is_main():
        return
    reports = {"prune": report.to_dict()}
    swapped = swap.pack(model, args) if args.swap else None
    if swapped is not None:
        reports["swap"] = swapped.to_dict()
    checkpoint.save(model, tokenizer, folder, overwrite=args.overwrite, report=reports)
    if record is not None:
        journal.remove(record)
    sizes = swap.facts(model, folder)
    found = {
        "model": source,
        "output": folder,
        **sizes,
        "report": reports["prune"],
        "swap": reports.get("swap"),
    }
    options.emit(
        args,
        answer,
        lambda: found,
        lambda: _shown(report, swapped, folder, sizes["folder_bytes"], args.verbose),
    )


def _say_if_resuming(record: Path) -> None:
    from prunekit.pruning import journal

    done = journal.finished_blocks(record)
    if done:
        print(f"Going on after {done} finished layers ({record}).", file=sys.stderr)


def _recipe(args: argparse.Namespace) -> Recipe:
    from prunekit.pruning import DEFAULT_IGNORE, Recipe

    ignore = [*DEFAULT_IGNORE, *(args.ignore or [])]
    given = {name: getattr(args, name) for name in _METHOD_OPTIONS if getattr(args, name)}
    # False is no variant, but a sparsity of 0 must be refused, not ignored, and a power of 0 used
    given |= {"sparsity": args.sparsity} if args.sparsity is not None else {}
    given |= {"power": args.power} if args.power is not None else {}
    given |= {"keep_zeros": False} if args.revive_zeros else {}
    shared = {"ignore": ignore, "budget": _budget(args)}
    if args.rules is None:
        return Recipe.from_dict({"method": "wanda", **given, **shared})
    if given:
        raise PrunekitError(
            f"--{next(iter(given))} contradicts 'rules' of the configuration: put it into a rule"
        )
    return Recipe.from_dict({"rules": args.rules, **shared})


def _budget(args: argparse.Namespace) -> Any:
    given = options.given(args, ("outlier", "spread"), "owl_")
    if not given:
        return args.budget
    if args.budget != "owl" and not isinstance(args.budget, Mapping):
        raise PrunekitError(f"--owl-{next(iter(given))} needs --budget owl")
    return given if args.budget == "owl" else {**args.budget, **given}


def bits(text: str) -> int | str:
    """A number of bits, or "fp8"."""
    return text if text == "fp8" else options.positive(text)


def _reconstruct(args: argparse.Namespace) -> Reconstruction | None:
    from prunekit.pruning import Reconstruction

    given = options.given(args, ("steps", "lr"), "reconstruct_")
    if not args.reconstruct:
        if given:
            raise PrunekitError(f"--reconstruct-{next(iter(given))} needs --reconstruct")
        return None
    return Reconstruction(**given)


def _shown(
    report: PruneReport, swapped: SwapReport | None, folder: str, size: int, verbose: bool
) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    lines = [
        report.table(verbose=verbose),
        "",
        f"Zeros: {report.zeros:,} of {report.size:,} weights of the pruned matrices "
        f"({100 * report.sparsity:.2f} %); {len(report.left_dense)} matrices left dense.",
        f"Saved to {folder} ({terminal.size(size)}).",
    ]
    if swapped is not None:
        lines += ["", swapped.table(verbose=verbose), "", swapped.verdict]
    else:
        lines.append(
            "Not smaller and not faster: the zeros are stored and multiplied like any other "
            f"weight. To pack them: prunekit swap {folder} --output DIR"
        )
    return Group(*(Text(line) for line in lines))
