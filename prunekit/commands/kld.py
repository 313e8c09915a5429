"""`prunekit kld`: how far any compressed copies of a model are from it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

SUMMARY = "rank compressed copies of a model by KL divergence from it"
DESCRIPTION = """\
Compare any number of candidates with a reference over a text: KL divergence in both directions,
agreement of the top tokens, change of the actual token's probability, perplexity, exactly over the
whole vocabulary, with intervals by resampling documents. One model is in memory at a time.

A candidate is 'demo', a folder (quantised ones and PEFT adapters too), a .gguf file, a Hub id, a
capture of another engine, a file of llama.cpp's --kl-divergence-base, or any of the first four with
@bfloat16, @float16 or @float32 behind it. The row "reference in bfloat16" shows rounding alone.

A killed run goes on where it stopped, and finished candidates are not run again. If a candidate
fails, its row says why, the others go on, and the exit status is 2.
"""
EXAMPLE = "prunekit kld demo out/wanda24 out/drop4 --output out/kld"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("reference", nargs="?", metavar="REFERENCE", help="the original model")
    parser.add_argument("candidates", nargs="*", metavar="CANDIDATE", help="compressed copies")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", metavar="FILE", help=".txt, .jsonl, .json or .parquet (a built-in one)"
    )
    text.add_argument("--dataset", metavar="NAME", help="a Hub dataset instead; needs --limit")
    text.add_argument("--text-field", default="text", help="field of the text in rows (text)")
    text.add_argument(
        "--windows",
        choices=("llama.cpp", "strided", "documents"),
        default="llama.cpp",
        help="score each chunk's second half as llama.cpp does (default); windows every --stride "
        "tokens; or each document by itself",
    )
    text.add_argument("--context", type=options.positive, default=512, help="tokens (512)")
    text.add_argument("--stride", type=options.positive, help="of strided windows (the context)")
    text.add_argument("--limit", type=options.positive, help="use at most so many windows")
    work = parser.add_argument_group("comparison")
    work.add_argument(
        "--reference-cache", metavar="DIR", help="the reference's states (in the output folder)"
    )
    work.add_argument(
        "--floor",
        choices=("auto", "bfloat16", "float16", "float32", "none"),
        default="auto",
        help="type of the row that shows rounding alone (auto: bfloat16)",
    )
    work.add_argument(
        "--topk", type=options.whole, default=10, help="top tokens whose overlap is told (10)"
    )
    work.add_argument(
        "--write-base",
        metavar="FILE",
        help="also write the reference for llama.cpp's --kl-divergence-base",
    )
    work.add_argument("--tokenizer", metavar="MODEL", help="of a reference that has none")
    options.add_output(parser, "folder for rows, table and page", "out/kld")
    options.add_running(parser, batch_size=None)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    reference = options.needed(args.reference, "reference")
    place = args.device if args.device == "auto" else options.device(args.device)
    folder = _folder(args)

    from prunekit.divergence.candidates import sides
    from prunekit.divergence.processes import by_main
    from prunekit.divergence.reference import write_reference
    from prunekit.divergence.run import kld, tokenizer_of

    models = (side for side in sides([reference, *args.candidates]) if side.kind == "model")
    options.find(str(side.source) for side in models)
    if args.overwrite:
        by_main(lambda: _emptied(folder))
    result = kld(
        reference,
        args.candidates,
        args.text,
        context=args.context,
        windows=args.windows,
        stride=args.stride,
        limit=args.limit,
        dataset=args.dataset,
        text_field=args.text_field,
        output=folder,
        reference_cache=args.reference_cache,
        floor=args.floor,
        topk=args.topk,
        dtype=args.dtype,
        device=place,
        batch_size=args.batch_size,
        tokenizer=None if args.tokenizer is None else tokenizer_of(args.tokenizer),
        seed=args.seed,
        progress=not args.quiet,
    )
    if args.write_base is not None:
        write_reference(Path(args.write_base), result.held)
    options.emit(
        args,
        answer,
        lambda: {"output": str(folder), "html": str(folder / "index.html"), **result.to_dict()},
        lambda: _shown(result, folder),
    )
    if result.failed:
        first = result.failed[0]
        raise PrunekitError(
            f"{len(result.failed)} of {len(result.rows)} candidates failed, first {first.name} "
            f"({first.error}); the others are in {folder}: run again to try just those"
        )


def _folder(args: argparse.Namespace) -> Path:
    """The output folder: new, or one of an earlier run, which goes on."""
    if Path(args.output).expanduser().is_file():
        raise PrunekitError(f"{Path(args.output).expanduser()} is a file: choose another --output")
    return options.resumable(args, ("candidates", "reference", "kld.json"))


def _emptied(folder: Path) -> None:
    for name in ("candidates", "reference"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _shown(result: object, folder: Path) -> object:
    from rich.console import Group
    from rich.text import Text

    return Group(result.table(), Text(f"\nOpen {folder / 'index.html'}"))  # type: ignore[attr-defined]
