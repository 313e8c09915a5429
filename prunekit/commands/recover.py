"""`prunekit recover`: fine-tune a pruned or dropped model towards the dense one, and save it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.divergence.recovery import RecoverReport

SUMMARY = "fine-tune a pruned model towards the dense one; zeros stay"
DESCRIPTION = """\
Fine-tune a pruned model, or one with dropped parts, on the dense model's next-token
distributions, and save it. Every weight that is zero stays zero.

The dense model (--teacher) runs once over the calibration text; then the layers and the final
norm of MODEL are trained by Adam, embeddings and head left as they are. Sequences are held out
to decide which state is kept. A killed run goes on where it stopped.
"""
EXAMPLE = "prunekit recover out/wanda24 --teacher demo --output out/recovered"

_SETTINGS = ("steps", "tokens", "lr", "kind", "cross_entropy", "temperature")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of what was pruned")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="the dense model: 'demo', folder, Hub id"
    )
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=options.positive, help="updates (120)")
    group.add_argument("--tokens", type=options.positive, help="tokens per update (4096)")
    group.add_argument(
        "--lr", type=options.above_zero, help="most that an update changes of a weight (0.001)"
    )
    group.add_argument(
        "--kind", help="loss: kl (KL(dense‖pruned), default), reverse_kl (KL(pruned‖dense)) or js"
    )
    group.add_argument(
        "--cross-entropy", type=options.fraction, help="weight of the text's own tokens beside (0)"
    )
    group.add_argument("--temperature", type=options.above_zero, help="of both distributions (1)")
    options.add_output(parser, "folder for the checkpoint")
    options.add_calibration(parser)
    parser.add_argument(
        "--no-journal",
        action="store_true",
        help="don't record the run in DIR.journal, from which a killed one goes on",
    )
    options.add_running(parser, batch_size=None)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    if args.teacher is None:
        raise PrunekitError("which dense model? give --teacher, for example --teacher demo")
    folder = options.output(args, options.CHECKPOINT)

    from prunekit import checkpoint
    from prunekit.commands import measures
    from prunekit.divergence.recovery import Recovery, recover_
    from prunekit.process import distributed
    from prunekit.pruning import journal

    recovery = Recovery(**options.given(args, _SETTINGS), seed=args.seed)
    calibration = options.calibration(args)
    if source == args.teacher:
        raise PrunekitError(
            f"the model and --teacher are both '{source}', so that nothing can be recovered: give "
            "a pruned copy as the model"
        )
    options.find((source, args.teacher))
    model, tokenizer = options.load(source, args)
    record = None if args.no_journal else journal.beside(folder)
    if record is not None and record.is_dir() and distributed.is_main() and not args.quiet:
        print(f"Going on with the run that {record} records.", file=sys.stderr)
    report = recover_(
        model,
        args.teacher,
        calibration,
        recovery=recovery,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        calibration_dtype=options.calibration_dtype(args),
        journal=record,
        progress=not args.quiet,
    )
    if not distributed.is_main():
        return
    facts = report.to_dict()
    checkpoint.save(model, tokenizer, folder, overwrite=args.overwrite, report={"recover": facts})
    if record is not None:
        journal.remove(record)
    size = measures.folder_bytes(folder)
    options.emit(
        args,
        answer,
        lambda: {"model": source, "output": folder, "folder_bytes": size, "report": facts},
        lambda: _shown(report, folder, size),
    )


def _shown(report: RecoverReport, folder: str, size: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    lines = [
        report.table(),
        "",
        f"{report.steps} updates on {report.tokens:,} tokens; {report.zeros:,} zeros stayed.",
        f"Saved to {folder} ({terminal.size(size)}).",
    ]
    return Group(*(Text(line) for line in lines))
