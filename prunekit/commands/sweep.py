"""`prunekit sweep`: how much can go before a model breaks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from prunekit.commands import open_questions, options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.evaluation.items import Choice
    from prunekit.sweeping.points import Plan
    from prunekit.sweeping.result import Sweep

SUMMARY = "how much can go before a model breaks"
DESCRIPTION = """\
Ask a model and copies of it that lose more and more the same questions, once by choosing among
options (single-step) and once by writing (generation), and tell where each breaks: accuracy, exact
match, answers that stay the same, KL divergence, speed and bytes, all paired with the dense model's
answers. Copies: sublayers or blocks dropped (--drop, --counts), weights pruned (--method,
--sparsity, --pattern), or ready checkpoints (CHECKPOINT, quantised ones too); each list item may
be given several times, or several with commas.

Questions are files of your own, or 'builtin' (the default). --choices takes question, options,
answer; --generate takes the files of GSM8K, SVAMP, MAWPS (AddSub, MultiArith) and MATH as they
are, or any with a question and an answer in the fields that you name.

A killed sweep goes on where it stopped, and more copies may be asked for in the same folder.
"""
EXAMPLE = "prunekit sweep demo --drop attn --counts 1,2,4 --limit 40 --output out/sweep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="ready copies")
    copies = parser.add_argument_group("copies")
    copies.add_argument("--drop", action="append", metavar="UNIT", help="attn, mlp, all or block")
    copies.add_argument("--counts", action="append", metavar="N,N", help="how many go (1 to half)")
    copies.add_argument("--strategy", default="discrete", help="discrete (default) or iterative")
    copies.add_argument(
        "--method", action="append", help="magnitude, wanda, ria, sparsegpt or admm"
    )
    copies.add_argument("--sparsity", action="append", metavar="S,S", help="zeros (0.3,0.5,0.7)")
    copies.add_argument(
        "--pattern", action="append", help="unstructured (default), or N:M with N kept of M"
    )
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--choices",
        default="builtin",
        metavar="FILE",
        help="multiple choice: a file, 'builtin' (default) or 'none'",
    )
    open_questions.add_arguments(asked)
    asked.add_argument("--limit", type=options.positive, help="use at most so many of each")
    asked.add_argument("--text", metavar="FILE", help="of the KL divergence (a built-in one)")
    asked.add_argument("--context", type=options.positive, default=512, help="its windows (512)")
    asked.add_argument("--no-kl", action="store_true", help="leave the KL divergence out")
    asked.add_argument("--no-speed", action="store_true", help="don't time decoding")
    parser.add_argument(
        "--budget",
        type=options.above_zero,
        metavar="POINTS",
        help="points that may be lost; a series ends where both sides have lost more for certain "
        "(2, and no early end)",
    )
    parser.add_argument(
        "--save-best", metavar="DIR", help="save the smallest copy within the budget, by estimates"
    )
    options.add_output(parser, "folder for record, table and page", "out/sweep")
    options.add_calibration(parser)
    options.add_running(parser, batch_size=32)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    folder = options.resumable(args, ("run.json",))
    plans = _plans(args)
    choices = _choices(args)
    questions, asking = open_questions.load(args, args.batch_size)
    texts = _texts(args)
    best = _best_folder(args)
    calibration = options.calibration(args)
    options.find([source, *args.checkpoints])

    from prunekit import checkpoint
    from prunekit.divergence.processes import by_main
    from prunekit.process import distributed
    from prunekit.sweeping.run import emptied, sweep

    if args.overwrite:
        by_main(lambda: emptied(folder))
    model, tokenizer = options.load(source, args)
    counts = _numbers(args.counts, int, "--counts")
    layers = int(model.config.get_text_config().num_hidden_layers)
    result = sweep(
        model,
        tokenizer,
        plans(layers),
        choices=choices,
        questions=questions,
        asking=asking,
        counts=counts or list(range(1, layers // 2 + 1)),
        sparsities=_numbers(args.sparsity, float, "--sparsity") or [0.3, 0.5, 0.7],
        text=texts,
        kl=not args.no_kl,
        speed=not args.no_speed,
        context=args.context,
        budget=args.budget,
        calibration=calibration,
        calibration_dtype=options.calibration_dtype(args),
        output=folder,
        device=options.device(args.device),
        seed=args.seed,
        progress=not args.quiet,
        name="SmolLM2-135M-Instruct" if source == "demo" else Path(source).name or source,
    )
    saved = None
    if best is not None:
        made = result.make_best()
        if made is not None and distributed.is_main():
            checkpoint.save(made[0], tokenizer, best, overwrite=args.overwrite, report=made[1])
            saved = made[1]["sweep"]["point"]
    page = str(folder / "index.html")
    options.emit(
        args,
        answer,
        lambda: {"output": str(folder), "html": page, "saved": saved, **result.to_dict()},
        lambda: _shown(result, page, best, saved),
    )
    if result.failed:
        first = result.failed[0]
        raise PrunekitError(
            f"{len(result.failed)} of {len(result.rows)} copies failed, first {first.label} "
            f"({first.error}); the others are in {folder}: run again to try just those"
        )
    if best is not None and saved is None:
        raise PrunekitError(f"no copy stays within {result.margin:g} points: nothing saved")


def _best_folder(args: argparse.Namespace) -> str | None:
    if args.save_best is None:
        return None
    given = argparse.Namespace(**{**vars(args), "output": args.save_best})
    return options.output(given, options.CHECKPOINT)


def _plans(args: argparse.Namespace) -> Callable[[int], list[Plan]]:
    """What is tried, once the number of layers is known; wrong names are refused at once."""
    from prunekit.pruning import Drop, method_from_dict

    units = _words(args.drop)
    methods = [
        method_from_dict({"method": method, "pattern": pattern})
        for method in _words(args.method)
        for pattern in _words(args.pattern) or ["unstructured"]
    ]
    if not units and not methods and not args.checkpoints:
        units = ["attn"]
    if (args.sparsity or args.pattern) and not methods:
        raise PrunekitError("--sparsity and --pattern say how a --method prunes: give that too")
    checked = [Drop(unit, 1, args.strategy) for unit in units]
    return lambda layers: [
        *(Drop(one.unit, max(1, layers // 2), one.strategy) for one in checked),
        *methods,
        *args.checkpoints,
    ]


def _choices(args: argparse.Namespace) -> list[Choice]:
    from prunekit.evaluation.items import load_choices

    if args.choices == "none":
        return []
    return load_choices(None if args.choices == "builtin" else args.choices)[: args.limit]


def _texts(args: argparse.Namespace) -> list[str] | None:
    from prunekit.data import text_files

    if args.text is None:
        return None
    if args.no_kl:
        raise PrunekitError("--text is the text of the KL divergence: leave --no-kl out")
    return text_files.read_file(args.text, text_field=args.text_field)


def _words(given: Sequence[str] | None) -> list[str]:
    """An option that may be repeated, or hold several with commas; each once."""
    words = [word.strip() for text in given or () for word in text.split(",")]
    return list(dict.fromkeys(word for word in words if word))


Number = TypeVar("Number", int, float)


def _numbers(given: Sequence[str] | None, kind: type[Number], flag: str) -> list[Number]:
    try:
        return [kind(word) for word in _words(given)]
    except ValueError:
        raise PrunekitError(
            f"{flag} {','.join(given or ())} is no list of numbers: write numbers with commas"
        ) from None


def _shown(result: Sweep, page: str, best: str | None, saved: str | None) -> Any:
    from rich.console import Group
    from rich.text import Text

    said = [] if saved is None else [Text(f"\nSaved to {best}: {saved}")]
    return Group(result.table(), *said, Text(f"\nOpen {page}"))
