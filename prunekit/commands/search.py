"""`prunekit search`: compress every sublayer differently, for the least KL at a size or a speed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.mixing.result import SearchResult
    from prunekit.pruning.recipes import Method

SUMMARY = "find how to compress each layer, for the least KL at a size or a speed"
DESCRIPTION = """\
Choose for every attention and MLP how it is compressed, so that the whole model keeps a budget and
stays as close to the dense one as possible: exact KL divergence over a text.

Choices are made here (--choices: N:M patterns, percentages of zeros, 2:4 with values of 8 or 4 bits
as 2:4-int8, 2:4-int4 or 2:4-fp8, drop) or are checkpoints of copies that you have. A killed search
goes on where it stopped, and another budget in the same folder begins with all that was measured.
The model that was found is saved, packed, in DIR/best.
"""
EXAMPLE = "prunekit search demo --bytes 75% --choices 2:4,50%,2:4-int8,drop --output out/search"
#: `bits` of a method by how a choice ends.
_BITS = {"": None, "int8": 8, "int4": 4, "fp8": "fp8"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument("copies", nargs="*", metavar="COPY", help="compressed copies of the model")
    budget = parser.add_argument_group("budget (one of the two)")
    budget.add_argument(
        "--bytes", type=share, metavar="P%", help="largest size, of the dense model's: 60%%"
    )
    budget.add_argument(
        "--speed", type=times, metavar="Nx", help="smallest expected decoding speed: 1.3x"
    )
    budget.add_argument(
        "--tokens", type=options.positive, default=1, help="tokens per call for speeds (1)"
    )
    choices = parser.add_argument_group("choices")
    choices.add_argument(
        "--choices",
        metavar="LIST",
        help="made here: 2:4, 4:8, 50%%, 2:4-int8, 2:4-int4, 2:4-fp8, drop (2:4,50%%,drop)",
    )
    choices.add_argument("--method", default="sparsegpt", help="of --choices (sparsegpt)")
    text = parser.add_argument_group("text that KL is measured on")
    text.add_argument("--text", metavar="FILE", help=".txt, .jsonl, .json, .parquet (built in)")
    text.add_argument("--context", type=options.positive, default=256, help="tokens (256)")
    text.add_argument("--limit", type=options.positive, help="use at most so many windows")
    work = parser.add_argument_group("search")
    work.add_argument("--generations", type=options.whole, default=30, help="(30)")
    work.add_argument("--offspring", type=options.positive, default=16, help="per generation (16)")
    work.add_argument("--no-pack", action="store_true", help="save zeros as zeros, not packed")
    options.add_output(parser, "folder of copies, measurements, result and model", "out/search")
    options.add_calibration(parser)
    options.add_running(parser, batch_size=None)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    folder = _folder(args)
    from prunekit.checkpoint.sources import located

    copies = {Path(copy).name: located(copy) for copy in args.copies}
    words = args.choices
    if words is None:
        words = "" if copies else "2:4,50%,drop"
    choices = {**made(words, args.method), **copies}
    calibration = options.calibration(args)

    from prunekit import checkpoint
    from prunekit.mixing.run import search
    from prunekit.process import distributed
    from prunekit.swap import swap_

    model, tokenizer = options.load(source, args)
    result = search(
        model,
        tokenizer,
        choices,
        folder,
        bytes=args.bytes,
        speed=args.speed,
        text=args.text,
        text_field=args.text_field,
        context=args.context,
        limit=args.limit,
        generations=args.generations,
        offspring=args.offspring,
        tokens=args.tokens,
        calibration=calibration,
        seed=args.seed,
        progress=not args.quiet,
    )
    if not distributed.is_main():
        return
    if not args.no_pack:
        least = 0.0 if args.speed is None else 1.0
        swap_(model, min_speedup=least, tokens=args.tokens, progress=not args.quiet)
    best = folder / "best"
    report = {"search": result.to_dict()}
    checkpoint.save(model, tokenizer, best, overwrite=True, report=report)
    found = {"output": str(folder), "best": str(best), **result.to_dict()}
    options.emit(args, answer, lambda: found, lambda: _shown(result, folder, best))


def made(words: str, method: str) -> dict[str, Method | None]:
    """The choices that are made here, by the words that name them.

    Raises:
        PrunekitError: A word is none.
    """
    from prunekit.pruning.recipes import method_from_dict

    found: dict[str, Method | None] = {}
    for word in filter(None, (word.strip() for word in words.split(","))):
        zeros, _, values = word.partition("-")
        if word == "drop":
            found[word] = None
            continue
        if values not in _BITS or not (":" in zeros or zeros.endswith("%")):
            dense = " (without zeros they have no packed format)" if zeros in _BITS else ""
            raise PrunekitError(
                f"--choices: '{word}' is no choice{dense}: use for example 2:4, 50%, 2:4-int8, drop"
            )
        chosen = {"pattern": zeros} if ":" in zeros else {"sparsity": _percent(zeros)}
        found[word] = method_from_dict({"method": method, **chosen, "bits": _BITS[values]})
    return found


def _folder(args: argparse.Namespace) -> Path:
    """The output folder: new, or one of an earlier search, which goes on."""
    folder = Path(args.output).expanduser()
    if not (folder / "run.json").is_file() or args.overwrite:
        options.output(args, ("run.json", "measured.jsonl"))
    if args.overwrite:
        for name in ("run.json", "measured.jsonl"):
            (folder / name).unlink(missing_ok=True)
    return folder


def _percent(text: str) -> float:
    try:
        return float(text.rstrip("%")) / 100
    except ValueError:
        raise PrunekitError(f"'{text}' is not a percentage: use for example 50%") from None


def share(text: str) -> float:
    """A share, as 0.6 or as 60%."""
    return options.fraction(text[:-1]) / 100 if text.endswith("%") else options.fraction(text)


def times(text: str) -> float:
    """A factor, as 1.3 or as 1.3x."""
    return options.fraction(text.rstrip("x×"))


def _shown(result: SearchResult, folder: Path, best: Path) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.commands import measures
    from prunekit.report import terminal

    size = terminal.size(measures.folder_bytes(str(best)))
    return Group(
        result.table(),
        Text(f"Saved to {best} ({size}). The front: {folder / 'search.png'}, search.csv."),
    )
